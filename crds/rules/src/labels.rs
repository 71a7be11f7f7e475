//! Label selectors of the Kubernetes kind.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

/// By this label, `true`, people cordon a machine that is no Node of the cluster.
const UNSCHEDULABLE: &str = "freehold.dev/unschedulable";

/// Whether a machine's labels cordon it.
#[must_use]
pub fn cordon(labels: &BTreeMap<String, String>) -> bool {
    labels.get(UNSCHEDULABLE).is_some_and(|value| value == "true")
}

/// Whether the labels fit. An empty selector fits everything; an operator that is not known fits nothing.
#[must_use]
pub fn matches(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let exact = selector.match_labels.iter().flatten();
    let expressions = selector.match_expressions.iter().flatten();
    exact
        .into_iter()
        .all(|(key, value)| labels.get(key) == Some(value))
        && expressions.into_iter().all(|requirement| {
            let found = labels.get(&requirement.key);
            let listed = |value: &String| requirement.values.iter().flatten().any(|wanted| wanted == value);
            match requirement.operator.as_str() {
                "In" => found.is_some_and(listed),
                "NotIn" => !found.is_some_and(listed),
                "Exists" => found.is_some(),
                "DoesNotExist" => found.is_none(),
                _ => false,
            }
        })
}

/// Whether every operator of the selector is one that there is.
#[must_use]
pub fn is_sound(selector: &LabelSelector) -> bool {
    let operators = selector
        .match_expressions
        .iter()
        .flatten()
        .map(|requirement| requirement.operator.as_str());
    operators
        .into_iter()
        .all(|operator| matches!(operator, "In" | "NotIn" | "Exists" | "DoesNotExist"))
}

/// A selector for the eye: `pool=gpu,zone in (a,b)`.
#[must_use]
pub fn describe(selector: &LabelSelector) -> String {
    let exact = selector
        .match_labels
        .iter()
        .flatten()
        .map(|(key, value)| format!("{key}={value}"));
    let expressions = selector.match_expressions.iter().flatten().map(|requirement| {
        let values = requirement.values.clone().unwrap_or_default().join(",");
        match requirement.operator.as_str() {
            "In" => format!("{} in ({values})", requirement.key),
            "NotIn" => format!("{} notin ({values})", requirement.key),
            "Exists" => requirement.key.clone(),
            _ => format!("!{}", requirement.key),
        }
    });
    exact.chain(expressions).collect::<Vec<_>>().join(",")
}
