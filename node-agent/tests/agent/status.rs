//! What the agent writes, and how seldom.

use std::time::Duration;

use freehold_crds::inference_node::{InferenceNodeSpec, Phase};
use freehold_crds::{Precision, SYSTEM_NAMESPACE};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use serde_json::json;

use crate::harness::{Machine, NODE, Setup, assignment, chat_model, eventually, spec};

#[tokio::test(flavor = "multi_thread")]
async fn rest_writes_nothing_and_a_change_is_told() {
    // The Lease is renewed once at the start and then not within this test.
    let setup = Setup {
        heartbeat: Some(Duration::from_secs(3600)),
        ..Setup::default()
    };
    let chat = assignment("chat", "1", &chat_model());
    let mut machine = Machine::start(setup, spec(std::slice::from_ref(&chat))).await;
    let ready = machine
        .instance(&chat.name, |instance| instance.resident_bytes.is_some())
        .await;
    assert_eq!(ready.phase, Phase::Ready);
    assert!(ready.load_ms.is_some() && ready.model.is_some_and(|model| model.format == "gguf"));
    let status = machine.status().await;
    assert_eq!(status.summary.as_deref(), Some("1/1"));
    assert_eq!(status.observed_generation, Some(1));
    assert_eq!(status.gateway_address.as_deref(), Some(machine.url("").as_str()));
    assert!(status.inventory.memory_bytes > 0 && status.inventory.cores > 0);

    let revision = || {
        machine
            .control_plane
            .as_ref()
            .expect("a control plane")
            .revision()
    };
    // Memory settles for a moment after the load; then requests and beats go by without a write.
    let mut quiet = revision();
    eventually("rest", || {
        let before = std::mem::replace(&mut quiet, revision());
        let now = quiet;
        async move {
            tokio::time::sleep(Duration::from_secs(3)).await;
            if before == now {
                Ok(())
            } else {
                Err(format!("revision {before}, then {now}"))
            }
        }
    })
    .await;
    let before = revision();
    for _ in 0..3 {
        assert_eq!(machine.chat("chat").await.0, 200);
    }
    let seconds = 7;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    assert!(
        revision() - before <= 1,
        "{} writes in {seconds} s of serving",
        revision() - before
    );

    machine.set_spec(InferenceNodeSpec::default()).await;
    eventually("an empty machine", || async {
        let status = machine.status().await;
        let told = status.observed_generation == Some(2) && status.instances.is_empty();
        if told { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lease_is_renewed_and_carries_the_machines_name() {
    let setup = Setup {
        heartbeat: Some(Duration::from_millis(300)),
        ..Setup::default()
    };
    let mut machine = Machine::start(setup, InferenceNodeSpec::default()).await;
    let client = machine.control_plane.as_ref().expect("a control plane").client();
    let leases: Api<Lease> = Api::namespaced(client, SYSTEM_NAMESPACE);
    let renewed = || async {
        leases
            .get_opt(NODE)
            .await
            .expect("an answer")
            .and_then(|lease| lease.spec?.renew_time)
    };
    let first = eventually("a Lease", || async {
        renewed().await.ok_or_else(|| "none".to_owned())
    })
    .await;
    eventually("a renewal", || async {
        let now = renewed().await;
        if now.as_ref().is_some_and(|now| *now > first) {
            Ok(())
        } else {
            Err(format!("{now:?}"))
        }
    })
    .await;
    let lease = leases.get(NODE).await.expect("a lease");
    assert_eq!(
        lease.spec.and_then(|spec| spec.holder_identity).as_deref(),
        Some(NODE)
    );
    let labels = lease.metadata.labels.expect("labels");
    assert_eq!(
        labels.get("app.kubernetes.io/component").map(String::as_str),
        Some("node-agent")
    );
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_object_changes_nothing_until_a_new_one_comes() {
    let chat = assignment("chat", "1", &chat_model());
    let mut machine = Machine::start(Setup::default(), spec(std::slice::from_ref(&chat))).await;
    machine.phase(&chat.name, Phase::Ready).await;
    machine
        .nodes()
        .delete(NODE, &DeleteParams::default())
        .await
        .expect("deleted");
    assert_eq!(machine.chat("chat").await.0, 200);
    let anew = freehold_crds::InferenceNode::new(NODE, spec(std::slice::from_ref(&chat)));
    machine
        .nodes()
        .create(&PostParams::default(), &anew)
        .await
        .expect("created");
    // The status is told anew although nothing of it has changed.
    let instance = machine.phase(&chat.name, Phase::Ready).await;
    assert_eq!(instance.restarts, 0);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_precision_that_is_asked_for_is_what_the_worker_computes_with() {
    let plain = assignment("plain", "one", &chat_model());
    let mut high = assignment("high", "one", &chat_model());
    high.engine.precision = Precision::High;
    let assignments = [plain, high];
    let mut machine = Machine::start(Setup::default(), spec(&assignments)).await;
    let mut likely = Vec::new();
    for assignment in &assignments {
        machine.phase(&assignment.name, Phase::Ready).await;
        machine.chat_until_answered(&assignment.deployment).await;
        let body = json!({
            "model": assignment.deployment,
            "prompt": "The capital of France is",
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 1,
        });
        let (status, body) = machine.post("/v1/completions", body).await;
        assert_eq!(status, 200, "{body}");
        let logprob = &body["choices"][0]["logprobs"]["token_logprobs"][0];
        likely.push(logprob.as_f64().expect("a number"));
    }
    // Rounding to 8 bits moves it by some hundredths.
    let apart = (likely[0] - likely[1]).abs();
    assert!(apart > 1e-5 && apart < 0.3, "{likely:?}");
    machine.stop().await;
}
