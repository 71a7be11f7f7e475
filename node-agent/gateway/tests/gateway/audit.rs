//! What is left on record of each request.

use freehold_crds::Enforcement;
use freehold_crds::governance_policy::{AuditFailure, AuditRules};
use freehold_gateway::worker::FinishReason;
use serde_json::{Value, json};

use crate::bus::{ASSIGNMENT, Bus, access, audit};
use crate::worker::{Reply, answer, refusal};

const PATH: &str = "/v1/chat/completions";

fn chat() -> Value {
    json!({"model": "chat", "messages": [{"role": "user", "content": "a secret prompt"}]})
}

#[tokio::test]
async fn a_served_request_leaves_two_lines_without_content() {
    let (bus, worker) = Bus::with_policies(vec![access(&[("ann", "key-of-ann", &[])])]).await;
    worker.reply(answer(4, &["a secret ", "answer"], FinishReason::Stop));
    let answer = bus.post_as(Some("key-of-ann"), PATH, &chat()).await;
    answer.ok();
    let lines = bus.audit().await;
    assert_eq!(lines.len(), 2);
    let (opened, closed) = (&lines[0], &lines[1]);
    assert_eq!(opened["event"], "opened");
    assert_eq!(opened["request"], answer.header("x-request-id").expect("an id"));
    assert_eq!(opened["endpoint"], "chat_completions");
    assert_eq!(opened["model"], "chat");
    assert_eq!(opened["deployment"], "team/chat");
    assert_eq!(opened["key"], "ann");
    assert_eq!(opened["node"], "here");
    assert!(opened["time"].as_str().is_some_and(|time| time.ends_with('Z')));
    assert_eq!(closed["event"], "closed");
    assert_eq!(closed["record"], opened["record"]);
    assert_eq!(closed["code"], 200);
    assert_eq!(closed["served_by"], ASSIGNMENT);
    assert_eq!(
        (&closed["prompt_tokens"], &closed["completion_tokens"]),
        (&json!(4), &json!(2))
    );
    assert!(closed["duration_ms"].is_u64() && closed["first_token_ms"].is_u64());
    let text = serde_json::to_string(&lines).expect("JSON");
    assert!(!text.contains("secret") && !text.contains("key-of-ann"), "{text}");
}

#[tokio::test]
async fn a_stream_is_closed_on_record_before_its_client_sees_the_end() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(4, &["a", "b"], FinishReason::Stop));
    let mut body = chat();
    body["stream"] = json!(true);
    let (_, done) = bus.stream(PATH, &body).await.events().await;
    assert!(done);
    let lines = bus.audit().await;
    assert_eq!(lines[1]["event"], "closed");
    assert_eq!(lines[1]["completion_tokens"], 2);
}

#[tokio::test]
async fn requests_that_are_turned_away_leave_one_line() {
    let (bus, worker) = Bus::with_policies(vec![access(&[("ann", "key-of-ann", &[])])]).await;
    bus.post_as(Some("key-of-eve"), PATH, &chat()).await.error(401);
    bus.post_as(Some("key-of-ann"), PATH, &json!({"model": "chat", "messages": 5}))
        .await
        .error(400);
    let mut unknown = chat();
    unknown["model"] = json!("gpt-9");
    bus.post_as(Some("key-of-ann"), PATH, &unknown).await.error(404);
    let lines = bus.audit().await;
    let seen: Vec<_> = lines
        .iter()
        .map(|line| (&line["event"], &line["code"], &line["error"]))
        .collect();
    assert_eq!(
        seen,
        [
            (&json!("refused"), &json!(401), &json!("invalid_api_key")),
            (&json!("refused"), &json!(400), &json!("invalid_value")),
            (&json!("refused"), &json!(404), &json!("model_not_found")),
        ]
    );
    assert!(worker.calls().is_empty());
    let text = serde_json::to_string(&lines).expect("JSON");
    assert!(!text.contains("gpt-9"), "a made-up name is content: {text}");
}

#[tokio::test]
async fn a_rule_that_refuses_is_named() {
    let keys = access(&[("ann", "key-of-ann", &["other"])]);
    let (bus, _worker) = Bus::with_policies(vec![keys]).await;
    bus.post_as(Some("key-of-ann"), PATH, &chat()).await.error(403);
    let lines = bus.audit().await;
    assert_eq!(lines[0]["refused_by"]["policy"], "access");
    assert_eq!(lines[0]["refused_by"]["rule"], "spec.access.keys");
    assert_eq!(lines[0]["key"], "ann");
    assert_eq!(lines[0]["model"], "chat");
}

#[tokio::test]
async fn a_request_that_the_worker_refuses_is_closed_with_the_error() {
    let (bus, worker) = Bus::start().await;
    let full = refusal(freehold_gateway::worker::WorkerErrorKind::QueueFull, "full");
    worker.reply(Reply::Refuse(full));
    bus.post(PATH, &chat()).await.error(429);
    let lines = bus.audit().await;
    assert_eq!(lines[1]["event"], "closed");
    assert_eq!(lines[1]["code"], 429);
    assert_eq!(lines[1]["error"], "queue_full");
}

/// Makes today's and tomorrow's file unwritable, whoever runs the test: folders stand in their place.
fn spoil(bus: &Bus) {
    let today = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date();
    for day in [today, today.tomorrow().expect("a tomorrow")] {
        let path = bus.folder.path().join(format!("audit/audit-{day}.jsonl"));
        std::fs::create_dir(path).expect("a folder");
    }
}

#[tokio::test]
async fn what_happens_without_a_record_is_the_policys_choice() {
    let rules = |on_failure| {
        audit(AuditRules {
            on_failure,
            ..AuditRules::default()
        })
    };
    let mut only_audits = rules(AuditFailure::Deny);
    only_audits.enforcement = Enforcement::Audit;
    let cases = [
        (vec![rules(AuditFailure::Deny)], 503),
        (vec![rules(AuditFailure::Allow), rules(AuditFailure::Deny)], 503),
        (vec![rules(AuditFailure::Allow)], 200),
        (vec![only_audits], 200),
        (vec![], 200),
    ];
    for (policies, status) in cases {
        let (bus, worker) = Bus::with_policies(policies).await;
        spoil(&bus);
        worker.reply(answer(1, &["fine"], FinishReason::Stop));
        let answer = bus.post(PATH, &chat()).await;
        if status == 200 {
            answer.ok();
        } else {
            let error = answer.error(503);
            assert_eq!(error.code.as_deref(), Some("audit_unavailable"));
            assert_eq!(worker.calls(), []);
        }
        let metrics = bus.get("/metrics").await;
        assert!(metrics.text().contains("freehold_gateway_audit_failures_total 1"));
    }
}

#[tokio::test]
async fn the_log_goes_on_when_the_disk_is_well_again() {
    let rules = audit(AuditRules::default());
    let (bus, worker) = Bus::with_policies(vec![rules]).await;
    spoil(&bus);
    bus.post(PATH, &chat()).await.error(503);
    for entry in std::fs::read_dir(bus.folder.path().join("audit")).expect("the folder") {
        std::fs::remove_dir(entry.expect("an entry").path()).expect("removed");
    }
    worker.reply(answer(1, &["fine"], FinishReason::Stop));
    bus.post(PATH, &chat()).await.ok();
    let events: Vec<_> = bus
        .audit()
        .await
        .iter()
        .map(|line| line["event"].clone())
        .collect();
    // The refusal is told after its answer is sent: its line meets the folder in the file's place or the healed disk.
    let served = match events.split_first() {
        Some((first, rest)) if first == "refused" => rest,
        _ => &events[..],
    };
    assert_eq!(served, ["opened", "closed"]);
}

#[tokio::test]
async fn many_requests_at_once_all_leave_their_lines() {
    let (bus, worker) = Bus::start().await;
    for _ in 0..50 {
        worker.reply(answer(1, &["fine"], FinishReason::Stop));
    }
    let request = chat();
    let answers = futures::future::join_all((0..50).map(|_| bus.post(PATH, &request))).await;
    for answer in &answers {
        answer.ok();
    }
    let lines = bus.audit().await;
    let mut records: Vec<_> = lines.iter().map(|line| line["record"].to_string()).collect();
    records.sort();
    records.dedup();
    assert_eq!((lines.len(), records.len()), (100, 50));
}
