//! Models that cannot run are said to be so, and nothing else is disturbed.

use std::path::Path;
use std::time::{Duration, Instant};

use freehold_crds::inference_node::Phase;
use freehold_crds::model_deployment::ModelSource;

use crate::harness::{Machine, Setup, assignment, chat_model, spec};

#[tokio::test(flavor = "multi_thread")]
async fn bad_models_fail_with_their_reason_and_good_ones_serve_on() {
    let files = tempfile::tempdir().expect("a folder");
    let good = assignment("good", "1", &chat_model());
    let file = |name: &str, bytes: &[u8]| {
        let path = files.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        path
    };
    let whole = std::fs::read(chat_model()).expect("the model");
    let half = file("half.gguf", &whole[..whole.len() / 2]);
    let text = file("text.gguf", b"this is a text and no model");
    let mut huge_count = b"GGUF\x03\x00\x00\x00".to_vec();
    huge_count.extend([0xff; 16]);
    let huge = file("huge.gguf", &huge_count);
    let mut wrong_digest = assignment("digest", "1", &chat_model());
    wrong_digest.model.sha256 = Some("0".repeat(64));
    let unreachable = freehold_crds::inference_node::Assignment {
        model: ModelSource {
            url: Some("http://127.0.0.1:9/model.gguf".to_owned()),
            ..ModelSource::default()
        },
        ..assignment("unreachable", "1", Path::new("/"))
    };
    let all = [
        good.clone(),
        assignment("half", "1", &half),
        assignment("text", "1", &text),
        assignment("huge", "1", &huge),
        wrong_digest,
        unreachable,
        assignment("missing", "1", &files.path().join("nothing.gguf")),
    ];
    let mut machine = Machine::start(Setup::default(), spec(&all)).await;
    for (name, phase, reason) in [
        ("home.half.1", Phase::Failed, "InvalidModel"),
        ("home.text.1", Phase::Failed, "InvalidModel"),
        ("home.huge.1", Phase::Failed, "InvalidModel"),
        ("home.digest.1", Phase::Failed, "DigestMismatch"),
        // What its owner can mend without touching the spec is tried again.
        ("home.unreachable.1", Phase::Backoff, "FetchFailed"),
        ("home.missing.1", Phase::Backoff, "FetchFailed"),
    ] {
        let instance = machine.instance(name, |instance| instance.phase == phase).await;
        assert_eq!(instance.reason.as_deref(), Some(reason), "{instance:?}");
        assert!(
            instance
                .message
                .as_deref()
                .is_some_and(|message| message.len() > 20),
            "{instance:?}"
        );
    }
    machine.phase(&good.name, Phase::Ready).await;
    machine.chat_until_answered("good").await;
    let (status, body) = machine.chat("half").await;
    assert_eq!(status, 503, "{body}");
    assert_eq!(machine.workers().len(), 1);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_file_is_found_as_soon_as_it_is_there() {
    let files = tempfile::tempdir().expect("a folder");
    let path = files.path().join("late.gguf");
    let late = assignment("late", "1", &path);
    let mut machine = Machine::start(Setup::default(), spec(std::slice::from_ref(&late))).await;
    machine.phase(&late.name, Phase::Backoff).await;
    std::os::unix::fs::symlink(chat_model(), &path).expect("linked");
    machine.phase(&late.name, Phase::Ready).await;
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn model_larger_than_memory_is_refused_with_its_arithmetic() {
    let small = Setup {
        memory_limit: Some(64 << 20),
        ..Setup::default()
    };
    let big = assignment("big", "1", &chat_model());
    let mut machine = Machine::start(small, spec(std::slice::from_ref(&big))).await;
    let refused = machine.phase(&big.name, Phase::Refused).await;
    assert_eq!(refused.reason.as_deref(), Some("InsufficientMemory"));
    let message = refused.message.expect("a message");
    for part in [
        "weights",
        "KV cache (256 tokens x 2 requests",
        "overhead",
        "64 MiB of 64 MiB are free",
    ] {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
    let facts = refused.model.expect("the operator needs the facts to plan anew");
    assert!(facts.weight_bytes > 64 << 20 && facts.kv_bytes_per_token > 0);
    assert!(machine.workers().is_empty());
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forbidden_format_is_not_loaded() {
    let mut forbidden = assignment("chat", "1", &chat_model());
    forbidden.allowed_formats = vec![freehold_crds::governance_policy::ModelFormat::Safetensors];
    let mut machine = Machine::start(Setup::default(), spec(std::slice::from_ref(&forbidden))).await;
    let failed = machine.phase(&forbidden.name, Phase::Failed).await;
    assert_eq!(failed.reason.as_deref(), Some("PolicyViolation"));
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_that_is_told_to_stop_ends_soon() {
    let mut machine = Machine::start(Setup::default(), spec(&[assignment("chat", "1", &chat_model())])).await;
    // In the middle of a load, too.
    machine
        .instance("home.chat.1", |instance| instance.phase >= Phase::Loading)
        .await;
    let stopping = Instant::now();
    machine.stop().await;
    assert!(
        stopping.elapsed() < Duration::from_secs(10),
        "{:?}",
        stopping.elapsed()
    );
    assert!(machine.workers().is_empty());
    let status = machine.status().await;
    let ready = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == "Ready")
        .expect("a condition");
    assert_eq!(
        (ready.status.as_str(), ready.reason.as_str()),
        ("False", "Stopped")
    );
    assert_eq!(
        status.instances.first().map(|instance| instance.phase),
        Some(Phase::Pending)
    );
}
