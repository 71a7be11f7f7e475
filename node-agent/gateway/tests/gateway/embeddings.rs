//! `/v1/embeddings`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use freehold_gateway::worker::{EmbedInput, EmbedReply, WorkerErrorKind};
use serde_json::json;

use crate::bus::Bus;
use crate::worker::{FakeWorker, refusal};

const PATH: &str = "/v1/embeddings";

/// Each input gets a vector that tells its place.
fn embeds(worker: &FakeWorker) {
    worker.embed_with(|call| {
        Ok(EmbedReply {
            vectors: (0..call.input.len())
                .map(|index| vec![index as f32, -0.5])
                .collect(),
            prompt_tokens: 9,
        })
    });
}

#[tokio::test]
async fn answers_numbers_in_openai_shape() {
    let (bus, worker) = Bus::start().await;
    embeds(&worker);
    let body = bus
        .post(
            PATH,
            &json!({"model": "chat", "input": ["a", "b"], "user": "someone"}),
        )
        .await
        .ok();
    assert_eq!(
        body,
        json!({
            "object": "list",
            "data": [
                {"object": "embedding", "index": 0, "embedding": [0.0, -0.5]},
                {"object": "embedding", "index": 1, "embedding": [1.0, -0.5]},
            ],
            "model": "chat",
            "usage": {"prompt_tokens": 9, "total_tokens": 9},
        })
    );
}

#[tokio::test]
async fn numbers_are_printed_as_32_bits_need_them() {
    let (bus, worker) = Bus::start().await;
    worker.embed_with(|_| {
        Ok(EmbedReply {
            vectors: vec![vec![0.1]],
            prompt_tokens: 1,
        })
    });
    let answer = bus.post(PATH, &json!({"model": "chat", "input": "a"})).await;
    assert!(answer.text().contains("[0.1]"), "{}", answer.text());
}

#[tokio::test]
async fn answers_base64_of_little_endian_floats() {
    let (bus, worker) = Bus::start().await;
    embeds(&worker);
    let body = bus
        .post(
            PATH,
            &json!({"model": "chat", "input": "a", "encoding_format": "base64"}),
        )
        .await
        .ok();
    let text = body["data"][0]["embedding"].as_str().expect("text");
    let bytes = STANDARD.decode(text).expect("base64");
    assert_eq!(bytes, [0.0_f32.to_le_bytes(), (-0.5_f32).to_le_bytes()].concat());
}

#[tokio::test]
async fn every_form_of_input_is_read() {
    let text = |text: &str| EmbedInput::Text(text.to_owned());
    let cases = [
        (json!("a"), vec![text("a")]),
        (json!(["a", "b"]), vec![text("a"), text("b")]),
        (json!([1, 2]), vec![EmbedInput::Tokens(vec![1, 2])]),
        (
            json!([[1], [2, 3]]),
            vec![EmbedInput::Tokens(vec![1]), EmbedInput::Tokens(vec![2, 3])],
        ),
    ];
    let (bus, worker) = Bus::start().await;
    embeds(&worker);
    for (input, _) in &cases {
        bus.post(PATH, &json!({"model": "chat", "input": input}))
            .await
            .ok();
    }
    let seen: Vec<_> = worker.embed_calls().into_iter().map(|call| call.input).collect();
    assert_eq!(seen, cases.map(|(_, expected)| expected));
}

#[tokio::test]
async fn a_prompt_too_long_is_named_input_here() {
    let (bus, worker) = Bus::start().await;
    worker.embed_with(|_| Err(refusal(WorkerErrorKind::PromptTooLong, "600 tokens, 512 fit")));
    let error = bus
        .post(PATH, &json!({"model": "chat", "input": "a"}))
        .await
        .error(400);
    assert_eq!(error.param.as_deref(), Some("input"));
    assert_eq!(error.code.as_deref(), Some("context_length_exceeded"));
}

#[tokio::test]
async fn a_missing_vector_is_not_passed_over() {
    let (bus, worker) = Bus::start().await;
    worker.embed_with(|_| {
        Ok(EmbedReply {
            vectors: vec![vec![1.0]],
            prompt_tokens: 2,
        })
    });
    bus.post(PATH, &json!({"model": "chat", "input": ["a", "b"]}))
        .await
        .error(502);
}
