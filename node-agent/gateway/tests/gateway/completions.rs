//! `/v1/completions`.

use freehold_gateway::worker::{FinishReason, PromptInput, WorkerEvent};
use serde_json::{Value, json};

use crate::bus::Bus;
use crate::worker::{Reply, answer, finished, text_with_logprob};

const PATH: &str = "/v1/completions";

fn text_prompt(text: &str) -> PromptInput {
    PromptInput::Text {
        text: text.to_owned(),
    }
}

#[tokio::test]
async fn answers_whole_in_openai_shape() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(2, &[" a", " time"], FinishReason::Length));
    let body = bus
        .post(
            PATH,
            &json!({"model": "chat", "prompt": "Once upon", "echo": true, "best_of": 1}),
        )
        .await
        .ok();
    assert_eq!(body["object"], "text_completion");
    assert!(body["id"].as_str().is_some_and(|id| id.starts_with("cmpl-")));
    assert_eq!(
        body["choices"],
        json!([{"index": 0, "text": " a time", "logprobs": null, "finish_reason": "length"}])
    );
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4})
    );
    let call = worker.only_call();
    assert_eq!(call.prompt, text_prompt("Once upon"));
    assert_eq!(call.max_tokens, Some(16), "the API's own default");
    assert!(call.echo);
}

#[tokio::test]
async fn the_usual_length_gives_way_to_a_rule() {
    let rules = crate::bus::limits(freehold_crds::governance_policy::LimitRules {
        max_output_tokens: Some(10),
        ..Default::default()
    });
    let (bus, worker) = Bus::with_policies(vec![rules]).await;
    worker.reply(answer(1, &["x"], FinishReason::Stop));
    bus.post(PATH, &json!({"model": "chat", "prompt": "a"}))
        .await
        .ok();
    assert_eq!(worker.only_call().max_tokens, Some(10));
}

#[tokio::test]
async fn every_form_of_prompt_is_read() {
    let tokens = |tokens: &[u32]| PromptInput::Tokens {
        tokens: tokens.to_vec(),
    };
    let cases = [
        (json!("a"), vec![text_prompt("a")]),
        (json!(["a", "b"]), vec![text_prompt("a"), text_prompt("b")]),
        (json!([1, 2, 3]), vec![tokens(&[1, 2, 3])]),
        (json!([[1, 2], [3]]), vec![tokens(&[1, 2]), tokens(&[3])]),
    ];
    for (prompt, expected) in cases {
        let (bus, worker) = Bus::start().await;
        for _ in &expected {
            worker.reply(answer(1, &["x"], FinishReason::Stop));
        }
        bus.post(PATH, &json!({"model": "chat", "prompt": prompt}))
            .await
            .ok();
        let mut calls = worker.calls();
        calls.sort_by(|one, other| one.request_id.cmp(&other.request_id));
        let prompts: Vec<_> = calls.into_iter().map(|call| call.prompt).collect();
        assert_eq!(prompts, expected);
    }
}

#[tokio::test]
async fn several_prompts_with_several_answers_are_numbered_by_prompt() {
    let (bus, worker) = Bus::start().await;
    for _ in 0..4 {
        worker.reply(answer(3, &["x", "y"], FinishReason::Stop));
    }
    let body = bus
        .post(PATH, &json!({"model": "chat", "prompt": ["a", "b"], "n": 2}))
        .await
        .ok();
    let indices: Vec<_> = body["choices"]
        .as_array()
        .expect("choices")
        .iter()
        .map(|choice| choice["index"].clone())
        .collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14}),
        "each prompt once, each answer once"
    );
    for call in worker.calls() {
        let second = call.request_id.ends_with("-2") || call.request_id.ends_with("-3");
        assert_eq!(call.prompt, text_prompt(if second { "b" } else { "a" }));
    }
}

#[tokio::test]
async fn streams_in_its_own_shape() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(2, &[" a", " time"], FinishReason::Stop));
    let body =
        json!({"model": "chat", "prompt": "Once", "stream": true, "stream_options": {"include_usage": true}});
    let (chunks, done) = bus.stream(PATH, &body).await.events().await;
    assert!(done);
    let texts: Vec<_> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(texts, [" a", " time", ""]);
    assert_eq!(chunks[2]["choices"][0]["finish_reason"], "stop");
    assert_eq!(chunks[3]["usage"]["total_tokens"], 4);
    assert!(chunks.iter().all(|chunk| chunk["object"] == "text_completion"));
}

#[tokio::test]
async fn logprobs_have_the_older_shape_and_offsets_in_characters() {
    let (bus, worker) = Bus::start().await;
    let events = || {
        Reply::Events(vec![
            WorkerEvent::Started { prompt_tokens: 1 },
            text_with_logprob("é", -0.5),
            text_with_logprob("tat", -0.25),
            finished(1, 2, FinishReason::Stop),
        ])
    };
    worker.reply(events());
    let mut body = json!({"model": "chat", "prompt": "x", "logprobs": 1});
    let whole = bus.post(PATH, &body).await.ok();
    assert_eq!(
        whole["choices"][0]["logprobs"],
        json!({
            "tokens": ["é", "tat"],
            "token_logprobs": [-0.5, -0.25],
            "top_logprobs": [{"other": -3.5}, {"other": -3.5}],
            "text_offset": [0, 1],
        })
    );
    worker.reply(events());
    body["stream"] = json!(true);
    let (chunks, _) = bus.stream(PATH, &body).await.events().await;
    let offsets: Vec<Value> = chunks
        .iter()
        .map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"].clone())
        .collect();
    assert_eq!(offsets[..2], [json!([0]), json!([1])]);
}
