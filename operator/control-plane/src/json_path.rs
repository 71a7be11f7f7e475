//! The JSONPath of printer columns: fields, `['key']`, `[index]`, `[*]`, and filters that compare one field.

use serde_json::Value;

/// One step of a path.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    Field(String),
    /// Counted from the end when negative.
    Index(i64),
    Every,
    /// Items whose field at a path is, or is not, a value.
    Where {
        path: Vec<String>,
        equal: bool,
        wanted: Value,
    },
}

/// The first value that the path leads to; None also when the path does not read.
pub(crate) fn lookup<'a>(object: &'a Value, path: &str) -> Option<&'a Value> {
    let mut found = vec![object];
    for step in parse(path)? {
        found = found.into_iter().flat_map(|value| follow(value, &step)).collect();
    }
    found.first().copied()
}

fn follow<'a>(value: &'a Value, step: &Step) -> Vec<&'a Value> {
    match step {
        Step::Field(name) => value.get(name).into_iter().collect(),
        Step::Index(index) => {
            let items = value.as_array().map_or(&[][..], Vec::as_slice);
            let at = if *index < 0 {
                items.len() as i64 + index
            } else {
                *index
            };
            let at = usize::try_from(at).ok();
            at.and_then(|at| items.get(at)).into_iter().collect()
        }
        Step::Every => match value {
            Value::Array(items) => items.iter().collect(),
            Value::Object(fields) => fields.values().collect(),
            _ => Vec::new(),
        },
        Step::Where { path, equal, wanted } => {
            let items = value.as_array().map_or(&[][..], Vec::as_slice);
            let holds = |item: &&Value| {
                let found = path.iter().try_fold(*item, |value, name| value.get(name));
                found.is_some_and(|found| (found == wanted) == *equal)
            };
            items.iter().filter(holds).collect()
        }
    }
}

fn parse(path: &str) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    let mut rest = path.trim().strip_prefix('$').unwrap_or(path.trim());
    while !rest.is_empty() {
        if let Some(inside) = rest.strip_prefix("[?(") {
            let (condition, after) = inside.split_once(")]")?;
            steps.push(condition_of(condition)?);
            rest = after;
        } else if let Some(inside) = rest.strip_prefix("['").or_else(|| rest.strip_prefix("[\"")) {
            let quote = if rest.starts_with("['") { "']" } else { "\"]" };
            let (name, after) = inside.split_once(quote)?;
            steps.push(Step::Field(unescaped(name)));
            rest = after;
        } else if let Some(inside) = rest.strip_prefix('[') {
            let (index, after) = inside.split_once(']')?;
            steps.push(match index.trim() {
                "*" => Step::Every,
                index => Step::Index(index.parse().ok()?),
            });
            rest = after;
        } else {
            let name = rest.strip_prefix('.').unwrap_or(rest);
            let end = end_of_name(name);
            let (name, after) = name.split_at(end);
            match name {
                "" => return None,
                "*" => steps.push(Step::Every),
                name => steps.push(Step::Field(unescaped(name))),
            }
            rest = after;
        }
    }
    Some(steps)
}

/// Where a bare name ends; `\.` belongs to it.
fn end_of_name(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            '\\' => escaped = !escaped,
            '.' | '[' if !escaped => return at,
            _ => escaped = false,
        }
    }
    text.len()
}

fn unescaped(name: &str) -> String {
    name.replace("\\.", ".").replace("\\'", "'")
}

fn condition_of(text: &str) -> Option<Step> {
    let (equal, (path, wanted)) = match text.split_once("==") {
        Some(sides) => (true, sides),
        None => (false, text.split_once("!=")?),
    };
    let path = path.trim().strip_prefix("@.")?;
    let wanted = wanted.trim();
    let quoted = |quote: char| {
        wanted
            .strip_prefix(quote)
            .and_then(|rest| rest.strip_suffix(quote))
    };
    let wanted = match quoted('\'').or_else(|| quoted('"')) {
        Some(text) => Value::from(text),
        None => serde_json::from_str(wanted).ok()?,
    };
    Some(Step::Where {
        path: path.split('.').map(str::to_owned).collect(),
        equal,
        wanted,
    })
}

/// A value as a cell of text.
pub(crate) fn show(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn printer_paths_reach_what_printer_columns_ask_for() {
        let object = json!({
            "metadata": {"labels": {"app.kubernetes.io/name": "web", "plain": "p"}},
            "status": {"list": ["a", "b"], "items": [{"n": 1}, {"n": 2}],
                "conditions": [{"type": "Stalled", "status": "False"}, {"type": "Ready", "status": "True", "code": 7}]},
        });
        for (path, found) in [
            (
                ".status.conditions[?(@.type=='Ready')].status",
                Some(json!("True")),
            ),
            (".status.conditions[?(@.type==\"Ready\")].code", Some(json!(7))),
            (
                ".status.conditions[?( @.type == 'Ready' )].status",
                Some(json!("True")),
            ),
            (".status.conditions[?(@.code==7)].type", Some(json!("Ready"))),
            (
                ".status.conditions[?(@.type!='Ready')].type",
                Some(json!("Stalled")),
            ),
            (".status.conditions[?(@.type=='Nope')].status", None),
            (".status.list[1]", Some(json!("b"))),
            (".status.list[-1]", Some(json!("b"))),
            (".status.list[-3]", None),
            (".status.list[7]", None),
            (".status.list[*]", Some(json!("a"))),
            (".status.items[*].n", Some(json!(1))),
            (".metadata.labels.app\\.kubernetes\\.io/name", Some(json!("web"))),
            (
                ".metadata.labels['app\\.kubernetes\\.io/name']",
                Some(json!("web")),
            ),
            (".metadata.labels['app.kubernetes.io/name']", Some(json!("web"))),
            (".metadata.labels[\"plain\"]", Some(json!("p"))),
            ("$.metadata.labels.plain", Some(json!("p"))),
            (".status..list", None),
            (".status.list[", None),
            (".status.list[x]", None),
            (".status.conditions[?(@.type)]", None),
        ] {
            assert_eq!(lookup(&object, path).cloned(), found, "{path}");
        }
    }

    proptest! {
        #[test]
        fn no_path_makes_it_panic_or_hang(path in "[$.a-b\\[\\]?(@='\"!*\\\\0-9)-]{0,40}") {
            let _ = lookup(&json!({"a": [{"b": 1}, {"a": "b"}], "b": {"a": null}}), &path);
        }
    }
}
