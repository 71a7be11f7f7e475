//! Models that sleep until they are asked.

use freehold_crds::inference_node::{Assignment, Phase};
use freehold_crds::model_deployment::{Activation, ActivationMode};

use crate::harness::{Machine, Setup, assignment, chat_model, eventually, spec};

fn on_demand(name: &str, idle_seconds: u32) -> Assignment {
    let activation = Activation {
        mode: ActivationMode::OnDemand,
        idle_seconds,
    };
    Assignment {
        activation,
        ..assignment(name, "1", &chat_model())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn model_sleeps_wakes_for_a_request_and_sleeps_again() {
    let sleeper = on_demand("chat", 1);
    let mut machine = Machine::start(Setup::default(), spec(std::slice::from_ref(&sleeper))).await;
    machine.phase(&sleeper.name, Phase::Idle).await;
    assert!(machine.workers().is_empty(), "asleep means out of memory");
    // The first request waits for the load and is answered; so are others that come meanwhile.
    let (first, second) = tokio::join!(machine.chat("chat"), machine.chat("chat"));
    assert_eq!((first.0, second.0), (200, 200), "{first:?} {second:?}");
    machine.phase(&sleeper.name, Phase::Idle).await;
    eventually("sleep", || async {
        let workers = machine.workers();
        if workers.is_empty() {
            Ok(())
        } else {
            Err(format!("{workers:?}"))
        }
    })
    .await;
    assert_eq!(machine.chat("chat").await.0, 200);
    let instance = machine.phase(&sleeper.name, Phase::Idle).await;
    assert_eq!(
        (instance.restarts, instance.last_exit),
        (0, None),
        "sleep is no crash"
    );
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sleeper_gives_its_memory_to_the_one_that_is_asked() {
    let (one, other) = (on_demand("one", 600), on_demand("other", 600));
    // One replica needs about 170 MiB: there is room for one of the two.
    let setup = Setup {
        memory_limit: Some(300 << 20),
        ..Setup::default()
    };
    let mut machine = Machine::start(setup, spec(&[one.clone(), other.clone()])).await;
    machine.phase(&one.name, Phase::Idle).await;
    machine.phase(&other.name, Phase::Idle).await;
    assert_eq!(machine.chat("one").await.0, 200);
    machine.phase(&one.name, Phase::Ready).await;
    let answer = machine.chat("other").await;
    assert_eq!(answer.0, 200, "{answer:?}");
    machine.phase(&one.name, Phase::Idle).await;
    machine.phase(&other.name, Phase::Ready).await;
    assert_eq!(machine.workers().len(), 1);
    machine.stop().await;
}
