//! Label and field selectors, as in `?labelSelector=` and `?fieldSelector=`.

use std::iter::Peekable;
use std::vec::IntoIter;

use serde_json::Value;

use crate::error::ApiError;
use crate::metadata;
use crate::resource::Resource;

/// One requirement on a label.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    DoesNotExist(String),
    GreaterThan(String, i64),
    LessThan(String, i64),
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

    /// Whether an object is selected.
    pub(crate) fn matches(&self, object: &Value) -> bool {
        let labels = object.pointer("/metadata/labels");
        let label = |key: &str| labels.and_then(|l| l.get(key)).and_then(Value::as_str);
        let number = |key: &str| label(key).and_then(|text| text.parse::<i64>().ok());
        let labels_match = self.labels.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => label(key).is_some_and(|found| values.iter().any(|v| v == found)),
            Requirement::NotIn(key, values) => {
                label(key).is_none_or(|found| values.iter().all(|v| v != found))
            }
            Requirement::Exists(key) => label(key).is_some(),
            Requirement::DoesNotExist(key) => label(key).is_none(),
            Requirement::GreaterThan(key, bound) => number(key).is_some_and(|found| found > *bound),
            Requirement::LessThan(key, bound) => number(key).is_some_and(|found| found < *bound),
        });
        labels_match
            && self.fields.iter().all(|(path, wanted, differ)| {
                let pointer = match path.as_str() {
                    // Of an event: who tells it.
                    "source" => "/source/component".to_owned(),
                    path => format!("/{}", path.replace('.', "/")),
                };
                let found = match object.pointer(&pointer) {
                    Some(Value::String(text)) => text.clone(),
                    Some(Value::Null) | None => String::new(),
                    Some(other) => other.to_string(),
                };
                (found == *wanted) != *differ
            })
    }
}

/// A piece of a label selector.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    /// One of `,`, `(`, `)`, `!`, `=`, `==`, `!=`, `<`, `>`.
    Sign(&'static str),
    End,
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Self::Word(text) => text,
            Self::Sign(sign) => sign,
            Self::End => "",
        }
    }

    fn is(&self, text: &str) -> bool {
        !matches!(self, Self::End) && self.text() == text
    }
}

fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let sign = ["==", "!=", "=", "!", ",", "(", ")", "<", ">"]
            .into_iter()
            .find(|sign| rest.starts_with(sign));
        match sign {
            Some(sign) => {
                tokens.push(Token::Sign(sign));
                rest = rest.get(sign.len()..).unwrap_or_default();
            }
            None => {
                let special = |c: char| c.is_ascii_whitespace() || "=!,()<>".contains(c);
                let (word, after) = rest.split_at(rest.find(special).unwrap_or(rest.len()));
                tokens.push(Token::Word(word.to_owned()));
                rest = after;
            }
        }
        rest = rest.trim_start();
    }
    tokens
}

/// Reads a label selector by its grammar; the messages are those of the API server.
fn parse_labels(text: &str) -> Result<Vec<Requirement>, ApiError> {
    let mut tokens = tokens(text).into_iter().peekable();
    let mut requirements = Vec::new();
    let next = |tokens: &mut Peekable<IntoIter<Token>>| tokens.next().unwrap_or(Token::End);
    if tokens.peek().is_none() {
        return Ok(requirements);
    }
    loop {
        match tokens.peek() {
            Some(Token::Word(_) | Token::Sign("!")) => {}
            found => {
                let found = found.map_or("", Token::text);
                let expected = if requirements.is_empty() {
                    "!, identifier, or 'end of string'"
                } else {
                    "identifier after ','"
                };
                return Err(ApiError::bad_request(format!(
                    "found '{found}', expected: {expected}"
                )));
            }
        }
        let requirement = parse_requirement(&mut tokens)
            .map_err(|why| ApiError::bad_request(format!("unable to parse requirement: {why}")))?;
        requirements.push(requirement);
        match next(&mut tokens) {
            Token::End => return Ok(requirements),
            Token::Sign(",") => {}
            found => {
                let why = format!("found '{}', expected: ',' or 'end of string'", found.text());
                return Err(ApiError::bad_request(why));
            }
        }
    }
}

fn parse_requirement(tokens: &mut Peekable<IntoIter<Token>>) -> Result<Requirement, String> {
    let absent = tokens.next_if(|token| token.is("!")).is_some();
    let key = match tokens.next() {
        Some(Token::Word(key)) => key,
        found => {
            let found = found.unwrap_or(Token::End);
            return Err(format!("found '{}', expected: identifier", found.text()));
        }
    };
    if let Some(error) = metadata::label_key_errors(&key).into_iter().next() {
        return Err(format!("key: {error}"));
    }
    if absent {
        return Ok(Requirement::DoesNotExist(key));
    }
    match tokens.peek() {
        None | Some(Token::Sign(",")) => return Ok(Requirement::Exists(key)),
        _ => {}
    }
    let operator = tokens.next().unwrap_or(Token::End);
    let one = |tokens: &mut Peekable<IntoIter<Token>>| match tokens.peek() {
        None | Some(Token::Sign(",")) => Ok(String::new()),
        Some(Token::Word(_)) => Ok(tokens.next().unwrap_or(Token::End).text().to_owned()),
        Some(found) => Err(format!("found '{}', expected: identifier", found.text())),
    };
    let number = |text: String| {
        text.parse::<i64>().map_err(|_| {
            format!(
                "values[0]: Invalid value: {text:?}: for 'Gt', 'Lt' operators, the value must be an integer"
            )
        })
    };
    let requirement = match operator.text() {
        "in" => Requirement::In(key, set(tokens)?),
        "notin" => Requirement::NotIn(key, set(tokens)?),
        "=" | "==" => Requirement::In(key, vec![one(tokens)?]),
        "!=" => Requirement::NotIn(key, vec![one(tokens)?]),
        ">" => Requirement::GreaterThan(key.clone(), number(one(tokens)?)?),
        "<" => Requirement::LessThan(key.clone(), number(one(tokens)?)?),
        found => {
            return Err(format!("found '{found}', expected: in, notin, =, ==, !=, gt, lt"));
        }
    };
    if let Requirement::In(key, values) | Requirement::NotIn(key, values) = &requirement {
        for (index, value) in values.iter().enumerate() {
            if let Some(error) = metadata::label_value_error(value) {
                return Err(format!("values[{index}][{key}]: {error}"));
            }
        }
    }
    Ok(requirement)
}

/// `(a,b)`.
fn set(tokens: &mut Peekable<IntoIter<Token>>) -> Result<Vec<String>, String> {
    match tokens.next().unwrap_or(Token::End) {
        Token::Sign("(") => {}
        found => return Err(format!("found '{}' expected: '('", found.text())),
    }
    let mut values = vec![String::new()];
    loop {
        match tokens.next().unwrap_or(Token::End) {
            Token::Sign(")") => return Ok(values),
            Token::Sign(",") => values.push(String::new()),
            Token::Word(word) => match values.last_mut() {
                Some(last) if last.is_empty() => *last = word,
                _ => return Err(format!("found '{word}', expected: ',' or ')'")),
            },
            found => return Err(format!("found '{}', expected: ',' or ')'", found.text())),
        }
    }
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
                "invalid selector: '{part}'; can't understand '{part}'"
            )));
        };
        let known = matches!(path, "metadata.name" | "metadata.namespace")
            || resource.selectable.iter().any(|s| s == path);
        if !known {
            let plain = !resource.custom && resource.selectable.is_empty();
            return Err(ApiError::bad_request(if plain {
                format!(
                    "{path:?} is not a known field selector: only \"metadata.name\", \"metadata.namespace\""
                )
            } else {
                format!("field label not supported: {path}")
            }));
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
    }

    #[test]
    fn spaces_do_not_matter_and_signs_may_touch() {
        for yes in [
            "app in(web)",
            " app  in  ( web , db ) ",
            "app = web , tier != back",
            "app,!missing",
            "in notin (x)",
            "missing notin ()",
        ] {
            assert!(matches(yes), "{yes}");
        }
        let numbered = Selector {
            labels: parse_labels("size>3,size<10").unwrap(),
            fields: Vec::new(),
        };
        assert!(numbered.matches(&json!({"metadata": {"labels": {"size": "7"}}})));
        assert!(!numbered.matches(&json!({"metadata": {"labels": {"size": "3"}}})));
        assert!(!numbered.matches(&json!({"metadata": {"labels": {"size": "many"}}})));
        assert!(!numbered.matches(&json!({"metadata": {}})));
    }

    #[test]
    fn a_broken_selector_says_what_was_found_and_expected() {
        for (selector, why) in [
            ("app in web", "found 'web' expected: '('"),
            ("app in (web", "found '', expected: ',' or ')'"),
            ("app web", "found 'web', expected: in, notin, =, ==, !=, gt, lt"),
            ("app=web,", "found '', expected: identifier after ','"),
            (",app", "found ',', expected: !, identifier, or 'end of string'"),
            ("app=web tier", "found 'tier', expected: ',' or 'end of string'"),
            ("!", "found '', expected: identifier"),
            ("app=a/b", "Invalid value"),
            ("-app=a", "Invalid value"),
            ("size>many", "the value must be an integer"),
        ] {
            let error = parse_labels(selector).unwrap_err();
            assert_eq!(error.code.as_u16(), 400);
            assert!(error.message.contains(why), "{selector}: {}", error.message);
        }
    }
}
