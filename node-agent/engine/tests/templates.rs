//! Chat templates: the same text as Jinja under transformers gives, and bounded whatever they try.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::{SMOLLM2, model};
use freehold_engine::ChatTemplate;
use freehold_engine::gguf::{GgufFile, Value};
use serde_json::{Value as Json, json};

#[derive(serde::Deserialize)]
struct Chats {
    templates: BTreeMap<String, Option<String>>,
    /// Names of templates that models were published with.
    published: Vec<String>,
    conversations: BTreeMap<String, Json>,
}

/// What `fixtures/record_chats.py` recorded: by template, then by conversation.
fn recorded() -> BTreeMap<String, BTreeMap<String, Json>> {
    serde_json::from_str(include_str!("fixtures/rendered_chats.json")).unwrap()
}

fn template(source: &str) -> Result<ChatTemplate, String> {
    ChatTemplate::new(source.to_owned(), "<s>".into(), "</s>".into())
}

fn own_template() -> String {
    let file = GgufFile::open(&model(SMOLLM2)).unwrap();
    match file.value("tokenizer.chat_template").unwrap() {
        Value::Str(source) => source.clone(),
        other => panic!("the template is {other:?}"),
    }
}

/// The date of today where the recording has a date's format.
fn dated(recorded: &str) -> String {
    let mut parts = recorded.split('\u{1}');
    let mut text = parts.next().unwrap().to_owned();
    for part in parts {
        let (format, rest) = part.split_once('\u{2}').unwrap();
        text += &jiff::Zoned::now().strftime(format).to_string();
        text += rest;
    }
    text
}

/// The models' own templates, and some that hold what others do not.
#[test]
fn renderings_equal_those_of_transformers() {
    let chats: Chats = serde_json::from_str(include_str!("fixtures/chats.json")).unwrap();
    let published = chats.published.iter().map(|name| {
        let path = model("templates").join(format!("{name}.jinja"));
        (name.clone(), std::fs::read_to_string(path).unwrap())
    });
    let made = chats.templates.iter();
    let made = made.map(|(name, source)| (name.clone(), source.clone().unwrap_or_else(own_template)));
    let (mut formatting, mut equal) = (0, 0);
    for (name, source) in made.chain(published) {
        let template = template(&source).unwrap_or_else(|error| panic!("{name}: {error}"));
        for (chat, conversation) in &chats.conversations {
            let prompt = conversation
                .get("add_generation_prompt")
                .is_none_or(|flag| flag == true);
            let render = || template.render(&conversation["messages"], conversation.get("tools"), prompt);
            let rendered = render();
            if let Err(error) = &rendered
                && error.contains("tried to use % operator")
            {
                // Python's formatting of text by % is not there in minijinja: refused, never rendered wrong.
                formatting += 1;
                continue;
            }
            match &recorded()[&name][chat] {
                Json::String(expected) => {
                    let rendered = rendered.unwrap_or_else(|error| panic!("{name}, {chat}: {error}"));
                    // At midnight the day ends between the two.
                    if rendered != dated(expected) {
                        assert_eq!(render().unwrap(), dated(expected), "{name}, {chat}");
                    }
                    equal += 1;
                }
                refused => {
                    // What the template says is passed on. Where Python itself stumbles over a type, it does not matter
                    // whether we do.
                    let why = refused["refused"].as_str().unwrap();
                    let pythons = ["concatenate", "has no attribute", "not iterable"];
                    if !pythons.into_iter().any(|words| why.contains(words)) {
                        let error = rendered.expect_err(chat);
                        assert!(error.contains(why), "{name}, {chat}: {error}, not {why}");
                    }
                }
            }
        }
    }
    assert!(formatting <= 9, "{formatting} renderings need formatting by %");
    assert!(equal > 125, "{equal} renderings were compared");
}

/// Renders, under the clock.
fn render(source: &str) -> Result<String, String> {
    let started = Instant::now();
    let messages = json!([{"role": "user", "content": "x".repeat(1000)}]);
    let rendered = template(source).and_then(|template| template.render(&messages, None, true));
    let took = started.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?} for {source:.80}");
    rendered
}

#[test]
fn templates_that_never_end_are_stopped() {
    let many = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}";
    let ends = "{% endfor %}{% endfor %}{% endfor %}";
    for source in [
        format!("{many}{ends}"),
        format!("{many}{{{{ c }}}}{ends}"),
        format!("{many}{{% set x = a * b * c %}}{ends}"),
        "{% macro again() %}{{ again() }}{{ again() }}{% endmacro %}{{ again() }}".to_owned(),
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}".to_owned(),
        "{% include 'chat' %}".to_owned(),
        "{% extends 'chat' %}".to_owned(),
        "{% import 'chat' as chat %}{{ chat }}".to_owned(),
    ] {
        let error = render(&source).expect_err(&source);
        assert!(error.len() < 1000, "{} bytes of error", error.len());
    }
}

#[test]
fn templates_that_grow_without_end_are_stopped() {
    let double = |step: &str| {
        format!(
            "{{% set ns = namespace(s='x' * 64, l=[1, 2]) %}}{{% for i in range(64) %}}{step}{{% endfor %}}{{{{ ns.s }}}}"
        )
    };
    for source in [
        "{% for a in range(9000) %}{{ 'x' * 100000 }}{% endfor %}".to_owned(),
        double("{% set ns.s = ns.s ~ ns.s %}"),
        double("{% set ns.s = ns.s + ns.s %}"),
        double("{% set ns.s = ns.s * 1000 %}"),
        double("{% set ns.s = ns.s | replace('x', ns.s) %}"),
        double("{% set ns.s = ns.s.replace('x', 'xxxxxxxx') %}"),
        double("{% set ns.s = [ns.s, ns.s] | join %}"),
        double("{% set ns.s = ''.join([ns.s, ns.s]) %}"),
        double("{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
        double("{% set ns.s = '%s%s' | format(ns.s, ns.s) %}"),
        double(
            "{% set ns.s = ns.s | indent(999999) %}{% set ns.s = ns.s | tojson | tojson | tojson %}{% set ns.s = ns.s ~ ns.s %}",
        ),
        double("{% set ns.l = ns.l + ns.l %}{{ ns.l | length }}{% set ns.s = ns.l | join(ns.s) %}"),
        double("{% set ns.l = [ns.l, ns.l] %}{% set ns.s = ns.l | string %}"),
    ] {
        let error = render(&source).expect_err(&source);
        assert!(error.len() < 1000, "{} bytes of error", error.len());
    }
}

#[test]
fn templates_see_nothing_but_the_conversation() {
    for source in [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context }}",
        "{{ messages.__class__ }}",
        "{{ get_env('HOME') }}",
        "{{ open('/etc/hostname').read() }}",
        "{% include '/etc/hostname' %}",
    ] {
        let rendered = render(source).unwrap_or_default();
        assert_eq!(rendered.trim(), "", "{source}");
    }
}

#[test]
fn broken_templates_are_refused_with_the_place() {
    for source in [
        "{% for %}",
        "{{ 1 + }}",
        "{% if x %}",
        "{% endif %}",
        "{{ 'open }}",
        "{% nonsense %}",
    ] {
        let error = template(source).err().expect(source);
        assert!(error.contains("chat:1") || error.contains("line"), "{error}");
    }
    for deep in [
        "(".repeat(100_000),
        "[".repeat(100_000),
        "not ".repeat(100_000),
        "-".repeat(100_000),
    ] {
        assert!(template(&format!("{{{{ {deep}")).is_err());
    }
    let long = template(&format!("{{{{ 1{} }}}}", " + 1".repeat(100_000)));
    drop(long.map(|template| template.render(&json!([]), None, true)));
}

#[test]
fn what_a_template_says_in_refusal_is_passed_on_and_bounded() {
    assert!(
        render("{{ raise_exception('roles must alternate') }}")
            .unwrap_err()
            .contains("roles must alternate")
    );
    let error = render("{{ raise_exception('x' * 1000000) }}").unwrap_err();
    assert!(error.len() < 1000, "{} bytes of error", error.len());
}
