//! What goes on when the API, a worker, or the agent itself is gone.

use rustix::process::Signal;

use freehold_crds::InferenceNode;
use freehold_crds::inference_node::{InferenceNodeSpec, Phase};
use kube::api::{DeleteParams, PostParams};

use crate::harness::{
    Machine, NODE, Setup, assignment, chat_model, embedding_model, eventually, keep_spec, kill, no_api, spec,
    workers_of,
};

#[tokio::test(flavor = "multi_thread")]
async fn serves_its_last_spec_without_an_api_and_survives_a_killed_worker() {
    let folder = tempfile::tempdir().expect("a folder");
    keep_spec(folder.path(), &spec(&[assignment("chat", "1", &chat_model())]));
    let mut machine = Machine::start_in(folder.path().to_owned(), no_api(), Setup::default()).await;
    let answer = machine.chat_until_answered("chat").await;
    assert!(!answer.is_empty());

    let before = machine.workers();
    assert_eq!(before.len(), 1);
    kill(before[0], Signal::KILL);
    let again = eventually("another worker", || async {
        let now = machine.workers();
        if now.len() == 1 && now != before {
            Ok(now)
        } else {
            Err(format!("{now:?}"))
        }
    })
    .await;
    assert_ne!(again, before);
    assert_eq!(machine.chat_until_answered("chat").await, answer);

    machine.stop().await;
    assert!(
        workers_of(folder.path()).is_empty(),
        "workers end with their agent"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn restarted_agent_ends_stuck_orphans_and_serves_again() {
    let folder = tempfile::tempdir().expect("a folder");
    // A worker of an agent that was killed: stopped by a signal, so it cannot see its stdin close.
    std::fs::create_dir(folder.path().join("run")).expect("made");
    let mut orphan = std::process::Command::new(env!("CARGO_BIN_EXE_freehold-node-agent"))
        .args(["worker", "--context", "256", "--socket"])
        .arg(folder.path().join("run/old.sock"))
        .arg("--model")
        .arg(chat_model())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("a worker");
    kill(i32::try_from(orphan.id()).expect("a pid"), Signal::STOP);
    // Stopped, and so past its exec: before that it has no command line to be known by.
    let status = format!("/proc/{}/status", orphan.id());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !std::fs::read_to_string(&status)
        .expect("it is there")
        .contains("State:\tT")
    {
        assert!(std::time::Instant::now() < deadline, "the worker does not stop");
        tokio::task::yield_now().await;
    }

    keep_spec(folder.path(), &spec(&[assignment("chat", "1", &chat_model())]));
    let mut machine = Machine::start_in(folder.path().to_owned(), no_api(), Setup::default()).await;
    let ended = tokio::task::spawn_blocking(move || orphan.wait())
        .await
        .expect("joined")
        .expect("waited");
    assert!(!ended.success());
    machine.chat_until_answered("chat").await;
    machine.stop().await;

    // And once more, as after a reboot.
    let mut machine = Machine::start_in(folder.path().to_owned(), no_api(), Setup::default()).await;
    machine.chat_until_answered("chat").await;
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_end_with_an_agent_that_is_killed() {
    let folder = tempfile::tempdir().expect("a folder");
    keep_spec(folder.path(), &spec(&[assignment("chat", "1", &chat_model())]));
    let kubeconfig = folder.path().join("kubeconfig");
    let nowhere = "apiVersion: v1
kind: Config
current-context: c
clusters: [{name: c, cluster: {server: 'http://127.0.0.1:9'}}]
users: [{name: u, user: {}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
";
    std::fs::write(&kubeconfig, nowhere).expect("written");
    let mut agent = std::process::Command::new(env!("CARGO_BIN_EXE_freehold-node-agent"))
        .args(["--node", "here", "--gateway-listen", "127.0.0.1:0", "--data-dir"])
        .arg(folder.path())
        .env("KUBECONFIG", &kubeconfig)
        .stdin(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("an agent");
    let workers = |count: usize| {
        let path = folder.path().to_owned();
        move || {
            let workers = workers_of(&path);
            std::future::ready(if workers.len() == count {
                Ok(())
            } else {
                Err(format!("{workers:?}"))
            })
        }
    };
    eventually("worker", workers(1)).await;
    agent.kill().expect("killed");
    agent.wait().expect("waited");
    eventually("end of the worker", workers(0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_models_serve_side_by_side() {
    let folder = tempfile::tempdir().expect("a folder");
    let both = [
        assignment("chat", "1", &chat_model()),
        assignment("embed", "1", &embedding_model()),
    ];
    keep_spec(folder.path(), &spec(&both));
    let mut machine = Machine::start_in(folder.path().to_owned(), no_api(), Setup::default()).await;
    machine.chat_until_answered("chat").await;
    let body = serde_json::json!({"model": "embed", "input": ["a cat", "a kitten", "a bank loan"]});
    let reply = eventually("embeddings", || async {
        let (status, reply) = machine.post("/v1/embeddings", body.clone()).await;
        if status == 200 {
            Ok(reply)
        } else {
            Err(format!("{status} {reply}"))
        }
    })
    .await;
    let vector = |index: usize| -> Vec<f64> {
        let numbers = reply["data"][index]["embedding"].as_array().expect("a vector");
        numbers
            .iter()
            .map(|number| number.as_f64().expect("a number"))
            .collect()
    };
    let cosine = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let (cat, kitten, loan) = (vector(0), vector(1), vector(2));
    assert!(cosine(&cat, &kitten) > cosine(&cat, &loan) + 0.2);
    assert_eq!(machine.workers().len(), 2);
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_made_anew_ends_no_worker_before_the_operator_has_planned() {
    let chat = assignment("chat", "1", &chat_model());
    let mut machine = Machine::start(Setup::default(), spec(std::slice::from_ref(&chat))).await;
    machine.phase(&chat.name, Phase::Ready).await;
    let workers = machine.workers();
    let nodes = machine.nodes();
    nodes
        .delete(NODE, &DeleteParams::default())
        .await
        .expect("deleted");
    // As the operator makes it from a heartbeat, with nothing in it.
    nodes
        .create(
            &PostParams::default(),
            &InferenceNode::new(NODE, InferenceNodeSpec::default()),
        )
        .await
        .expect("created");
    // The agent knows the new object, and tells of the model that it goes on serving.
    machine.phase(&chat.name, Phase::Ready).await;
    assert_eq!(machine.status().await.observed_generation, Some(1));
    assert_eq!(machine.workers(), workers);
    // What the operator plans then is what counts, and be it nothing.
    machine.set_spec(InferenceNodeSpec::default()).await;
    eventually("end of the worker", || async {
        match machine.workers() {
            left if left.is_empty() => Ok(()),
            left => Err(format!("{left:?}")),
        }
    })
    .await;
    machine.stop().await;
}
