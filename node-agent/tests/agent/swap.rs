//! One revision takes the place of another.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use freehold_crds::inference_node::{InferenceNodeSpec, Phase};

use crate::harness::{Machine, Setup, assignment, chat_model, eventually, route, spec};

#[tokio::test(flavor = "multi_thread")]
async fn surge_swaps_a_model_without_a_failed_request() {
    let old = assignment("chat", "old", &chat_model());
    let mut new = assignment("chat", "new", &chat_model());
    new.engine.context_length = Some(320);
    let machine = Arc::new(tokio::sync::RwLock::new(
        Machine::start(Setup::default(), spec(std::slice::from_ref(&old))).await,
    ));
    machine.read().await.phase(&old.name, Phase::Ready).await;
    machine.read().await.chat_until_answered("chat").await;

    let (done, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let (machine, done, served) = (Arc::clone(&machine), Arc::clone(&done), Arc::clone(&served));
            tokio::spawn(async move {
                let mut failures = Vec::new();
                while !done.load(Ordering::SeqCst) {
                    let (status, body) = machine.read().await.chat("chat").await;
                    served.fetch_add(1, Ordering::SeqCst);
                    if status != 200 {
                        failures.push(format!("{status} {body}"));
                    }
                }
                failures
            })
        })
        .collect();

    // As the operator does it: both, the new one first; then the new one alone.
    let both = InferenceNodeSpec {
        assignments: vec![old.clone(), new.clone()],
        routes: vec![route("chat", &[&new, &old])],
        ..InferenceNodeSpec::default()
    };
    {
        let machine = machine.read().await;
        machine.set_spec(both).await;
        machine.phase(&new.name, Phase::Ready).await;
        machine.set_spec(spec(std::slice::from_ref(&new))).await;
        eventually("the old revision's end", || async {
            let instances = machine.status().await.instances;
            if instances.len() == 1 && machine.workers().len() == 1 {
                Ok(())
            } else {
                Err(format!("{instances:?}"))
            }
        })
        .await;
        let after = served.load(Ordering::SeqCst) + 4;
        eventually("requests after the swap", || async {
            let now = served.load(Ordering::SeqCst);
            if now >= after {
                Ok(())
            } else {
                Err(now.to_string())
            }
        })
        .await;
    }
    done.store(true, Ordering::SeqCst);
    for client in clients {
        assert_eq!(client.await.expect("a client"), Vec::<String>::new());
    }
    machine.write().await.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replacement_loads_when_the_old_one_has_left_memory() {
    let old = assignment("chat", "old", &chat_model());
    let mut new = assignment("chat", "new", &chat_model());
    new.engine.context_length = Some(320);
    let setup = Setup {
        memory_limit: Some(300 << 20),
        ..Setup::default()
    };
    let mut machine = Machine::start(setup, spec(std::slice::from_ref(&old))).await;
    machine.phase(&old.name, Phase::Ready).await;
    let generation = machine.set_spec(spec(std::slice::from_ref(&new))).await;
    machine.phase(&new.name, Phase::Ready).await;
    machine.chat_until_answered("chat").await;
    let status = machine.status().await;
    assert_eq!(status.observed_generation, Some(generation));
    assert_eq!(status.instances.len(), 1);
    machine.stop().await;
}
