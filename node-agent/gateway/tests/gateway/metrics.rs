//! What Prometheus sees.

use freehold_gateway::worker::{FinishReason, WorkerEvent};
use serde_json::{Value, json};

use crate::bus::Bus;
use crate::worker::{answer, finished};

const PATH: &str = "/v1/chat/completions";

fn chat(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "x"}]})
}

async fn metrics(bus: &Bus) -> String {
    let answer = bus.get("/metrics").await;
    assert!(
        answer
            .header("content-type")
            .is_some_and(|kind| kind.starts_with("application/openmetrics-text"))
    );
    let text = answer.text().to_owned();
    assert!(text.ends_with("# EOF\n"));
    text
}

#[track_caller]
fn has(text: &str, line: &str) {
    assert!(text.lines().any(|seen| seen == line), "{line} is not in:\n{text}");
}

#[tokio::test]
async fn requests_tokens_and_times_are_counted_by_name() {
    let (bus, worker) = Bus::start().await;
    for _ in 0..2 {
        worker.reply(answer(3, &["a", "b"], FinishReason::Stop));
        bus.post(PATH, &chat("chat")).await.ok();
    }
    bus.post(PATH, &json!({"model": "chat", "messages": []}))
        .await
        .error(400);
    let text = metrics(&bus).await;
    has(
        &text,
        r#"freehold_gateway_requests_total{model="chat",endpoint="chat_completions",code="200"} 2"#,
    );
    has(
        &text,
        r#"freehold_gateway_requests_total{model="",endpoint="chat_completions",code="400"} 1"#,
    );
    has(&text, r#"freehold_gateway_prompt_tokens_total{model="chat"} 6"#);
    has(
        &text,
        r#"freehold_gateway_completion_tokens_total{model="chat"} 4"#,
    );
    has(
        &text,
        r#"freehold_gateway_time_to_first_token_seconds_count{model="chat"} 2"#,
    );
    has(
        &text,
        r#"freehold_gateway_request_duration_seconds_count{model="chat"} 2"#,
    );
    has(
        &text,
        r#"freehold_gateway_tokens_per_second_count{model="chat"} 2"#,
    );
    has(&text, r#"freehold_gateway_requests_in_flight{model="chat"} 0"#);
}

#[tokio::test]
async fn waiting_and_running_requests_show_in_the_gauges() {
    let (bus, worker) = Bus::start().await;
    let live = worker.live();
    let request = tokio::spawn(async move {
        let answer = bus.post(PATH, &chat("chat")).await;
        (bus, answer)
    });
    crate::bus::eventually(|| worker.busy(), |busy| *busy == 1).await;
    live.send(WorkerEvent::Started { prompt_tokens: 1 })
        .expect("listening");
    live.send(finished(1, 1, FinishReason::Stop)).expect("listening");
    let (bus, answer) = request.await.expect("an answer");
    answer.ok();

    let live = worker.live();
    live.send(WorkerEvent::Started { prompt_tokens: 1 })
        .expect("listening");
    let mut body = chat("chat");
    body["stream"] = json!(true);
    let mut call = bus.stream(PATH, &body).await;
    call.event().await.expect("the role");
    let text = metrics(&bus).await;
    has(&text, r#"freehold_gateway_requests_in_flight{model="chat"} 1"#);
    has(&text, r#"freehold_gateway_requests_waiting{model="chat"} 1"#);
    live.send(crate::worker::text("a")).expect("listening");
    call.event().await.expect("a piece");
    let text = metrics(&bus).await;
    has(&text, r#"freehold_gateway_requests_waiting{model="chat"} 0"#);
    drop(call);
}

#[tokio::test]
async fn names_that_clients_make_up_are_no_labels() {
    let (bus, _worker) = Bus::start().await;
    for number in 0..20 {
        bus.post(PATH, &chat(&format!("made-up-{number}")))
            .await
            .error(404);
    }
    let text = metrics(&bus).await;
    assert!(!text.contains("made-up"), "{text}");
    has(
        &text,
        r#"freehold_gateway_requests_total{model="",endpoint="chat_completions",code="404"} 20"#,
    );
}
