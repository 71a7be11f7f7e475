//! The model's own chat template, run with bounded fuel and bounded output: it comes from a file that
//! somebody else wrote.

use std::io::Write;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value};
use serde::Serialize;
use serde_json::Value as Json;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::InvalidModel;
use crate::gguf::GgufFile;

/// Instructions that one rendering may take. A conversation of a thousand messages takes a few hundred
/// thousand at most; a loop without end is stopped within a second.
const FUEL: u64 = 500_000;
/// Longest rendering: 16 MiB of prompt exceed every context.
const OUTPUT_LIMIT: usize = 16 << 20;
/// Longest template: real ones stay below 30 KiB.
const SOURCE_LIMIT: usize = 256 << 10;
/// Deepest nesting of brackets in a template's source; the parser recurses.
const NESTING_LIMIT: usize = 64;
const NAME: &str = "chat";

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// The template of a GGUF file, if it has one.
    ///
    /// # Errors
    /// When the template does not compile.
    pub fn from_gguf(file: &GgufFile, bos: String, eos: String) -> Result<Option<Self>, InvalidModel> {
        let key = "tokenizer.chat_template";
        let Some(source) = file.optional(key, crate::gguf::Value::to_str)? else {
            return Ok(None);
        };
        let template = Self::new(source.to_owned(), bos, eos);
        template
            .map(Some)
            .map_err(|error| InvalidModel::inconsistent(key, error, "a Jinja template"))
    }

    /// Compiles a template.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(source: String, bos: String, eos: String) -> Result<Self, String> {
        if source.len() > SOURCE_LIMIT {
            return Err(format!(
                "it has {} bytes and at most {SOURCE_LIMIT} are allowed",
                source.len()
            ));
        }
        if nesting(&source) > NESTING_LIMIT {
            return Err(format!(
                "its brackets or blocks are nested more than {NESTING_LIMIT} deep"
            ));
        }
        let mut environment = Environment::new();
        // As transformers sets up Jinja, for which these templates are written.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|error| describe(&error))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(64);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", strftime_now);
        // In Python nothing can be gone through, which templates rely on where no tools are offered.
        environment.add_test("iterable", |value: &Value| {
            !value.is_none() && value.try_iter().is_ok()
        });
        environment.add_filter("tojson", to_json);
        let source = without_generation_marks(&source);
        environment
            .add_template_owned(NAME, source)
            .map_err(|error| describe(&error))?;
        Ok(Self {
            environment,
            bos,
            eos,
        })
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// What the template says of the conversation, or that it took too long.
    pub fn render(
        &self,
        messages: &Json,
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| describe(&error))?;
        let context = minijinja::context! {
            messages => Value::from(Serde(messages)),
            tools => tools.map(|tools| Value::from(Serde(tools))), add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.clone(), eos_token => self.eos.clone(),
        };
        let mut output = Bounded(Vec::new());
        template
            .render_captured_to(context, &mut output)
            .map_err(|error| describe(&error))?;
        String::from_utf8(output.0).map_err(|error| error.to_string())
    }
}

/// Today, in the words of Python's `strftime`: some models are told the date.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// The source with `{% generation %}` and its end turned into comments: transformers marks by them which
/// tokens of a training text are the assistant's, and they print nothing.
fn without_generation_marks(source: &str) -> String {
    let mut clean = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        clean.push_str(before);
        let Some(end) = tag[2..].find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let inside = &tag[2..end];
        let name = inside.trim_matches(['-', '+']).trim();
        if matches!(name, "generation" | "endgeneration") {
            clean.extend(["{#", inside, "#}"]);
        } else {
            clean.push_str(&tag[..end + 2]);
        }
        rest = &tag[end + 2..];
    }
    clean.push_str(rest);
    clean
}

/// Deepest nesting that the source can have: brackets, blocks left open, chains of operators. The parser
/// recurses into each, and a stack that overflows ends the process.
fn nesting(source: &str) -> usize {
    let (mut depth, mut deepest, mut chain) = (0_usize, 0, 0_usize);
    for byte in source.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        chain = match byte {
            b'-' | b'+' | b'~' | b' ' => chain + usize::from(byte != b' '),
            b'0'..=b'9' => chain,
            _ => 0,
        };
        deepest = deepest.max(depth).max(chain);
    }
    let mut nots = (0_usize, 0_usize);
    for word in source.split_whitespace() {
        nots.0 = if word == "not" { nots.0 + 1 } else { 0 };
        nots.1 = nots.1.max(nots.0);
    }
    let count = |words: &[&str]| {
        words
            .iter()
            .map(|word| source.matches(word).count())
            .sum::<usize>()
    };
    let opened = count(&["% if ", "%- if ", "% for ", "%- for ", "%if ", "%for "]);
    deepest
        .max(nots.1)
        .max(opened.saturating_sub(count(&["endif", "endfor"])))
}

fn describe(error: &minijinja::Error) -> String {
    match error.kind() {
        ErrorKind::OutOfFuel => "it takes too many steps (a loop without end?)".to_owned(),
        _ => crate::error::quote(&error.to_string()),
    }
}

/// JSON as transformers writes it for templates: Python's separators, and nothing escaped for HTML.
#[allow(clippy::needless_pass_by_value)] // minijinja hands its arguments over
fn to_json(value: Value, indent: Option<usize>, options: Kwargs) -> Result<Value, minijinja::Error> {
    let failed =
        |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent = match options.get::<Option<usize>>("indent")? {
        None => indent,
        named => named,
    };
    let mut bytes = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value
                .serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
                .map_err(failed)?;
        }
        None => value
            .serialize(&mut Serializer::with_formatter(&mut bytes, Python))
            .map_err(failed)?,
    }
    Ok(Value::from_safe_string(
        String::from_utf8_lossy(&bytes).into_owned(),
    ))
}

/// One line, with a space after each comma and colon.
struct Python;

impl Formatter for Python {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// A buffer that refuses to grow past its limit.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_LIMIT {
            return Err(std::io::Error::other(format!(
                "the rendering exceeds {OUTPUT_LIMIT} bytes"
            )));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::{Duration, Instant};

    fn render(source: &str) -> Result<String, String> {
        let template = ChatTemplate::new(source.to_owned(), "<s>".into(), "</s>".into())?;
        template.render(&json!([{"role": "user", "content": " hi "}]), None, true)
    }

    #[test]
    fn templates_speak_the_python_dialect() {
        let source = "{{ bos_token }}{% for m in messages %}{{ m['role'].upper() }}:{{ m.content.strip() }}\n{% endfor %}{% if add_generation_prompt %}A:{% endif %}";
        assert_eq!(render(source).unwrap(), "<s>USER:hi\nA:");
    }

    #[test]
    fn marks_of_training_texts_print_nothing() {
        let source = "{% for m in messages %}\n{%- generation -%} {{ m.content }} {%- endgeneration %}\n{% generation %}!{% endgeneration %}\n{% endfor %}{{ '{% generation' }}";
        assert_eq!(render(source).unwrap(), " hi !{% generation");
        // Found by a fuzzer.
        assert_eq!(without_generation_marks("{%} {%%} {%"), "{%} {%%} {%");
    }

    #[test]
    fn a_template_that_loops_is_stopped() {
        let started = Instant::now();
        let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{{ c }}{% endfor %}{% endfor %}{% endfor %}";
        assert!(render(source).unwrap_err().contains("too many steps"));
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "{:?}",
            started.elapsed()
        );
    }

    #[test]
    fn a_template_that_grows_is_stopped() {
        let source = "{% set x = namespace(s='xxxxxxxxxxxxxxxx') %}{% for a in range(9000) %}{{ 'x' * 100000 }}{% endfor %}";
        let error = render(source).unwrap_err();
        assert!(!error.is_empty());
    }

    #[test]
    fn a_template_may_refuse_a_conversation() {
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert!(error.contains("roles must alternate"), "{error}");
    }
}
