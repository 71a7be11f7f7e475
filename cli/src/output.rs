//! What people see: tables as kubectl prints them.

use anyhow::Result;
use kube::Client;
use serde_json::Value;

/// Asks the API for a table of `path` and gives it as lines, header first.
///
/// # Errors
/// What the API answers.
pub async fn table(client: &Client, path: &str, wide: bool, with_namespace: bool) -> Result<Vec<String>> {
    let request = http::Request::get(path)
        .header(
            http::header::ACCEPT,
            "application/json;as=Table;v=v1;g=meta.k8s.io,application/json",
        )
        .body(Vec::new())?;
    let table: Value = client.request(request).await?;
    Ok(lines(&table, wide, with_namespace))
}

/// A `meta.k8s.io/v1` Table as lines; none when it has no rows.
#[must_use]
pub fn lines(table: &Value, wide: bool, with_namespace: bool) -> Vec<String> {
    let list = |key: &str| {
        table
            .get(key)
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default()
    };
    let columns = list("columnDefinitions");
    let shown: Vec<usize> = (0..columns.len())
        .filter(|&at| wide || columns[at]["priority"].as_i64().unwrap_or(0) == 0)
        .collect();
    let mut rows: Vec<Vec<String>> = Vec::new();
    for row in list("rows") {
        let cells = row
            .get("cells")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        let mut line: Vec<String> = shown.iter().map(|&at| cell(cells.get(at))).collect();
        if with_namespace {
            line.insert(0, cell(row.pointer("/object/metadata/namespace")));
        }
        rows.push(line);
    }
    if rows.is_empty() {
        return Vec::new();
    }
    let mut header: Vec<String> = shown
        .iter()
        .map(|&at| columns[at]["name"].as_str().unwrap_or_default().to_uppercase())
        .collect();
    if with_namespace {
        header.insert(0, "NAMESPACE".to_owned());
    }
    rows.insert(0, header);
    align(&rows)
}

fn cell(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// Columns side by side, three spaces between them.
#[must_use]
pub fn align(rows: &[Vec<String>]) -> Vec<String> {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count)
        .map(|at| {
            rows.iter()
                .filter_map(|row| row.get(at))
                .map(|c| c.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let line = |row: &Vec<String>| {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("   ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// Bytes for the eye.
#[must_use]
pub fn bytes(count: u64) -> String {
    freehold_rules::plan::memory::mib(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tables_look_as_kubectl_prints_them() {
        let table = json!({
            "columnDefinitions": [{"name": "Name", "priority": 0}, {"name": "Ready", "priority": 0}, {"name": "Message", "priority": 1}],
            "rows": [{"cells": ["smollm2", "True", "all is well"]}, {"cells": ["x", null, ""]}],
        });
        assert_eq!(
            lines(&table, false, false),
            ["NAME      READY", "smollm2   True", "x"]
        );
        assert_eq!(lines(&table, true, false)[1], "smollm2   True    all is well");
        assert!(lines(&json!({"rows": []}), false, false).is_empty());
    }
}
