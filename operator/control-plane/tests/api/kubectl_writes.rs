//! kubectl writes: apply in both ways, prune, diff, patch, edit, label, annotate, create, replace, delete.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Served, crds, outcome, widget_yaml};

async fn get(served: &Served, name: &str) -> Value {
    let text = served
        .kubectl(&["get", "widget", name, "-o", "json", "--show-managed-fields"])
        .await
        .text();
    serde_json::from_str(&text).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn client_side_apply_diff_and_apply_again() {
    let served = Served::start().await;
    served.write(
        "w.yaml",
        &widget_yaml("w", &json!({"color": "red", "note": "hello"})),
    );
    let text = served.kubectl(&["apply", "-f", "w.yaml"]).await.text();
    assert_eq!(text.trim(), "widget.test.example.com/w created");
    let text = served.kubectl(&["apply", "-f", "w.yaml"]).await.text();
    assert_eq!(text.trim(), "widget.test.example.com/w unchanged");
    let before = get(&served, "w").await;

    served.write("w.yaml", &widget_yaml("w", &json!({"color": "blue"})));
    let diff = served.kubectl(&["diff", "-f", "w.yaml"]).await;
    assert_eq!(diff.code, 1, "{diff:?}");
    assert!(
        diff.stdout.contains("-  color: red") && diff.stdout.contains("+  color: blue"),
        "{diff:?}"
    );
    let dry = served
        .kubectl(&["apply", "-f", "w.yaml", "--dry-run=server"])
        .await
        .text();
    assert_eq!(
        dry.trim(),
        "widget.test.example.com/w configured (server dry run)"
    );
    assert_eq!(get(&served, "w").await, before, "neither diff nor dry run writes");

    let text = served.kubectl(&["apply", "-f", "w.yaml"]).await.text();
    assert_eq!(text.trim(), "widget.test.example.com/w configured");
    let after = get(&served, "w").await;
    assert_eq!(
        after["spec"],
        json!({"color": "blue", "size": 3}),
        "what left the file left the object"
    );
    assert_eq!(after["metadata"]["generation"], 2);
    assert_eq!(served.kubectl(&["diff", "-f", "w.yaml"]).await.code, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn server_side_apply_owns_conflicts_and_forces() {
    let served = Served::start().await;
    let apply = ["apply", "--server-side", "-f", "-"];
    let mine = widget_yaml(
        "w",
        &json!({"color": "red", "parts": [{"name": "a", "count": 1}]}),
    );
    let text = served.kubectl_with(&apply, &mine).await.text();
    assert_eq!(text.trim(), "widget.test.example.com/w serverside-applied");
    let revision = served.control_plane.revision();
    served.kubectl_with(&apply, &mine).await.text();
    assert_eq!(
        served.control_plane.revision(),
        revision,
        "applying the same writes nothing"
    );

    let theirs = widget_yaml(
        "w",
        &json!({"color": "blue", "parts": [{"name": "b", "count": 2}]}),
    );
    let other = [&apply[..], &["--field-manager=other"]].concat();
    let complaint = served.kubectl_with(&other, &theirs).await.complaint();
    assert!(
        complaint.contains(r#"Apply failed with 1 conflict: conflict with "kubectl": .spec.color"#),
        "{complaint}"
    );
    let forced = [&other[..], &["--force-conflicts"]].concat();
    served.kubectl_with(&forced, &theirs).await.text();
    let object = get(&served, "w").await;
    assert_eq!(object["spec"]["color"], "blue");
    assert_eq!(
        object["spec"]["parts"],
        json!([{"name": "a", "count": 1}, {"name": "b", "count": 2}])
    );

    // The other manager gives up its part, which goes, and the colour, which nobody else holds.
    served
        .kubectl_with(&forced, &widget_yaml("w", &json!({"color": "blue"})))
        .await
        .text();
    assert_eq!(
        get(&served, "w").await["spec"]["parts"],
        json!([{"name": "a", "count": 1}])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kubectl_applied_by_itself_it_can_go_on_applying_through_the_server() {
    let served = Served::start().await;
    served.write("w.yaml", &widget_yaml("w", &json!({"color": "red", "note": "x"})));
    served.kubectl(&["apply", "-f", "w.yaml"]).await.text();
    served.write("w.yaml", &widget_yaml("w", &json!({"color": "blue"})));
    served
        .kubectl(&["apply", "--server-side", "-f", "w.yaml"])
        .await
        .text();
    let object = get(&served, "w").await;
    assert_eq!(
        object["spec"],
        json!({"color": "blue", "size": 3}),
        "the note went with its field"
    );
    let entries = object["metadata"]["managedFields"].as_array().unwrap();
    let by_itself = entries
        .iter()
        .any(|entry| entry["manager"] == "kubectl-client-side-apply");
    assert!(!by_itself, "{object:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn apply_prune_deletes_what_left_the_folder() {
    let served = Served::start().await;
    for name in ["stays", "goes"] {
        let mut object: Value = serde_json::from_str(&widget_yaml(name, &json!({"color": "red"}))).unwrap();
        object["metadata"]["labels"] = json!({"set": "one"});
        served.write(&format!("set/{name}.yaml"), &object.to_string());
    }
    served
        .kubectl_with(
            &["apply", "-f", "-"],
            &widget_yaml("other", &json!({"color": "red"})),
        )
        .await
        .text();
    let prune = [
        "apply",
        "-f",
        "set",
        "--prune",
        "-l",
        "set=one",
        "--prune-allowlist=test.example.com/v1/Widget",
    ];
    served.kubectl(&prune).await.text();
    std::fs::remove_file(served.folder.path().join("set/goes.yaml")).unwrap();
    let text = served.kubectl(&prune).await.text();
    assert!(text.contains("widget.test.example.com/goes pruned"), "{text}");
    let left = served.kubectl(&["get", "widgets", "-o", "name"]).await.text();
    assert_eq!(
        left.lines().collect::<Vec<_>>(),
        ["widget.test.example.com/other", "widget.test.example.com/stays"]
    );
    served.kubectl(&["delete", "-f", "set"]).await.text();
    let left = served.kubectl(&["get", "widgets", "-o", "name"]).await.text();
    assert_eq!(left.trim(), "widget.test.example.com/other");
}

#[tokio::test(flavor = "multi_thread")]
async fn patch_label_annotate_and_edit_change_one_object() {
    let served = Served::start().await;
    served
        .kubectl_with(
            &["create", "-f", "-"],
            &widget_yaml("w", &json!({"color": "red"})),
        )
        .await
        .text();
    served
        .kubectl(&[
            "patch",
            "widget",
            "w",
            "--type=merge",
            "-p",
            r#"{"spec":{"note":"hi","size":9}}"#,
        ])
        .await
        .text();
    let operations =
        r#"[{"op":"test","path":"/spec/note","value":"hi"},{"op":"remove","path":"/spec/note"}]"#;
    served
        .kubectl(&["patch", "widget", "w", "--type=json", "-p", operations])
        .await
        .text();
    let complaint = served
        .kubectl(&["patch", "widget", "w", "--type=json", "-p", operations])
        .await
        .complaint();
    assert!(
        complaint.contains("the server rejected our request"),
        "{complaint}"
    );
    served.kubectl(&["label", "widget", "w", "team=one"]).await.text();
    served
        .kubectl(&["annotate", "widget", "w", "why=because"])
        .await
        .text();
    let complaint = served
        .kubectl(&["label", "widget", "w", "team=two"])
        .await
        .complaint();
    assert!(complaint.contains("already has a value"), "{complaint}");
    served.kubectl(&["label", "widget", "w", "team-"]).await.text();

    let editor = served.write(
        "editor",
        "#!/bin/sh\nsed -i 's/color: red/color: green/' \"$1\"\n",
    );
    std::fs::set_permissions(&editor, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = served.command(&["edit", "widget", "w"]);
    command.env("KUBE_EDITOR", &editor);
    let text = outcome(command, "").await.text();
    assert!(text.contains("widget.test.example.com/w edited"), "{text}");
    let object = get(&served, "w").await;
    assert_eq!(object["spec"], json!({"color": "green", "size": 9}));
    assert_eq!(object["metadata"]["annotations"]["why"], "because");
    assert_eq!(object["metadata"].get("labels"), None, "{object:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn create_and_replace_of_built_in_kinds() {
    let served = Served::start().await;
    served.kubectl(&["create", "namespace", "shed"]).await.text();
    served
        .kubectl(&["create", "configmap", "c", "--from-literal=a=1", "-n", "shed"])
        .await
        .text();
    served
        .kubectl(&[
            "create",
            "secret",
            "generic",
            "s",
            "--from-literal=key=hunter2",
            "-n",
            "shed",
        ])
        .await
        .text();
    let table = served
        .kubectl(&["get", "secret,cm", "-n", "shed", "--no-headers"])
        .await
        .text();
    let rows: Vec<Vec<&str>> = table
        .lines()
        .map(|l| l.split_whitespace().take(3).collect())
        .collect();
    assert!(
        rows.contains(&vec!["secret/s", "Opaque", "1"])
            && rows.iter().any(|row| row[..2] == ["configmap/c", "1"]),
        "{table}"
    );
    let yaml =
        r#"{"apiVersion":"v1","kind":"Secret","metadata":{"name":"t"},"stringData":{"key":"hunter2"}}"#;
    served.kubectl_with(&["apply", "-f", "-"], yaml).await.text();
    let text = served
        .kubectl(&[
            "get",
            "secret",
            "t",
            "-o",
            "jsonpath={.data.key} {.stringData} {.type}",
        ])
        .await
        .text();
    assert_eq!(text, "aHVudGVyMg==  Opaque");

    let yaml = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"c","namespace":"shed"},"data":{"b":"2"}}"#;
    let complaint = served
        .kubectl_with(&["create", "-f", "-"], yaml)
        .await
        .complaint();
    assert!(
        complaint.contains(r#"configmaps "c" already exists"#),
        "{complaint}"
    );
    served.kubectl_with(&["replace", "-f", "-"], yaml).await.text();
    let text = served
        .kubectl(&["get", "cm", "c", "-n", "shed", "-o", "jsonpath={.data}"])
        .await
        .text();
    assert_eq!(text, r#"{"b":"2"}"#);

    let complaint = served
        .kubectl(&["delete", "namespace", "default"])
        .await
        .complaint();
    assert!(
        complaint.contains(r#"namespaces "default" is forbidden: this namespace may not be deleted"#),
        "{complaint}"
    );
    served.kubectl(&["delete", "namespace", "shed"]).await.text();
    let complaint = served
        .kubectl(&["get", "cm", "c", "-n", "shed"])
        .await
        .complaint();
    assert!(complaint.contains("not found"), "{complaint}");
}

#[tokio::test(flavor = "multi_thread")]
async fn delete_keeps_to_what_it_was_asked() {
    let served = Served::start().await;
    for name in ["a", "b", "c"] {
        served
            .kubectl_with(
                &["create", "-f", "-"],
                &widget_yaml(name, &json!({"color": "red"})),
            )
            .await
            .text();
    }
    served
        .kubectl(&["label", "widget", "a", "b", "team=one"])
        .await
        .text();
    served
        .kubectl(&["delete", "widget", "a", "--dry-run=server"])
        .await
        .text();
    served
        .kubectl(&["delete", "widgets", "--all", "--dry-run=server"])
        .await
        .text();
    served.kubectl(&["get", "widget", "a", "b", "c"]).await.text();
    served
        .kubectl(&["delete", "widgets", "-l", "team=one"])
        .await
        .text();
    let left = served.kubectl(&["get", "widgets", "-o", "name"]).await.text();
    assert_eq!(left.trim(), "widget.test.example.com/c");

    served
        .kubectl(&[
            "patch",
            "widget",
            "c",
            "--type=merge",
            "-p",
            r#"{"metadata":{"finalizers":["example.com/hold"]}}"#,
        ])
        .await
        .text();
    served
        .kubectl(&["delete", "widget", "c", "--wait=false"])
        .await
        .text();
    assert!(get(&served, "c").await["metadata"]["deletionTimestamp"].is_string());
    let waits = served.command(&["delete", "widget", "c"]).spawn().unwrap();
    served
        .kubectl(&[
            "patch",
            "widget",
            "c",
            "--type=merge",
            "-p",
            r#"{"metadata":{"finalizers":null}}"#,
        ])
        .await
        .text();
    let output = waits.wait_with_output().await.unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() || told.contains("not found"),
        "{output:?}"
    );
    served.kubectl(&["get", "widget", "c"]).await.complaint();
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_fields_and_wrong_values_are_refused_by_name() {
    let served = Served::start().await;
    let same = |text: &'static str| (text, text);
    // What create and apply are told, and what an apply through the server is told.
    let cases = [
        (
            json!({"color": "red", "colour": "red"}),
            (
                r#"strict decoding error: unknown field "spec.colour""#,
                ".spec.colour: field not declared in schema",
            ),
        ),
        (
            json!({"color": "red", "parts": [{"name": "a", "cuont": 1}]}),
            (
                r#"unknown field "spec.parts[0].cuont""#,
                "cuont: field not declared in schema",
            ),
        ),
        (
            json!({"color": "red", "size": "big"}),
            (
                r#"spec.size: Invalid value: "string": spec.size in body must be of type integer: "string""#,
                ".spec.size",
            ),
        ),
        (
            json!({"color": "red", "parts": [{"name": "a"}, {"name": "a"}]}),
            (
                r#"spec.parts[1]: Duplicate value: {"name":"a"}"#,
                ".spec.parts: duplicate entries for key",
            ),
        ),
        (
            json!({"color": "pink"}),
            same(r#"spec.color: Unsupported value: "pink": supported values: "red", "green", "blue""#),
        ),
        (json!({"size": 3}), same("spec.color: Required value")),
        (
            json!({"color": "red", "size": 1000}),
            same("should be less than or equal to 100"),
        ),
        (
            json!({"color": "red", "size": 60, "note": "x"}),
            same("a large widget takes no note"),
        ),
    ];
    for way in [
        &["apply", "-f", "-"][..],
        &["apply", "--server-side", "-f", "-"],
        &["create", "-f", "-"],
    ] {
        for (spec, (told, told_by_server)) in &cases {
            let expected = if way.contains(&"--server-side") {
                told_by_server
            } else {
                told
            };
            let complaint = served
                .kubectl_with(way, &widget_yaml("w", spec))
                .await
                .complaint();
            assert!(
                complaint.contains(expected),
                "{way:?}: no {expected:?} in {complaint}"
            );
        }
    }
    served.kubectl(&["get", "widget", "w"]).await.complaint();
    let yaml = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"c"},"dataa":{"b":"2"}}"#;
    let complaint = served.kubectl_with(&["apply", "-f", "-"], yaml).await.complaint();
    assert!(
        complaint.contains(r#"strict decoding error: unknown field "dataa""#),
        "{complaint}"
    );
    let warned = served
        .kubectl_with(
            &["apply", "--validate=warn", "-f", "-"],
            &widget_yaml("w", &json!({"color": "red", "colour": 1})),
        )
        .await;
    assert!(
        warned.code == 0 && warned.stderr.contains("Warning: unknown field"),
        "{warned:?}"
    );
    served
        .kubectl(&[
            "patch",
            "widget",
            "w",
            "--type=merge",
            "-p",
            r#"{"spec":{"fixed":"a"}}"#,
        ])
        .await
        .text();
    let complaint = served
        .kubectl(&[
            "patch",
            "widget",
            "w",
            "--type=merge",
            "-p",
            r#"{"spec":{"fixed":"b"}}"#,
        ])
        .await
        .complaint();
    assert!(complaint.contains("fixed cannot change"), "{complaint}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_of_this_repository_apply_strictly() {
    let mut kinds = freehold_crds::all();
    kinds.extend(crds());
    let served = Served::with(kinds).await;
    let examples = Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../manifests/examples");
    let examples = examples.canonicalize().unwrap();
    let examples = examples.to_str().unwrap();
    served
        .kubectl(&["apply", "--validate=strict", "-R", "-f", examples])
        .await
        .text();
    served
        .kubectl(&["apply", "--server-side", "-R", "-f", examples])
        .await
        .text();
    let table = served.kubectl(&["get", "freehold"]).await.text();
    assert!(table.contains("modeldeployment.freehold.dev/"), "{table}");
}
