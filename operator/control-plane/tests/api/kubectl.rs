//! kubectl reads: get in every form, watch, describe, explain, wait, events, who am I.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::{DEADLINE, Served, widget_yaml};

async fn with_widgets() -> Served {
    let served = Served::start().await;
    for (name, color, team) in [
        ("anna", "red", "one"),
        ("bert", "blue", "one"),
        ("carl", "red", "two"),
    ] {
        let yaml = widget_yaml(name, &json!({"color": color}));
        served.kubectl_with(&["create", "-f", "-"], &yaml).await.text();
        let label = format!("team={team}");
        served.kubectl(&["label", "widget", name, &label]).await.text();
    }
    served
}

/// Names in the order in which they are printed.
async fn names(served: &Served, arguments: &[&str]) -> Vec<String> {
    let text = served
        .kubectl(&[&["get", "-o", "name"], arguments].concat())
        .await
        .text();
    let names = text
        .lines()
        .map(|line| line.rsplit('/').next().unwrap_or_default().to_owned());
    names.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn get_prints_tables_documents_and_paths() {
    let served = with_widgets().await;
    let table = served.kubectl(&["get", "widgets"]).await.text();
    let header: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(header, ["NAME", "COLOR", "READY", "AGE"], "{table}");
    assert_eq!(table.lines().count(), 4, "{table}");
    let wide = served.kubectl(&["get", "wd", "anna", "-o", "wide"]).await.text();
    let rows: Vec<Vec<&str>> = wide
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(rows[0], ["NAME", "COLOR", "READY", "SIZE", "AGE"], "{wide}");
    assert_eq!(rows[1][..3], ["anna", "red", "3"], "{wide}");

    let yaml = served.kubectl(&["get", "widget/anna", "-o", "yaml"]).await.text();
    let object: Value = serde_yaml::from_str(&yaml).unwrap();
    assert_eq!(object["spec"], json!({"color": "red", "size": 3}));
    let text = served.kubectl(&["get", "widgets", "-o", "json"]).await.text();
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list["items"].as_array().map(Vec::len), Some(3));
    let path = "jsonpath={range .items[*]}{.metadata.name}={.spec.color} {end}";
    let text = served.kubectl(&["get", "widgets", "-o", path]).await.text();
    assert_eq!(text.trim(), "anna=red bert=blue carl=red");

    let things = served.kubectl(&["get", "things"]).await.text();
    assert_eq!(things.lines().count(), 4, "{things}");
    let complaint = served.kubectl(&["get", "widget", "nobody"]).await.complaint();
    assert!(
        complaint.contains(r#"Error from server (NotFound): widgets.test.example.com "nobody" not found"#),
        "{complaint}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn get_narrows_by_label_and_by_selectable_field() {
    let served = with_widgets().await;
    assert_eq!(
        names(&served, &["widgets", "-l", "team=one"]).await,
        ["anna", "bert"]
    );
    assert_eq!(
        names(&served, &["widgets", "-l", "team in (one,two),team!=one"]).await,
        ["carl"]
    );
    assert_eq!(
        names(&served, &["widgets", "--field-selector", "spec.color=red"]).await,
        ["anna", "carl"]
    );
    assert_eq!(
        names(
            &served,
            &[
                "widgets",
                "-A",
                "--field-selector",
                "spec.color!=red,metadata.namespace=default"
            ]
        )
        .await,
        ["bert"]
    );
    assert_eq!(
        names(&served, &["widgets", "--chunk-size=1", "--sort-by=.spec.color"]).await,
        ["bert", "anna", "carl"]
    );
    let complaint = served
        .kubectl(&["get", "widgets", "--field-selector", "spec.size=3"])
        .await
        .complaint();
    assert!(
        complaint.contains("field label not supported: spec.size"),
        "{complaint}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn get_w_prints_each_change_as_it_comes() {
    let served = with_widgets().await;
    let mut command = served.command(&["get", "widgets", "-w", "-l", "team=one", "--output-watch-events"]);
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = async || {
        let line = tokio::time::timeout(DEADLINE, lines.next_line())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        line.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(next().await, "EVENT NAME COLOR");
    assert_eq!(next().await, "ADDED anna red");
    assert_eq!(next().await, "ADDED bert blue");
    served
        .kubectl(&[
            "patch",
            "wd",
            "anna",
            "--type=merge",
            "-p",
            r#"{"spec":{"color":"green"}}"#,
        ])
        .await
        .text();
    assert_eq!(next().await, "MODIFIED anna green");
    // Leaving the selection is a deletion for this watch, coming into it an addition.
    served
        .kubectl(&["label", "wd", "bert", "team=two", "--overwrite"])
        .await
        .text();
    assert_eq!(next().await, "DELETED bert blue");
    served
        .kubectl(&["label", "wd", "carl", "team=one", "--overwrite"])
        .await
        .text();
    assert_eq!(next().await, "ADDED carl red");
    served.kubectl(&["delete", "wd", "anna"]).await.text();
    assert_eq!(next().await, "DELETED anna green");
    child.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn describe_shows_the_object_and_its_events() {
    let served = with_widgets().await;
    let uid = served
        .kubectl(&["get", "wd", "anna", "-o", "jsonpath={.metadata.uid}"])
        .await
        .text();
    let involved = json!({"apiVersion": "test.example.com/v1", "kind": "Widget", "name": "anna", "namespace": "default", "uid": uid});
    let now = "2026-01-01T00:00:00Z";
    let event = json!({
        "apiVersion": "v1", "kind": "Event", "metadata": {"name": "anna.1", "namespace": "default"},
        "involvedObject": involved, "type": "Normal", "reason": "Painted", "message": "painted it red",
        "firstTimestamp": now, "lastTimestamp": now, "count": 1, "source": {"component": "painter"},
    });
    served
        .kubectl_with(&["create", "-f", "-"], &event.to_string())
        .await
        .text();
    let text = served.kubectl(&["describe", "widget", "anna"]).await.text();
    for expected in [
        "Name:         anna",
        "Labels:       team=one",
        "Color:  red",
        "Painted",
        "painted it red",
    ] {
        assert!(text.contains(expected), "no {expected:?} in:\n{text}");
    }
    let table = served.kubectl(&["get", "events"]).await.text();
    let header: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(
        header,
        ["LAST", "SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"],
        "{table}"
    );
    assert!(table.contains("widget/anna"), "{table}");
    let text = served.kubectl(&["events", "--for", "widget/anna"]).await.text();
    assert!(text.contains("Painted"), "{text}");
    let text = served
        .kubectl(&["get", "events.events.k8s.io", "anna.1", "-o", "jsonpath={.note}"])
        .await
        .text();
    assert_eq!(text, "painted it red");
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_tells_every_field() {
    let served = Served::start().await;
    let text = served.kubectl(&["explain", "widget", "--recursive"]).await.text();
    for expected in [
        "KIND:       Widget",
        "A Widget is what the tests make.",
        "-required-",
        "parts\t<[]Object>",
        "conditions\t<[]Object>",
        "metadata\t<ObjectMeta>",
    ] {
        assert!(text.contains(expected), "no {expected:?} in:\n{text}");
    }
    let text = served.kubectl(&["explain", "widget.spec.color"]).await.text();
    assert!(
        text.contains("What the eye sees.") && text.contains("ENUM:\n    red\n    green\n    blue\n"),
        "{text}"
    );
    let text = served.kubectl(&["explain", "secret", "--recursive"]).await.text();
    assert!(text.contains("stringData\t<map[string]string>"), "{text}");
    let text = served
        .kubectl(&["explain", "lease.spec.holderIdentity"])
        .await
        .text();
    assert!(text.contains("<string>"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wait_returns_when_the_condition_holds() {
    let served = with_widgets().await;
    let mut waiting = Vec::new();
    for arguments in [
        ["wait", "--for=condition=Ready", "widget/anna", "--timeout=30s"],
        [
            "wait",
            "--for=jsonpath={.status.phase}=Done",
            "widget/anna",
            "--timeout=30s",
        ],
    ] {
        waiting.push(served.command(&arguments).spawn().unwrap());
    }
    let gone = served
        .command(&["wait", "--for=delete", "widget/bert", "--timeout=30s"])
        .spawn()
        .unwrap();
    let early = served
        .kubectl(&["wait", "--for=condition=Ready", "widget/carl", "--timeout=200ms"])
        .await
        .complaint();
    assert!(
        early.contains("timed out waiting for the condition on widgets/carl"),
        "{early}"
    );
    let status =
        json!({"status": {"phase": "Done", "conditions": [{"type": "Ready", "status": "True"}]}}).to_string();
    served
        .kubectl(&[
            "patch",
            "wd",
            "anna",
            "--subresource=status",
            "--type=merge",
            "-p",
            &status,
        ])
        .await
        .text();
    served.kubectl(&["delete", "wd", "bert"]).await.text();
    for child in waiting.into_iter().chain([gone]) {
        let output = tokio::time::timeout(DEADLINE, child.wait_with_output())
            .await
            .unwrap()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    let table = served.kubectl(&["get", "wd", "anna"]).await.text();
    assert!(table.contains("True"), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_says_what_it_serves_and_who_asks() {
    let served = Served::start().await;
    let text = served.kubectl(&["api-resources", "--no-headers"]).await.text();
    let line = text.lines().find(|line| line.starts_with("widgets")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words, ["widgets", "wd", "test.example.com/v1", "true", "Widget"]);
    let text = served
        .kubectl(&["api-resources", "--categories=things", "-o", "name"])
        .await
        .text();
    assert_eq!(text.trim(), "widgets.test.example.com");
    let text = served
        .kubectl(&["auth", "whoami", "-o", "jsonpath={.status.userInfo.username}"])
        .await
        .text();
    assert_eq!(text, "freehold:owner");
    let text = served
        .kubectl(&["auth", "can-i", "delete", "widgets"])
        .await
        .text();
    assert_eq!(text.trim(), "yes");
    let text = served.kubectl(&["get", "crd", "-o", "name"]).await.text();
    assert!(text.contains("widgets.test.example.com"), "{text}");
    served
        .kubectl(&[
            "wait",
            "--for=condition=Established",
            "crd/widgets.test.example.com",
            "--timeout=5s",
        ])
        .await
        .text();
    let text = served.kubectl(&["get", "--raw", "/readyz"]).await.text();
    assert_eq!(text, "ok");
    let complaint = served
        .kubectl(&["delete", "crd", "widgets.test.example.com"])
        .await
        .complaint();
    assert!(complaint.contains("MethodNotAllowed"), "{complaint}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_is_refused() {
    let served = Served::start().await;
    let complaint = served
        .kubectl(&["get", "widgets", "--token=wrong"])
        .await
        .complaint();
    assert!(
        complaint.contains("You must be logged in to the server"),
        "{complaint}"
    );
    let bounded = tokio::time::timeout(Duration::from_secs(5), served.server.shutdown()).await;
    assert!(bounded.is_ok(), "an idle server stops at once");
}
