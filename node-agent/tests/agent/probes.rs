//! Probes on a real worker.

use freehold_crds::health_probe::{
    Check, DeviceCheck, InferenceCheck, LatencyCheck, MemoryCheck, ProgressCheck, Remediation,
    RemediationAction, TokensPerSecondCheck,
};
use freehold_crds::inference_node::{CompiledProbe, Instance, Phase, ProbeState};
use freehold_crds::{Device, Quantity};

use crate::harness::{Machine, Setup, assignment, chat_model, probe, spec};

fn check(name: &str) -> Check {
    Check {
        name: name.to_owned(),
        ..Check::default()
    }
}

fn capital(expect: &str) -> InferenceCheck {
    InferenceCheck {
        prompt: "What is the capital of France?".to_owned(),
        expect: Some(expect.to_owned()),
        max_tokens: 16,
        timeout_seconds: 30,
    }
}

fn state(instance: &Instance, check: &str) -> ProbeState {
    let result = instance.probes.iter().find(|result| result.check == check);
    result.map(|result| result.state).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_check_says_what_it_sees() {
    let chat = assignment("chat", "1", &chat_model());
    let probe = CompiledProbe {
        checks: vec![
            Check {
                inference: Some(capital("\\p{Alphabetic}")),
                ..check("answers")
            },
            Check {
                progress: Some(ProgressCheck { stall_seconds: 30 }),
                ..check("moves")
            },
            Check {
                latency: Some(LatencyCheck {
                    max_time_to_first_token_ms: 60_000,
                }),
                ..check("prompt")
            },
            Check {
                tokens_per_second: Some(TokensPerSecondCheck { minimum: 1e6 }),
                ..check("impossibly fast")
            },
            Check {
                device: Some(DeviceCheck {
                    expected: Device::Cuda,
                }),
                ..check("on a GPU")
            },
            Check {
                memory: Some(MemoryCheck {
                    maximum: Quantity::from("64Gi"),
                }),
                ..check("small")
            },
        ],
        ..probe("all", &["chat"])
    };
    let mut with_probe = spec(std::slice::from_ref(&chat));
    with_probe.probes = vec![probe];
    let mut machine = Machine::start(Setup::default(), with_probe).await;
    let seen = machine
        .instance(&chat.name, |instance| {
            let healthy = ["answers", "moves", "prompt", "small"];
            let failing = ["impossibly fast", "on a GPU"];
            healthy
                .iter()
                .all(|check| state(instance, check) == ProbeState::Healthy)
                && failing
                    .iter()
                    .all(|check| state(instance, check) == ProbeState::Failing)
        })
        .await;
    assert_eq!(
        (seen.phase, seen.restarts),
        (Phase::Ready, 0),
        "slowness restarts nothing"
    );
    machine.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_answer_restarts_within_its_budget_and_then_holds() {
    let (chat, other) = (
        assignment("chat", "1", &chat_model()),
        assignment("other", "1", &chat_model()),
    );
    let probe = CompiledProbe {
        checks: vec![Check {
            inference: Some(capital("^never this$")),
            ..check("answers")
        }],
        remediation: Remediation {
            action: RemediationAction::Restart,
            budget: 1,
            minimum_run_seconds: 0,
            cooldown_seconds: 0,
            ..Remediation::default()
        },
        ..probe("strict", &["chat"])
    };
    let mut with_probe = spec(&[chat.clone(), other.clone()]);
    with_probe.probes = vec![probe];
    let mut machine = Machine::start(Setup::default(), with_probe).await;
    let held = machine
        .instance(&chat.name, |instance| {
            instance
                .probes
                .iter()
                .any(|result| result.suspended && result.restarts == 1)
        })
        .await;
    assert_eq!((held.phase, held.restarts), (Phase::Ready, 1));
    assert!(
        held.last_exit
            .as_deref()
            .is_some_and(|exit| exit.contains("strict")),
        "{held:?}"
    );
    let message = held
        .probes
        .first()
        .and_then(|result| result.message.clone())
        .expect("a message");
    assert!(message.contains("1 of 1 restarts"), "{message}");
    assert_eq!(machine.phase(&other.name, Phase::Ready).await.restarts, 0);
    machine.stop().await;
}
