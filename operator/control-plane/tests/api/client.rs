//! `kube::Client` in this process: what each verb does to an object.

use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Secret};
use kube::api::{
    Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions,
    PropagationPolicy,
};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

use crate::support::{in_memory, refusal, widget, widget_resource, widgets};

fn create() -> PostParams {
    PostParams::default()
}

#[tokio::test]
async fn an_object_lives_from_create_to_delete() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    let made = api
        .create(&create(), &widget("w", &json!({"color": "red"})))
        .await
        .unwrap();
    assert_eq!(
        made.data["spec"],
        json!({"color": "red", "size": 3}),
        "defaults are filled in"
    );
    let meta = made.meta();
    assert!(meta.uid.is_some() && meta.creation_timestamp.is_some() && meta.resource_version.is_some());
    assert_eq!(meta.generation, Some(1));
    assert_eq!(
        refusal(api.create(&create(), &made).await).reason,
        "AlreadyExists"
    );

    let mut changed = api.get("w").await.unwrap();
    changed.data["spec"]["color"] = json!("blue");
    let changed = api.replace("w", &create(), &changed).await.unwrap();
    assert_eq!(
        (changed.meta().generation, &changed.data["spec"]["color"]),
        (Some(2), &json!("blue"))
    );
    assert_eq!(
        (changed.uid(), changed.creation_timestamp()),
        (made.uid(), made.creation_timestamp())
    );
    assert_eq!(api.list(&ListParams::default()).await.unwrap().items.len(), 1);

    api.delete("w", &DeleteParams::default()).await.unwrap();
    assert_eq!(api.get_opt("w").await.unwrap(), None);
    assert_eq!(refusal(api.delete("w", &DeleteParams::default()).await).code, 404);
}

#[tokio::test]
async fn the_second_of_two_writers_conflicts() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    let read = api
        .create(&create(), &widget("w", &json!({"color": "red"})))
        .await
        .unwrap();
    let (mut first, mut second) = (read.clone(), read);
    first.data["spec"]["color"] = json!("blue");
    second.data["spec"]["color"] = json!("green");
    api.replace("w", &create(), &first).await.unwrap();
    let refused = refusal(api.replace("w", &create(), &second).await);
    assert_eq!((refused.code, refused.reason.as_str()), (409, "Conflict"));
    assert_eq!(
        refused.message,
        r#"Operation cannot be fulfilled on widgets.test.example.com "w": the object has been modified; please apply your changes to the latest version and try again"#
    );
    second.metadata.resource_version = None;
    let refused = refusal(api.replace("w", &create(), &second).await);
    assert!(
        refused
            .message
            .contains("metadata.resourceVersion: Invalid value: 0: must be specified for an update"),
        "{}",
        refused.message
    );
    assert_eq!(api.get("w").await.unwrap().data["spec"]["color"], "blue");
}

/// Of many writers that read, add one and write back, none loses an addition.
#[tokio::test(flavor = "multi_thread")]
async fn concurrent_writers_lose_nothing() {
    let control_plane = in_memory();
    let client = control_plane.client();
    let api: Api<ConfigMap> = Api::default_namespaced(client);
    let counter = json!({"metadata": {"name": "counter"}, "data": {"n": "0"}});
    api.create(&create(), &serde_json::from_value(counter).unwrap())
        .await
        .unwrap();
    let writers = (0..8).map(|_| {
        let api = api.clone();
        tokio::spawn(async move {
            let mut written = 0;
            while written < 10 {
                let mut map = api.get("counter").await.unwrap();
                let data = map.data.as_mut().unwrap();
                let n: u32 = data["n"].parse().unwrap();
                data.insert("n".to_owned(), (n + 1).to_string());
                match api.replace("counter", &create(), &map).await {
                    Ok(_) => written += 1,
                    Err(kube::Error::Api(status)) if status.code == 409 => {}
                    Err(error) => panic!("{error}"),
                }
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    assert_eq!(api.get("counter").await.unwrap().data.unwrap()["n"], "80");
}

#[tokio::test]
async fn each_door_writes_its_half_of_the_object() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    let mut new = widget("w", &json!({"color": "red"}));
    new.data["status"] = json!({"phase": "Invented"});
    let made = api.create(&create(), &new).await.unwrap();
    assert_eq!(made.data.get("status"), None, "a creation sets no status");

    let both = Patch::Merge(json!({"spec": {"color": "blue"}, "status": {"phase": "Done"}}));
    let patched = api
        .patch_status("w", &PatchParams::default(), &both)
        .await
        .unwrap();
    assert_eq!(
        (&patched.data["spec"]["color"], &patched.data["status"]["phase"]),
        (&json!("red"), &json!("Done"))
    );
    assert_eq!(
        patched.meta().generation,
        Some(1),
        "news of the status is no new generation"
    );

    let both = Patch::Merge(json!({"spec": {"color": "green"}, "status": {"phase": "Undone"}}));
    let patched = api.patch("w", &PatchParams::default(), &both).await.unwrap();
    assert_eq!(
        (&patched.data["spec"]["color"], &patched.data["status"]["phase"]),
        (&json!("green"), &json!("Done"))
    );
    assert_eq!(patched.meta().generation, Some(2));

    let applied = json!({"apiVersion": "test.example.com/v1", "kind": "Widget", "metadata": {"name": "w"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    let manager = PatchParams::apply("agent");
    let status = api
        .patch_status("w", &manager, &Patch::Apply(&applied))
        .await
        .unwrap();
    assert_eq!(
        status.data["status"],
        json!({"phase": "Done", "conditions": [{"type": "Ready", "status": "True"}]})
    );
    let again = api
        .patch_status("w", &manager, &Patch::Apply(&applied))
        .await
        .unwrap();
    assert_eq!(
        again.resource_version(),
        status.resource_version(),
        "the same status again writes nothing"
    );
}

#[tokio::test]
async fn labels_are_no_new_generation_and_a_write_without_change_is_none() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    let made = api
        .create(&create(), &widget("w", &json!({"color": "red"})))
        .await
        .unwrap();
    let label = Patch::Merge(json!({"metadata": {"labels": {"a": "b"}}}));
    let labelled = api.patch("w", &PatchParams::default(), &label).await.unwrap();
    assert_eq!(labelled.meta().generation, Some(1));
    assert_ne!(labelled.resource_version(), made.resource_version());
    let again = api.patch("w", &PatchParams::default(), &label).await.unwrap();
    assert_eq!(again, labelled);
    let replaced = api.replace("w", &create(), &again).await.unwrap();
    assert_eq!(replaced, labelled);
}

#[tokio::test]
async fn a_dry_run_answers_as_if_and_writes_nothing() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    let before = control_plane.revision();
    let dry = PostParams {
        dry_run: true,
        ..create()
    };
    let made = api
        .create(&dry, &widget("w", &json!({"color": "red"})))
        .await
        .unwrap();
    assert_eq!(made.data["spec"]["size"], 3);
    assert_eq!(api.get_opt("w").await.unwrap(), None);
    assert_eq!(control_plane.revision(), before);
    api.create(&create(), &widget("w", &json!({"color": "red"})))
        .await
        .unwrap();
    let after = control_plane.revision();
    let patch = Patch::Merge(json!({"spec": {"color": "blue"}}));
    let patched = api
        .patch("w", &PatchParams::default().dry_run(), &patch)
        .await
        .unwrap();
    assert_eq!(patched.data["spec"]["color"], "blue");
    let delete = DeleteParams::default().dry_run();
    api.delete("w", &delete).await.unwrap();
    api.delete_collection(&delete, &ListParams::default())
        .await
        .unwrap();
    assert_eq!(api.get("w").await.unwrap().data["spec"]["color"], "red");
    assert_eq!(control_plane.revision(), after);
}

#[tokio::test]
async fn finalizers_hold_an_object_until_the_last_is_taken_away() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    let mut held = widget("w", &json!({"color": "red"}));
    held.metadata.finalizers = Some(vec!["example.com/a".into(), "example.com/b".into()]);
    api.create(&create(), &held).await.unwrap();
    let deleted = api.delete("w", &DeleteParams::default()).await.unwrap();
    let going = deleted.left().unwrap();
    assert!(going.meta().deletion_timestamp.is_some());
    let set = |finalizers: Value| Patch::Merge(json!({"metadata": {"finalizers": finalizers}}));
    let refused = refusal(
        api.patch(
            "w",
            &PatchParams::default(),
            &set(json!(["example.com/a", "example.com/c"])),
        )
        .await,
    );
    assert!(
        refused
            .message
            .contains("no new finalizers can be added if the object is being deleted"),
        "{}",
        refused.message
    );
    api.patch("w", &PatchParams::default(), &set(json!(["example.com/b"])))
        .await
        .unwrap();
    assert!(api.get_opt("w").await.unwrap().is_some());
    api.patch("w", &PatchParams::default(), &set(json!([])))
        .await
        .unwrap();
    assert_eq!(api.get_opt("w").await.unwrap(), None);
}

#[tokio::test]
async fn what_an_object_owns_goes_with_it_unless_orphaned_or_owned_by_another_too() {
    let control_plane = in_memory();
    let client = control_plane.client();
    let api = widgets(&client);
    let maps: Api<ConfigMap> = Api::default_namespaced(client);
    let mut references = Vec::new();
    for name in ["one", "two"] {
        let owner = api
            .create(&create(), &widget(name, &json!({"color": "red"})))
            .await
            .unwrap();
        references.push(owner.owner_ref(&widget_resource()).unwrap());
    }
    for (name, owners) in [
        ("of-one", &references[..1]),
        ("of-both", &references[..]),
        ("of-two", &references[1..]),
        ("free", &[]),
    ] {
        let metadata = json!({"name": name, "ownerReferences": owners});
        let map = serde_json::from_value(json!({"metadata": metadata})).unwrap();
        maps.create(&create(), &map).await.unwrap();
    }
    let names = async || -> Vec<String> {
        let list = maps.list(&ListParams::default()).await.unwrap();
        list.items.iter().map(ResourceExt::name_any).collect()
    };
    api.delete("one", &DeleteParams::default()).await.unwrap();
    assert_eq!(names().await, ["free", "of-both", "of-two"]);
    let orphan = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Orphan),
        ..DeleteParams::default()
    };
    api.delete("two", &orphan).await.unwrap();
    assert_eq!(names().await, ["free", "of-both", "of-two"]);
}

#[tokio::test]
async fn deletion_keeps_to_its_preconditions() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    let made = api
        .create(&create(), &widget("w", &json!({"color": "red"})))
        .await
        .unwrap();
    let only = |uid: Option<String>, resource_version: Option<String>| DeleteParams {
        preconditions: Some(Preconditions {
            uid,
            resource_version,
        }),
        ..DeleteParams::default()
    };
    assert_eq!(
        refusal(api.delete("w", &only(Some("another".into()), None)).await).code,
        409
    );
    assert_eq!(
        refusal(api.delete("w", &only(None, Some("1".into()))).await).code,
        409
    );
    api.delete("w", &only(made.uid(), made.resource_version()))
        .await
        .unwrap();
}

#[tokio::test]
async fn pages_show_one_moment_however_long_they_are_read() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    for n in 0..10 {
        api.create(&create(), &widget(&format!("w{n}"), &json!({"color": "red"})))
            .await
            .unwrap();
    }
    let first = api.list(&ListParams::default().limit(4)).await.unwrap();
    assert_eq!(
        (first.items.len(), first.metadata.remaining_item_count),
        (4, Some(6))
    );
    // What happens between two pages is not seen in the second.
    api.delete("w9", &DeleteParams::default()).await.unwrap();
    api.create(&create(), &widget("w55", &json!({"color": "red"})))
        .await
        .unwrap();
    let blue = Patch::Merge(json!({"spec": {"color": "blue"}}));
    api.patch("w8", &PatchParams::default(), &blue).await.unwrap();
    let token = first.metadata.continue_.clone().unwrap();
    let rest = api
        .list(&ListParams::default().continue_token(&token))
        .await
        .unwrap();
    let names: Vec<String> = rest.items.iter().map(ResourceExt::name_any).collect();
    assert_eq!(names, ["w4", "w5", "w6", "w7", "w8", "w9"]);
    assert!(rest.items.iter().all(|item| item.data["spec"]["color"] == "red"));
    assert_eq!(rest.metadata.resource_version, first.metadata.resource_version);
    assert!(rest.metadata.continue_.is_none_or(|token| token.is_empty()));

    // Long after, the moment is forgotten, and the client is told to begin anew.
    for n in 0..1100 {
        let patch = Patch::Merge(json!({"spec": {"size": n % 50 + 1}}));
        api.patch("w0", &PatchParams::default(), &patch).await.unwrap();
    }
    let refused = refusal(api.list(&ListParams::default().continue_token(&token)).await);
    assert_eq!((refused.code, refused.reason.as_str()), (410, "Expired"));
    assert_eq!(
        refusal(api.list(&ListParams::default().continue_token("nonsense")).await).code,
        400
    );
}

#[tokio::test]
async fn a_namespace_goes_with_all_that_is_in_it() {
    let control_plane = in_memory();
    let client = control_plane.client();
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let shed: Namespace = serde_json::from_value(json!({"metadata": {"name": "shed"}})).unwrap();
    let made = namespaces.create(&create(), &shed).await.unwrap();
    assert_eq!(
        made.status.and_then(|status| status.phase).as_deref(),
        Some("Active")
    );
    let inside: Api<DynamicObject> = Api::namespaced_with(client.clone(), "shed", &widget_resource());
    let mut held = widget("held", &json!({"color": "red"}));
    held.metadata.finalizers = Some(vec!["example.com/a".into()]);
    inside.create(&create(), &held).await.unwrap();
    inside
        .create(&create(), &widget("free", &json!({"color": "red"})))
        .await
        .unwrap();
    let nowhere: Api<DynamicObject> = Api::namespaced_with(client, "nowhere", &widget_resource());
    let refused = refusal(
        nowhere
            .create(&create(), &widget("w", &json!({"color": "red"})))
            .await,
    );
    assert_eq!(refused.message, r#"namespaces "nowhere" not found"#);

    namespaces.delete("shed", &DeleteParams::default()).await.unwrap();
    let phase = namespaces
        .get("shed")
        .await
        .unwrap()
        .status
        .and_then(|status| status.phase);
    assert_eq!(phase.as_deref(), Some("Terminating"), "it waits for what is held");
    let refused = refusal(
        inside
            .create(&create(), &widget("late", &json!({"color": "red"})))
            .await,
    );
    assert!(
        refused.code == 403 && refused.message.contains("because it is being terminated"),
        "{}",
        refused.message
    );
    assert_eq!(inside.get_opt("free").await.unwrap(), None);
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    inside
        .patch("held", &PatchParams::default(), &release)
        .await
        .unwrap();
    assert!(namespaces.get_opt("shed").await.unwrap().is_none());
    let refused = refusal(namespaces.delete("default", &DeleteParams::default()).await);
    assert_eq!(refused.code, 403);
}

#[tokio::test]
async fn names_are_generated_and_checked() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    let mut unnamed = widget("", &json!({"color": "red"}));
    unnamed.metadata.name = None;
    assert!(
        refusal(api.create(&create(), &unnamed).await)
            .message
            .contains("name or generateName is required")
    );
    unnamed.metadata.generate_name = Some("w-".into());
    let made = api.create(&create(), &unnamed).await.unwrap();
    assert!(made.name_any().starts_with("w-") && made.name_any().len() == 7);
    for (name, why) in [
        ("Upper", "RFC 1123"),
        ("under_score", "RFC 1123"),
        ("-dash", "RFC 1123"),
        ("a/b", "RFC 1123"),
        (&"x".repeat(254), "no more than 253 characters"),
    ] {
        let refused = refusal(
            api.create(&create(), &widget(name, &json!({"color": "red"})))
                .await,
        );
        assert!(
            refused.code == 422 && refused.message.contains(why),
            "{name}: {}",
            refused.message
        );
    }
}

#[tokio::test]
async fn secrets_fold_their_texts_and_default_their_type() {
    let control_plane = in_memory();
    let api: Api<Secret> = Api::default_namespaced(control_plane.client());
    let secret = json!({"metadata": {"name": "s"}, "stringData": {"a": "one"}, "data": {"b": "dHdv"}});
    let made = api
        .create(&create(), &serde_json::from_value(secret).unwrap())
        .await
        .unwrap();
    assert_eq!((made.string_data, made.type_.as_deref()), (None, Some("Opaque")));
    let data = made.data.unwrap();
    assert_eq!(
        (data["a"].0.as_slice(), data["b"].0.as_slice()),
        (&b"one"[..], &b"two"[..])
    );
    let patch = Patch::Merge(json!({"stringData": {"b": "three"}}));
    let data = api
        .patch("s", &PatchParams::default(), &patch)
        .await
        .unwrap()
        .data
        .unwrap();
    assert_eq!(
        (data["a"].0.as_slice(), data["b"].0.as_slice()),
        (&b"one"[..], &b"three"[..])
    );
    let applied =
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"c": "four"}});
    let data = api
        .patch("s", &PatchParams::apply("me"), &Patch::Apply(applied))
        .await
        .unwrap()
        .data
        .unwrap();
    assert_eq!((data.len(), data["c"].0.as_slice()), (3, &b"four"[..]));
}

#[tokio::test]
async fn a_collection_is_deleted_by_selector() {
    let control_plane = in_memory();
    let api = widgets(&control_plane.client());
    for (name, color) in [("a", "red"), ("b", "blue"), ("c", "red")] {
        api.create(&create(), &widget(name, &json!({"color": color})))
            .await
            .unwrap();
    }
    let red = ListParams::default().fields("spec.color=red");
    api.delete_collection(&DeleteParams::default(), &red)
        .await
        .unwrap();
    let left = api.list(&ListParams::default()).await.unwrap();
    assert_eq!(
        left.items.iter().map(ResourceExt::name_any).collect::<Vec<_>>(),
        ["b"]
    );
}

#[tokio::test(start_paused = true)]
async fn events_are_forgotten_after_an_hour() {
    let control_plane = in_memory();
    let api: Api<k8s_openapi::api::core::v1::Event> = Api::default_namespaced(control_plane.client());
    for (name, time) in [
        ("old", "2020-01-01T00:00:00Z".to_owned()),
        ("new", jiff::Timestamp::now().to_string()),
    ] {
        let event = json!({"metadata": {"name": name}, "involvedObject": {}, "lastTimestamp": time});
        api.create(&create(), &serde_json::from_value(event).unwrap())
            .await
            .unwrap();
    }
    for _ in 0..600 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        if api.get_opt("old").await.unwrap().is_none() {
            break;
        }
    }
    let left = api.list(&ListParams::default()).await.unwrap();
    assert_eq!(
        left.items.iter().map(ResourceExt::name_any).collect::<Vec<_>>(),
        ["new"]
    );
}
