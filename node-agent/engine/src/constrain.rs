//! Answers that must follow a JSON schema, a regular expression or a grammar.
//!
//! llguidance says which tokens may come next; one that may not is never chosen, so what is written is valid at
//! every token, and complete unless the answer's length ends it. As a rule it is asked about the token that the
//! model likes best, and about all of them only where that one may not come. Where only one text can follow, that
//! text is guessed ahead like any other ([`crate::scheduler`]).

#[cfg(test)]
mod tests;
mod watch;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Map, Value, json};

use crate::Reject;
use crate::sampling::Allowed;
use crate::tokenizer::{Special, Tokenizer};
use watch::{Stint, Watch};

/// Longest schema, expression or grammar in bytes: hostile ones are refused before they are compiled.
const SOURCE_LIMIT: usize = 256 << 10;
/// Longest message of a refusal, in characters.
const MESSAGE_LIMIT: usize = 400;
/// Questions about single tokens and steps after which all are asked about: only that refills what llguidance lets an expression
/// cost.
const ASK_ALL_EVERY: u32 = 128;

/// What may stand in a schema; annotations are ignored.
const SCHEMAS: &str = "a JSON schema that some value satisfies, of type, enum, const, anyOf, allOf, oneOf of what \
    excludes each other, $ref within it, items, prefixItems, minItems, maxItems, properties, additionalProperties, \
    patternProperties, required, minProperties, maxProperties, minLength, maxLength, pattern, format, minimum, \
    maximum, exclusiveMinimum, exclusiveMaximum and multipleOf";

/// What an answer must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Constraint {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema (draft 2020-12) allows.
    JsonSchema(Value),
    /// Text that a regular expression matches from beginning to end.
    Regex(String),
    /// Text of a context-free grammar in llguidance's form of Lark.
    Lark(String),
}

impl Constraint {
    /// Bytes of its source.
    fn source_bytes(&self) -> usize {
        match self {
            Self::JsonObject => 0,
            Self::JsonSchema(schema) => schema.to_string().len(),
            Self::Regex(source) | Self::Lark(source) => source.len(),
        }
    }

    fn grammar(&self) -> TopLevelGrammar {
        match self {
            Self::JsonObject => TopLevelGrammar::from_json_schema(tight(json!({"type": "object"}))),
            Self::JsonSchema(schema) => TopLevelGrammar::from_json_schema(tight(schema.clone())),
            Self::Regex(source) => TopLevelGrammar::from_regex(source),
            Self::Lark(source) => TopLevelGrammar::from_lark(source.clone()),
        }
    }
}

/// Spaces only where people put them: left free, a small model fills its answer with blank lines.
fn tight(schema: Value) -> Value {
    let spaces = json!({"whitespace_flexible": false, "item_separator": ", ?", "key_separator": ": ?"});
    let mut fields = match schema {
        Value::Object(fields) => fields,
        // `true`, and what is no schema, which the compiler refuses with a reason.
        other => Map::from_iter([("allOf".to_owned(), json!([other]))]),
    };
    fields.entry("x-guidance").or_insert(spaces);
    Value::Object(fields)
}

/// Compiles constraints for one model. The tree of its tokens is built when first needed.
#[derive(Default)]
pub(crate) struct Grammars {
    factory: OnceLock<Result<(ParserFactory, Watch), String>>,
}

impl Grammars {
    /// # Errors
    /// [`Reject::InvalidRequest`] that says what cannot be followed.
    pub(crate) fn compile(&self, constraint: &Constraint, tokenizer: &Tokenizer) -> Result<Guide, Reject> {
        let refuse = |found: String, allowed: &str| Reject::InvalidRequest {
            field: "response_format".to_owned(),
            found,
            allowed: allowed.to_owned(),
        };
        let bytes = constraint.source_bytes();
        if bytes > SOURCE_LIMIT {
            return Err(refuse(
                format!("{bytes} bytes long"),
                "at most 256 KiB of schema, expression or grammar",
            ));
        }
        let (factory, watch) = self
            .factory
            .get_or_init(|| Ok((factory(tokenizer)?, Watch::start()?)))
            .as_ref()
            .map_err(|error| Reject::Compute(error.clone()))?;
        // What strangers send is compiled by code that is not ours: a panic of it refuses the request.
        let compiled: std::thread::Result<Result<_, String>> = catch_unwind(AssertUnwindSafe(|| {
            let matcher = Matcher::new(factory.create_parser(constraint.grammar())).into_cancellable();
            let stint = watch.add(matcher.cancellation_handle().unwrap_or_default());
            let mut guide = Guide {
                matcher: Box::new(matcher),
                stint,
                tokens: factory.tok_env().tok_trie().vocab_size(),
                since_all: 0,
            };
            // The first mask finds grammars that nothing can satisfy.
            let first = guide.ask(Matcher::compute_mask)?;
            Ok((guide, first.is_zero()))
        }));
        let problem = match compiled {
            Ok(Ok((guide, false))) => return Ok(guide),
            Ok(Ok((_, true))) => "nothing satisfies it".to_owned(),
            Ok(Err(error)) => error,
            Err(_) => "it cannot be compiled".to_owned(),
        };
        let problem = first_line(&problem);
        let (place, allowed) = match constraint {
            Constraint::JsonObject => (None, SCHEMAS),
            Constraint::JsonSchema(schema) => (place(schema, &problem, "#"), SCHEMAS),
            Constraint::Regex(_) => (
                None,
                "a regular expression of Rust's syntax that some text satisfies",
            ),
            Constraint::Lark(_) => (
                None,
                "a grammar in llguidance's form of Lark that some text satisfies",
            ),
        };
        let place: String = place
            .map(|place| format!(" at {place}"))
            .unwrap_or_default()
            .chars()
            .take(MESSAGE_LIMIT)
            .collect();
        Err(refuse(
            format!("a constraint that cannot be followed{place} ({problem})"),
            allowed,
        ))
    }
}

/// Where in a schema the fault is: the compiler names the keyword or the value, and not its place.
fn place(schema: &Value, problem: &str, path: &str) -> Option<String> {
    let step = |name: &str| format!("{path}/{}", name.replace('~', "~0").replace('/', "~1"));
    match schema {
        Value::Object(fields) => fields.iter().find_map(|(name, value)| {
            let told = problem.contains(&format!("\"{name}\"")) || problem.contains(&format!("'{name}'"));
            let value_told = value
                .as_str()
                .is_some_and(|value| problem.ends_with(&format!(": {value}")));
            if told || value_told {
                return Some(step(name));
            }
            place(value, problem, &step(name))
        }),
        Value::Array(values) => values
            .iter()
            .enumerate()
            .find_map(|(index, value)| place(value, problem, &step(&index.to_string()))),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    }
}

fn factory(tokenizer: &Tokenizer) -> Result<ParserFactory, String> {
    let ends = tokenizer.ends();
    let Some(&end) = ends.first() else {
        return Err("the model has no token that ends an answer".to_owned());
    };
    let words: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32)
        .map(|token| {
            let mut bytes = Vec::new();
            tokenizer.append_bytes(token, &mut bytes);
            if bytes.is_empty() || ends.contains(&token) {
                // Control tokens have a place of their own that no text reaches.
                bytes = vec![TokTrie::SPECIAL_TOKEN_MARKER];
                bytes.extend_from_slice(tokenizer.token_text(token).as_bytes());
            }
            bytes
        })
        .collect();
    let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, end), &words).with_eos_tokens(ends);
    let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
    factory.quiet();
    // Errors must not hold what was written so far.
    factory.limits_mut().verbose_errors = false;
    Ok(factory)
}

/// Where one answer is in its grammar.
pub(crate) struct Guide {
    matcher: Box<Matcher>,
    stint: Arc<Stint>,
    /// Tokens that the tokenizer has.
    tokens: usize,
    /// Questions about single tokens and steps since all were asked about.
    since_all: u32,
}

/// Fails when the grammar has become too costly to follow.
impl Allowed for Guide {
    fn allows(&mut self, token: u32) -> Result<bool, String> {
        // Rows beyond the tokenizer's tokens stand for nothing.
        if token as usize >= self.tokens {
            return Ok(false);
        }
        if self.since_all >= ASK_ALL_EVERY {
            return Ok(self.all()?.is_allowed(token));
        }
        self.since_all += 1;
        let valid = self.ask(|matcher| matcher.validate_tokens(&[token]));
        Ok(valid.map_err(followed_no_further)? == 1)
    }

    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let mask = self.all()?;
        let tokens = mask.len().min(logits.len());
        // Rows beyond the tokenizer's tokens stand for nothing.
        logits[tokens..].fill(f32::NEG_INFINITY);
        mask.iter_unset_entries(|token| {
            if let Some(logit) = logits.get_mut(token) {
                *logit = f32::NEG_INFINITY;
            }
        });
        Ok(())
    }
}

impl Guide {
    /// All tokens that may come next.
    fn all(&mut self) -> Result<SimpleVob, String> {
        self.since_all = 0;
        self.ask(Matcher::compute_mask_or_eos)
            .map_err(followed_no_further)
    }

    /// Asks llguidance, for so long as that may take.
    fn ask<T, E: std::fmt::Display>(
        &mut self,
        question: impl FnOnce(&mut Matcher) -> Result<T, E>,
    ) -> Result<T, String> {
        let answer = self.stint.during(|| question(&mut self.matcher));
        if self.matcher.is_cancelled() {
            let limit = watch::LONGEST.as_millis();
            return Err(format!(
                "it took longer than {limit} ms to say what may come next"
            ));
        }
        answer.map_err(|error| first_line(&error.to_string()))
    }

    /// Goes on by the token that was chosen. True when the text is complete and nothing can follow.
    ///
    /// # Errors
    /// When the token does not fit, which is a fault of this program.
    pub(crate) fn advance(&mut self, token: u32) -> Result<bool, String> {
        self.since_all += 1;
        self.ask(|matcher| matcher.consume_token(token))
            .map_err(followed_no_further)?;
        Ok(self.matcher.is_stopped())
    }

    /// The tokens of the text that must come next, as the model would most likely cut it; often none.
    pub(crate) fn forced(&mut self, tokenizer: &Tokenizer) -> Vec<u32> {
        let bytes = self.stint.during(|| self.matcher.compute_ff_bytes());
        let Ok(text) = std::str::from_utf8(&bytes) else {
            return Vec::new();
        };
        if text.is_empty() {
            return Vec::new();
        }
        tokenizer.encode(text, Special::default())
    }
}

fn followed_no_further(mut problem: String) -> String {
    problem.insert_str(0, "the grammar cannot be followed further: ");
    problem
}

fn first_line(text: &str) -> String {
    text.lines()
        .next()
        .unwrap_or_default()
        .chars()
        .take(MESSAGE_LIMIT)
        .collect()
}
