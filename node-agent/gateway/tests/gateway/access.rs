//! Who may call what, and how much.

use freehold_crds::Enforcement;
use freehold_crds::governance_policy::LimitRules;
use freehold_gateway::worker::{FinishReason, WorkerEvent};
use serde_json::{Value, json};

use crate::bus::{ASSIGNMENT, Bus, NODE, access, backend, limits, policy, route, state};
use crate::worker::{Reply, answer, finished};

const PATH: &str = "/v1/chat/completions";

fn chat(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "x"}]})
}

fn with(extra: &Value) -> Value {
    let mut body = chat("chat");
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

fn names(list: &Value) -> Vec<&str> {
    list["data"]
        .as_array()
        .expect("data")
        .iter()
        .map(|model| model["id"].as_str().expect("a name"))
        .collect()
}

#[tokio::test]
async fn models_are_listed_and_shown_one_by_one() {
    let (bus, worker) = Bus::start().await;
    let mut state = state(&worker);
    state
        .routes
        .push(route("org/alias", vec![backend(NODE, ASSIGNMENT, None)]));
    bus.gateway.apply(state);
    let list = bus.get("/v1/models").await.ok();
    let entry = json!({"id": "chat", "object": "model", "created": 1_700_000_000, "owned_by": "team/chat"});
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0], entry);
    assert_eq!(names(&list), ["chat", "org/alias"]);
    assert_eq!(bus.get("/v1/models/chat").await.ok(), entry);
    assert_eq!(bus.get("/v1/models/org/alias").await.ok()["id"], "org/alias");
    assert_eq!(bus.get("/v1/models/org%2Falias").await.ok()["id"], "org/alias");
    let error = bus.get("/v1/models/none").await.error(404);
    assert_eq!(error.code.as_deref(), Some("model_not_found"));
}

#[tokio::test]
async fn without_a_known_key_everything_is_refused_before_the_body_is_read() {
    let (bus, worker) = Bus::with_policies(vec![access(&[("ann", "key-of-ann", &[])])]).await;
    for key in [None, Some("key-of-eve")] {
        for body in [chat("chat"), chat("no-such-name"), json!("not even an object")] {
            let answer = bus.post_as(key, PATH, &body).await;
            let error = answer.error(401);
            assert_eq!(error.kind, "authentication_error");
            assert_eq!(error.code.as_deref(), Some("invalid_api_key"));
            assert!(!error.message.contains("key-of-eve"), "{error:?}");
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        }
        bus.get_as(key, "/v1/models").await.error(401);
        bus.get_as(key, "/v1/models/chat").await.error(401);
    }
    assert_eq!(worker.calls(), []);
    worker.reply(answer(1, &["fine"], FinishReason::Stop));
    bus.post_as(Some("key-of-ann"), PATH, &chat("chat")).await.ok();
    assert_eq!(
        names(&bus.get_as(Some("key-of-ann"), "/v1/models").await.ok()),
        ["chat"]
    );
}

#[tokio::test]
async fn a_key_sees_and_calls_only_its_names() {
    let (bus, worker) = Bus::start().await;
    let mut state = state(&worker);
    let mut other = route("secret", vec![backend(NODE, ASSIGNMENT, None)]);
    other.deployment = "secret".to_owned();
    state.routes.push(other);
    let mut rules = access(&[("ann", "key-of-ann", &["ch*"]), ("root", "key-of-root", &[])]);
    rules.deployments = vec!["team/chat".to_owned(), "team/secret".to_owned()];
    state.policies = vec![rules];
    bus.gateway.apply(state);

    let list = bus.get_as(Some("key-of-ann"), "/v1/models").await.ok();
    assert_eq!(names(&list), ["chat"]);
    let error = bus
        .post_as(Some("key-of-ann"), PATH, &chat("secret"))
        .await
        .error(403);
    assert_eq!(error.kind, "permission_error");
    assert!(error.message.contains("\"ann\""), "{error:?}");
    let error = bus
        .post_as(Some("key-of-ann"), PATH, &chat("none"))
        .await
        .error(404);
    assert!(error.message.ends_with("served here: chat"), "{error:?}");
    let list = bus.get_as(Some("key-of-root"), "/v1/models").await.ok();
    assert_eq!(names(&list), ["chat", "secret"]);
}

#[tokio::test]
async fn a_changed_policy_holds_for_the_next_request() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(1, &["fine"], FinishReason::Stop));
    bus.post(PATH, &chat("chat")).await.ok();
    let mut state = state(&worker);
    state.policies = vec![access(&[])];
    bus.gateway.apply(state);
    bus.post(PATH, &chat("chat")).await.error(401);
}

#[tokio::test]
async fn a_name_that_a_rule_holds_back_says_why() {
    let (bus, worker) = Bus::start().await;
    let mut state = state(&worker);
    state.routes[0].refusal = Some("policy supply asks for a digest".to_owned());
    bus.gateway.apply(state);
    let error = bus.post(PATH, &chat("chat")).await.error(403);
    assert!(
        error.message.contains("policy supply asks for a digest"),
        "{error:?}"
    );
    assert_eq!(names(&bus.get("/v1/models").await.ok()), [""; 0]);
    assert_eq!(worker.calls(), []);
}

#[tokio::test]
async fn requests_over_the_limit_get_429_with_retry_after() {
    let rules = limits(LimitRules {
        requests_per_minute: Some(2),
        ..LimitRules::default()
    });
    let (bus, worker) = Bus::with_policies(vec![rules]).await;
    for _ in 0..2 {
        worker.reply(answer(1, &["fine"], FinishReason::Stop));
        bus.post(PATH, &chat("chat")).await.ok();
    }
    let answer = bus.post(PATH, &chat("chat")).await;
    let error = answer.error(429);
    assert_eq!(error.kind, "requests");
    assert_eq!(error.code.as_deref(), Some("rate_limit_exceeded"));
    assert!(
        error.message.contains("policy limits allows 2 requests a minute"),
        "{error:?}"
    );
    let seconds: u64 = answer
        .header("retry-after")
        .expect("the header")
        .parse()
        .expect("a number");
    assert!((1..=30).contains(&seconds), "{seconds}");
    assert_eq!(worker.calls().len(), 2);
}

#[tokio::test]
async fn limits_count_for_each_key() {
    let keys = access(&[("ann", "key-of-ann", &[]), ("bob", "key-of-bob", &[])]);
    let rules = limits(LimitRules {
        requests_per_minute: Some(1),
        ..LimitRules::default()
    });
    let (bus, worker) = Bus::with_policies(vec![keys, rules]).await;
    for key in ["key-of-ann", "key-of-bob"] {
        worker.reply(answer(1, &["fine"], FinishReason::Stop));
        bus.post_as(Some(key), PATH, &chat("chat")).await.ok();
        bus.post_as(Some(key), PATH, &chat("chat")).await.error(429);
    }
}

#[tokio::test]
async fn tokens_are_counted_as_they_really_were() {
    let rules = limits(LimitRules {
        tokens_per_minute: Some(1000),
        ..LimitRules::default()
    });
    let (bus, worker) = Bus::with_policies(vec![rules]).await;
    let ask = with(&json!({"max_tokens": 900}));
    // It reserves 900 and uses 3.
    worker.reply(answer(2, &["short"], FinishReason::Stop));
    bus.post(PATH, &ask).await.ok();
    // So the next one passes, and this time nearly all is used.
    worker.reply(Reply::Events(vec![
        WorkerEvent::Started { prompt_tokens: 90 },
        finished(90, 900, FinishReason::Length),
    ]));
    bus.post(PATH, &ask).await.ok();
    let error = bus.post(PATH, &ask).await.error(429);
    assert_eq!(error.kind, "tokens");
    assert_eq!(worker.calls().len(), 2);
}

#[tokio::test]
async fn answers_are_capped_and_longer_ones_refused() {
    let rules = limits(LimitRules {
        max_output_tokens: Some(50),
        max_context_tokens: Some(100),
        ..LimitRules::default()
    });
    let (bus, worker) = Bus::with_policies(vec![rules]).await;
    worker.reply(answer(1, &["fine"], FinishReason::Stop));
    bus.post(PATH, &chat("chat")).await.ok();
    let call = worker.only_call();
    assert_eq!((call.max_tokens, call.max_context), (Some(50), Some(100)));

    let error = bus.post(PATH, &with(&json!({"max_tokens": 51}))).await.error(400);
    assert_eq!(error.param.as_deref(), Some("max_tokens"));
    assert!(error.message.contains("allows 50"), "{error:?}");
    assert_eq!(worker.calls().len(), 1);
}

#[tokio::test]
async fn a_prompt_beyond_the_allowed_context_is_refused_and_stopped() {
    let rules = limits(LimitRules {
        max_context_tokens: Some(100),
        ..LimitRules::default()
    });
    let (bus, worker) = Bus::with_policies(vec![rules]).await;
    let live = worker.live();
    live.send(WorkerEvent::Started { prompt_tokens: 100 })
        .expect("listening");
    let error = bus.post(PATH, &with(&json!({"stream": true}))).await.error(400);
    assert_eq!(error.code.as_deref(), Some("context_length_exceeded"));
    assert_eq!(error.param.as_deref(), Some("messages"));
    crate::bus::eventually(|| worker.cancelled(), |cancelled| *cancelled == 1).await;
    drop(live);
}

#[tokio::test]
async fn policies_that_audit_let_everything_pass_and_record_it() {
    let mut keys = access(&[]);
    let mut rules = limits(LimitRules {
        requests_per_minute: Some(1),
        max_output_tokens: Some(2),
        ..LimitRules::default()
    });
    keys.enforcement = Enforcement::Audit;
    rules.enforcement = Enforcement::Audit;
    let (bus, worker) = Bus::with_policies(vec![keys, rules]).await;
    for _ in 0..2 {
        worker.reply(answer(1, &["a", "b", "c"], FinishReason::Length));
        bus.post(PATH, &with(&json!({"max_tokens": 3}))).await.ok();
    }
    assert_eq!(worker.calls()[0].max_tokens, Some(3), "nothing is capped");
    let lines = bus.audit().await;
    let rules_of = |line: &Value| -> Vec<String> {
        let violations = line["violations"].as_array().cloned().unwrap_or_default();
        violations
            .iter()
            .map(|violation| violation["rule"].as_str().expect("a rule").to_owned())
            .collect()
    };
    let opened: Vec<_> = lines
        .iter()
        .filter(|line| line["event"] == "opened")
        .map(rules_of)
        .collect();
    assert_eq!(
        opened,
        [
            vec!["spec.access.requireKey", "spec.limits.maxOutputTokens"],
            vec![
                "spec.access.requireKey",
                "spec.limits.maxOutputTokens",
                "spec.limits.requestsPerMinute"
            ],
        ]
    );
    let closed: Vec<_> = lines
        .iter()
        .filter(|line| line["event"] == "closed")
        .map(rules_of)
        .collect();
    assert_eq!(closed[0], ["spec.limits.maxOutputTokens"]);
}

#[tokio::test]
async fn the_strictest_of_several_policies_wins() {
    let wide = limits(LimitRules {
        max_output_tokens: Some(500),
        ..LimitRules::default()
    });
    let narrow = policy(
        "narrow",
        freehold_crds::governance_policy::PolicyRules {
            limits: Some(LimitRules {
                max_output_tokens: Some(5),
                ..LimitRules::default()
            }),
            ..Default::default()
        },
    );
    let (bus, _worker) = Bus::with_policies(vec![wide, narrow]).await;
    let error = bus.post(PATH, &with(&json!({"max_tokens": 6}))).await.error(400);
    assert!(error.message.contains("policy narrow"), "{error:?}");
}
