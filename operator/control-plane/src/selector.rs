//! Label and field selectors, as in `?labelSelector=` and `?fieldSelector=`.

use serde_json::Value;

use crate::error::ApiError;
use crate::resource::Resource;

/// One requirement on a label.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    DoesNotExist(String),
}

/// What a list or a watch is narrowed to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Selector {
    labels: Vec<Requirement>,
    /// Path, value, and whether it must differ.
    fields: Vec<(String, String, bool)>,
}

impl Selector {
    /// Reads both selectors.
    ///
    /// # Errors
    /// When one does not read, or a field is not selectable.
    pub(crate) fn parse(
        resource: &Resource,
        labels: Option<&str>,
        fields: Option<&str>,
    ) -> Result<Self, ApiError> {
        Ok(Self {
            labels: parse_labels(labels.unwrap_or_default())?,
            fields: parse_fields(resource, fields.unwrap_or_default())?,
        })
    }

    /// The name, where the selector asks for exactly one.
    pub(crate) fn matches(&self, object: &Value) -> bool {
        let labels = object.pointer("/metadata/labels");
        let label = |key: &str| labels.and_then(|l| l.get(key)).and_then(Value::as_str);
        let labels_match = self.labels.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => label(key).is_some_and(|found| values.iter().any(|v| v == found)),
            Requirement::NotIn(key, values) => {
                label(key).is_none_or(|found| values.iter().all(|v| v != found))
            }
            Requirement::Exists(key) => label(key).is_some(),
            Requirement::DoesNotExist(key) => label(key).is_none(),
        });
        labels_match
            && self.fields.iter().all(|(path, wanted, differ)| {
                let pointer = format!("/{}", path.replace('.', "/"));
                let found = match object.pointer(&pointer) {
                    Some(Value::String(text)) => text.clone(),
                    Some(Value::Null) | None => String::new(),
                    Some(other) => other.to_string(),
                };
                (found == *wanted) != *differ
            })
    }
}

fn parse_labels(text: &str) -> Result<Vec<Requirement>, ApiError> {
    let invalid = |part: &str| {
        ApiError::bad_request(format!(
            "unable to parse requirement: {part:?} is not a label requirement; write key=value, key!=value, key in (a,b), key notin (a,b), key or !key"
        ))
    };
    let mut requirements = Vec::new();
    for part in split_outside_parentheses(text) {
        let part = part.trim();
        if part.is_empty() {
            continue;
        }
        let set = |rest: &str| -> Result<Vec<String>, ApiError> {
            let inner = rest
                .trim()
                .strip_prefix('(')
                .and_then(|r| r.strip_suffix(')'))
                .ok_or_else(|| invalid(part))?;
            Ok(inner.split(',').map(|value| value.trim().to_owned()).collect())
        };
        let requirement = if let Some((key, rest)) = part.split_once(" notin ") {
            Requirement::NotIn(key.trim().to_owned(), set(rest)?)
        } else if let Some((key, rest)) = part.split_once(" in ") {
            Requirement::In(key.trim().to_owned(), set(rest)?)
        } else if let Some((key, value)) = part.split_once("!=") {
            Requirement::NotIn(key.trim().to_owned(), vec![value.trim().to_owned()])
        } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
            Requirement::In(key.trim().to_owned(), vec![value.trim().to_owned()])
        } else if let Some(key) = part.strip_prefix('!') {
            Requirement::DoesNotExist(key.trim().to_owned())
        } else if part.contains([' ', '(', ')']) {
            return Err(invalid(part));
        } else {
            Requirement::Exists(part.to_owned())
        };
        requirements.push(requirement);
    }
    Ok(requirements)
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0_i32, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text.get(start..at).unwrap_or_default());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text.get(start..).unwrap_or_default());
    parts
}

fn parse_fields(resource: &Resource, text: &str) -> Result<Vec<(String, String, bool)>, ApiError> {
    let mut fields = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (path, value, differ) = if let Some((path, value)) = part.split_once("!=") {
            (path, value, true)
        } else if let Some((path, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
            (path, value, false)
        } else {
            return Err(ApiError::bad_request(format!(
                "invalid selector: {part:?}; can't understand {part:?}"
            )));
        };
        let known = matches!(path, "metadata.name" | "metadata.namespace")
            || resource.selectable.iter().any(|s| s == path);
        if !known {
            return Err(ApiError::bad_request(format!(
                "field label not supported: {path}"
            )));
        }
        fields.push((path.to_owned(), value.to_owned(), differ));
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn matches(selector: &str) -> bool {
        let selector = Selector {
            labels: parse_labels(selector).unwrap(),
            fields: Vec::new(),
        };
        selector.matches(&json!({"metadata": {"labels": {"app": "web", "tier": "front"}}}))
    }

    #[test]
    fn label_selectors_mean_what_they_mean_in_kubernetes() {
        for yes in [
            "",
            "app=web",
            "app==web,tier",
            "app in (db,web)",
            "app notin (db)",
            "!missing",
            "app!=db",
            "missing notin (x)",
            "missing!=x",
        ] {
            assert!(matches(yes), "{yes}");
        }
        for no in ["app=db", "missing", "!app", "app notin (web,db)", "app in (db)"] {
            assert!(!matches(no), "{no}");
        }
        assert!(parse_labels("app in web").is_err());
    }
}
