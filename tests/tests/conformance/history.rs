//! What lies too far back: the real server has thrown its history away, the embedded one has had more changes than
//! it keeps. Clients must be told so in the same words, since on these they begin anew.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use freehold_tests::api_server::{ApiServer, Storage};
use freehold_tests::exchange::{Answer, Request, send};
use freehold_tests::likeness::{Renamed, differences};
use serde_json::{Value, json};

use crate::both::Both;
use crate::script::Step;

/// More than the embedded control plane keeps (`docs/limits.md`).
const CHANGES: usize = 1100;
/// What the real server throws away is gone by then: it does so every second, and keeps what is a second old.
const PATIENCE: Duration = Duration::from_secs(60);

fn step(text: &str) -> Step {
    serde_yaml::from_str(text).unwrap()
}

async fn ask(both: &Both, step: &Step, saved: &[BTreeMap<String, String>; 2]) -> (Answer, Answer) {
    both.ask(&step.request(&saved[0]), &step.request(&saved[1])).await
}

/// The code and the reason, of a refusal or of the first event of a watch.
fn told(answer: &Answer) -> (Value, Value) {
    let status = answer.body.pointer("/0/object").unwrap_or(&answer.body);
    (status["code"].clone(), status["reason"].clone())
}

/// What the real server answers to the first of these that it does not call too old.
async fn still_answered(both: &Both, asked: &[Step], saved: &BTreeMap<String, String>) -> Option<Answer> {
    for step in asked {
        let answer = send(&both.real, &step.request(saved)).await.unwrap();
        if told(&answer) != (json!(410), json!("Expired")) {
            return Some(answer);
        }
    }
    None
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_too_far_back_is_told_alike() {
    // The server asks its store for this, so it must be etcd; and no cluster of a reader's own is so forgetful.
    let compacting = ["--etcd-compaction-interval=1s".to_owned()];
    let server = ApiServer::start_with(Storage::Etcd, &[], &compacting)
        .await
        .unwrap();
    let mut both = Both::with(server).await;
    let namespace = both.namespace("history").await;
    let start = BTreeMap::from([("ns".to_owned(), namespace)]);
    let mut saved = [start.clone(), start];
    for (at, name) in ["a", "b", "c"].iter().enumerate() {
        let create = step(&format!(
            "{{do: POST gadgets, body: {{metadata: {{name: {name}}}, spec: {{color: red}}}}, save: {{rv{at}: /metadata/resourceVersion}}}}"
        ));
        let (real, embedded) = ask(&both, &create, &saved).await;
        assert_eq!((real.code, embedded.code), (201, 201), "{real:?} {embedded:?}");
        create.keep(&real, &mut saved[0]);
        create.keep(&embedded, &mut saved[1]);
    }
    let page = step("{do: 'GET gadgets?limit=1', save: {page: /metadata/continue}}");
    let (real, embedded) = ask(&both, &page, &saved).await;
    page.keep(&real, &mut saved[0]);
    page.keep(&embedded, &mut saved[1]);
    assert!(saved.iter().all(|saved| !saved["page"].is_empty()), "{saved:?}");

    // Until then both answer, and alike.
    let asked = [
        "{do: 'WATCH gadgets?watch=true&resourceVersion=$rv0&timeoutSeconds=1'}",
        "{do: 'GET gadgets?resourceVersion=$rv0&resourceVersionMatch=Exact'}",
        "{do: 'GET gadgets?limit=1&continue=$page'}",
    ]
    .map(step);
    for step in &asked {
        let (_, embedded) = ask(&both, step, &saved).await;
        assert_eq!(embedded.code, 200, "{}: {embedded:?}", step.action);
    }

    let change = |number: usize| {
        let body = json!({"spec": {"size": number % 7 + 1}});
        let path = saved[0]["ns"].clone();
        let path = format!("/apis/test.example.com/v1/namespaces/{path}/gadgets/a");
        Request::new("PATCH", path).with_body("application/merge-patch+json", &body)
    };
    for number in 0..CHANGES {
        let answer = send(&both.embedded, &change(number)).await.unwrap();
        assert_eq!(answer.code, 200, "{answer:?}");
    }
    // The real server compacts what it has seen at two looks; what it still holds in memory, it forgets with its end.
    let begun = Instant::now();
    for number in 0.. {
        both.server.kill();
        both.server.start_again().await.unwrap();
        both.real = both.server.client().await.unwrap();
        let answer = send(&both.real, &change(number)).await.unwrap();
        assert_eq!(answer.code, 200, "{answer:?}");
        // The page is of a later revision than the list, and may outlive it by a compaction.
        let Some(kept) = still_answered(&both, &asked, &saved[0]).await else {
            break;
        };
        assert!(
            begun.elapsed() < PATIENCE,
            "the real server never forgot; last seen: {kept:?}"
        );
        tokio::time::sleep(Duration::from_secs(2)).await;
    }

    let mut complaints = Vec::new();
    for step in &asked {
        let (real, embedded) = ask(&both, step, &saved).await;
        println!("{}\n  real:     {real:?}\n  embedded: {embedded:?}", step.action);
        assert_eq!(
            told(&real),
            (json!(410), json!("Expired")),
            "{}: {real:?}",
            step.action
        );
        let alike = [&real, &embedded].map(|answer| Renamed::default().comparable(answer));
        let found = differences(&alike[0], &alike[1]);
        complaints.extend(found.iter().map(|found| format!("{}\n  {found}", step.action)));
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    // What comes with the refusal of a page leads on, on both.
    let next = step("{do: 'GET gadgets?limit=1&continue=$page', save: {page: /metadata/continue}}");
    let (real, embedded) = ask(&both, &next, &saved).await;
    next.keep(&real, &mut saved[0]);
    next.keep(&embedded, &mut saved[1]);
    let (real, embedded) = ask(&both, &step("{do: 'GET gadgets?continue=$page'}"), &saved).await;
    assert_eq!((real.code, embedded.code), (200, 200), "{real:?} {embedded:?}");
    let names = |answer: &Answer| -> Vec<Value> {
        let items = answer.body["items"].as_array().unwrap().iter();
        items.map(|item| item["metadata"]["name"].clone()).collect()
    };
    assert_eq!(names(&real), names(&embedded));
}
