//! Requests that are wrong: each gets an error that names its field, and nothing reaches the worker.

use http::Method;
use serde_json::{Value, json};

use crate::bus::{ASSIGNMENT, Bus, state};
use crate::worker::{answer, finished};
use freehold_gateway::worker::{FinishReason, WorkerEvent};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const EMBEDDINGS: &str = "/v1/embeddings";
const JSON: (&str, &str) = ("content-type", "application/json");

/// A sound body for the path, with `extra` over it.
fn body(path: &str, extra: &Value) -> Value {
    let mut body = match path {
        CHAT => json!({"model": "chat", "messages": [{"role": "user", "content": "x"}]}),
        COMPLETIONS => json!({"model": "chat", "prompt": "x"}),
        _ => json!({"model": "chat", "input": "x"}),
    };
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

#[tokio::test]
async fn each_wrong_field_is_refused_and_named() {
    let many = |count: usize| json!(vec!["x"; count]);
    let cases = [
        // Numbers.
        (CHAT, json!({"temperature": 9000}), "temperature", "from 0 to 2"),
        (CHAT, json!({"temperature": -0.1}), "temperature", "from 0 to 2"),
        (
            CHAT,
            json!({"temperature": "hot"}),
            "temperature",
            "must be a number",
        ),
        (CHAT, json!({"top_p": 1.5}), "top_p", "from 0 to 1"),
        (CHAT, json!({"top_k": -1}), "top_k", "whole number"),
        (CHAT, json!({"min_p": 2}), "min_p", "from 0 to 1"),
        (
            CHAT,
            json!({"repetition_penalty": 0}),
            "repetition_penalty",
            "from 0.01 to 10",
        ),
        (
            CHAT,
            json!({"frequency_penalty": -3}),
            "frequency_penalty",
            "from -2 to 2",
        ),
        (
            CHAT,
            json!({"presence_penalty": 1e300}),
            "presence_penalty",
            "from -2 to 2",
        ),
        (CHAT, json!({"max_tokens": 0}), "max_tokens", "from 1"),
        (CHAT, json!({"max_tokens": -5}), "max_tokens", "from 1"),
        (CHAT, json!({"max_tokens": 1.5}), "max_tokens", "whole number"),
        (
            CHAT,
            json!({"max_tokens": 18_446_744_073_709_551_615_u64}),
            "max_tokens",
            "from 1",
        ),
        (CHAT, json!({"max_tokens": "10"}), "max_tokens", "a string"),
        (
            CHAT,
            json!({"max_completion_tokens": 0}),
            "max_completion_tokens",
            "from 1",
        ),
        (
            CHAT,
            json!({"max_tokens": 1, "max_completion_tokens": 2}),
            "max_tokens",
            "one of them",
        ),
        (CHAT, json!({"n": 0}), "n", "from 1 to 16"),
        (CHAT, json!({"n": 17}), "n", "from 1 to 16"),
        (CHAT, json!({"seed": 0.5}), "seed", "whole number"),
        (CHAT, json!({"seed": 1e40}), "seed", "64 bits"),
        (
            CHAT,
            json!({"top_logprobs": 21, "logprobs": true}),
            "top_logprobs",
            "from 0 to 20",
        ),
        (
            CHAT,
            json!({"top_logprobs": 2}),
            "top_logprobs",
            "logprobs is true",
        ),
        (CHAT, json!({"logprobs": 3}), "logprobs", "true or false"),
        (
            CHAT,
            json!({"logit_bias": {"1": 101}}),
            "logit_bias.1",
            "from -100 to 100",
        ),
        (
            CHAT,
            json!({"logit_bias": {"cat": 1}}),
            "logit_bias",
            "not the number of a token",
        ),
        (CHAT, json!({"logit_bias": [1]}), "logit_bias", "an object"),
        (COMPLETIONS, json!({"logprobs": 6}), "logprobs", "from 0 to 5"),
        (COMPLETIONS, json!({"best_of": 3}), "best_of", "remove it"),
        // Texts and forms.
        (CHAT, json!({"stop": ["a", ""]}), "stop", "empty string"),
        (CHAT, json!({"stop": many(17)}), "stop", "may hold 16"),
        (CHAT, json!({"stop": "x".repeat(2000)}), "stop", "2000 bytes"),
        (CHAT, json!({"stop": 5}), "stop", "a number"),
        (CHAT, json!({"stream": "yes"}), "stream", "true or false"),
        (
            CHAT,
            json!({"stream_options": {"include_usage": true}}),
            "stream_options",
            "stream is true",
        ),
        (
            CHAT,
            json!({"stream": true, "stream_options": {"usage": true}}),
            "stream_options.usage",
            "not a field",
        ),
        (CHAT, json!({"messages": []}), "messages", "one message at least"),
        (CHAT, json!({"messages": "hi"}), "messages", "an array"),
        (CHAT, json!({"messages": null}), "messages", "missing"),
        (CHAT, json!({"messages": ["hi"]}), "messages[0]", "an object"),
        (
            CHAT,
            json!({"messages": [{"content": "x"}]}),
            "messages[0].role",
            "missing",
        ),
        (
            CHAT,
            json!({"messages": [{"role": "king", "content": "x"}]}),
            "messages[0].role",
            "must be one of",
        ),
        (
            CHAT,
            json!({"messages": [{"role": "user"}]}),
            "messages[0].content",
            "missing",
        ),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": 5}]}),
            "messages[0].content",
            "a number",
        ),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
            "messages[0].content[0].type",
            "text only",
        ),
        (
            CHAT,
            json!({"messages": [{"role": "user", "content": "x", "mood": "good"}]}),
            "messages[0].mood",
            "not a field",
        ),
        (COMPLETIONS, json!({"prompt": ""}), "prompt", "empty"),
        (COMPLETIONS, json!({"prompt": []}), "prompt", "empty"),
        (COMPLETIONS, json!({"prompt": [1, "a"]}), "prompt[0]", "a number"),
        (COMPLETIONS, json!({"prompt": [-1]}), "prompt[0]", "token"),
        (COMPLETIONS, json!({"prompt": ["a", ""]}), "prompt[1]", "empty"),
        (COMPLETIONS, json!({"prompt": many(65)}), "prompt", "may hold 64"),
        (COMPLETIONS, json!({"prompt": {"a": 1}}), "prompt", "an object"),
        (COMPLETIONS, json!({"suffix": "end"}), "suffix", "not carried out"),
        (EMBEDDINGS, json!({"input": ""}), "input", "empty"),
        (EMBEDDINGS, json!({"input": []}), "input", "empty"),
        (EMBEDDINGS, json!({"input": [[]]}), "input[0]", "an array"),
        (
            EMBEDDINGS,
            json!({"input": [1, 4_294_967_296_u64]}),
            "input[1]",
            "token",
        ),
        (EMBEDDINGS, json!({"input": many(2049)}), "input", "may hold 2048"),
        (EMBEDDINGS, json!({"dimensions": 64}), "dimensions", "its own"),
        (
            EMBEDDINGS,
            json!({"encoding_format": "hex"}),
            "encoding_format",
            "base64",
        ),
        (
            CHAT,
            json!({"response_format": {"type": "json_schema"}}),
            "response_format.json_schema",
            "missing",
        ),
        (
            CHAT,
            json!({"response_format": {"type": "xml"}}),
            "response_format.type",
            "json_object",
        ),
        // What this version does not do.
        (
            CHAT,
            json!({"response_format": "text"}),
            "response_format",
            "an object",
        ),
        (CHAT, json!({"tools": {"a": 1}}), "tools", "an array"),
        (
            CHAT,
            json!({"tools": [{"type": "function"}]}),
            "tools[0].function.name",
            "missing",
        ),
        (
            CHAT,
            json!({"tool_choice": "required"}),
            "tool_choice",
            "nothing to call",
        ),
        (
            CHAT,
            json!({"modalities": ["text", "audio"]}),
            "modalities",
            "text",
        ),
        (CHAT, json!({"audio": {"voice": "x"}}), "audio", "remove it"),
        (CHAT, json!({"functions": []}), "functions", "remove it"),
        // Names.
        (CHAT, json!({"model": null}), "model", "missing"),
        (CHAT, json!({"model": ""}), "model", "empty"),
        (CHAT, json!({"model": 4}), "model", "a string"),
        (CHAT, json!({"model": "m".repeat(600)}), "model", "600 bytes"),
        (CHAT, json!({"temprature": 1}), "temprature", "not a field"),
        (COMPLETIONS, json!({"messages": []}), "messages", "not a field"),
        (
            EMBEDDINGS,
            json!({"temperature": 1}),
            "temperature",
            "not a field",
        ),
    ];
    let (bus, worker) = Bus::start().await;
    for (path, extra, param, hint) in cases {
        let error = bus.post(path, &body(path, &extra)).await.error(400);
        assert_eq!(error.param.as_deref(), Some(param), "{extra}: {error:?}");
        assert!(error.message.contains(hint), "{extra}: {error:?}");
        assert_eq!(error.kind, "invalid_request_error");
    }
    assert_eq!(worker.calls(), []);
    assert!(worker.embed_calls().is_empty());
    worker.reply(answer(1, &["fine"], FinishReason::Stop));
    bus.post(CHAT, &body(CHAT, &json!({}))).await.ok();
}

#[tokio::test]
async fn bodies_that_are_no_json_object_are_refused() {
    let (bus, _worker) = Bus::start().await;
    let cases: [(&[u8], &str, Option<&str>); 8] = [
        (b"", "not valid JSON", Some("invalid_json")),
        (b"{\"model\": \"chat\",", "not valid JSON", Some("invalid_json")),
        (
            b"{\"temperature\": 1e999}",
            "not valid JSON",
            Some("invalid_json"),
        ),
        (b"{\"temperature\": NaN}", "not valid JSON", Some("invalid_json")),
        (b"{} {}", "not valid JSON", Some("invalid_json")),
        (
            b"{\"model\": \"\xff\xfe\"}",
            "not valid UTF-8 at byte 11",
            Some("invalid_utf8"),
        ),
        (b"[1]", "is an array and must be an object", None),
        (b"null", "is null and must be an object", None),
    ];
    for path in [CHAT, COMPLETIONS, EMBEDDINGS] {
        for (body, message, code) in cases {
            let answer = bus.call(Method::POST, path, &[JSON], body).await.whole().await;
            let error = answer.error(400);
            assert!(error.message.contains(message), "{error:?}");
            assert_eq!(error.code.as_deref(), code);
        }
    }
    let deep = format!(
        "{{\"messages\": {}1{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let answer = bus.call(Method::POST, CHAT, &[JSON], deep).await.whole().await;
    assert!(answer.error(400).message.contains("not valid JSON"));
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_and_the_next_is_served() {
    let (bus, worker) = Bus::with(|options| options.request_body_limit = 1000, Vec::new()).await;
    let large = body(
        CHAT,
        &json!({"messages": [{"role": "user", "content": "x".repeat(1_000_000)}]}),
    );
    let error = bus.post(CHAT, &large).await.error(413);
    assert!(error.message.contains("1000 bytes"), "{error:?}");
    assert_eq!(error.code.as_deref(), Some("request_too_large"));
    worker.reply(answer(1, &["fine"], FinishReason::Stop));
    bus.post(CHAT, &body(CHAT, &json!({}))).await.ok();
}

#[tokio::test]
async fn bodies_together_stay_within_their_memory() {
    let (bus, worker) = Bus::with(|options| options.body_memory_limit = 64 << 10, Vec::new()).await;
    let large = body(
        CHAT,
        &json!({"messages": [{"role": "user", "content": "x".repeat(50_000)}]}),
    );
    let live = worker.live();
    let request = async {
        let answer = bus.post(CHAT, &large).await;
        answer.ok();
    };
    let beside = async {
        crate::bus::eventually(|| worker.busy(), |busy| *busy == 1).await;
        bus.post(CHAT, &large).await.error(503);
        live.send(WorkerEvent::Started { prompt_tokens: 1 })
            .expect("listening");
        live.send(finished(1, 1, FinishReason::Stop)).expect("listening");
    };
    tokio::join!(request, beside);
    worker.reply(answer(1, &["fine"], FinishReason::Stop));
    bus.post(CHAT, &large).await.ok();
}

#[tokio::test]
async fn other_media_types_are_refused() {
    let (bus, worker) = Bus::start().await;
    let sound = body(CHAT, &json!({})).to_string();
    for headers in [
        &[][..],
        &[("content-type", "text/plain")],
        &[("content-type", "application/x-www-form-urlencoded")],
        &[("content-type", "application/jsonp")],
    ] {
        let answer = bus
            .call(Method::POST, CHAT, headers, sound.clone())
            .await
            .whole()
            .await;
        let error = answer.error(415);
        assert!(error.message.contains("application/json"), "{error:?}");
    }
    worker.reply(answer(1, &["fine"], FinishReason::Stop));
    let headers = [("content-type", "Application/JSON; charset=utf-8")];
    bus.call(Method::POST, CHAT, &headers, sound)
        .await
        .whole()
        .await
        .ok();
}

#[tokio::test]
async fn unknown_addresses_and_methods_have_openai_shape() {
    let (bus, _worker) = Bus::start().await;
    let error = bus.get("/v1/files").await.error(404);
    assert!(error.message.contains("GET /v1/files"), "{error:?}");
    let error = bus.get(CHAT).await.error(405);
    assert_eq!(error.code.as_deref(), Some("method_not_allowed"));
    let answer = bus
        .call(Method::DELETE, "/v1/models/chat", &[], "")
        .await
        .whole()
        .await;
    answer.error(405);
}

#[tokio::test]
async fn an_unknown_model_is_told_what_there_is() {
    let (bus, worker) = Bus::start().await;
    for path in [CHAT, COMPLETIONS, EMBEDDINGS] {
        let error = bus
            .post(path, &body(path, &json!({"model": "gpt-9"})))
            .await
            .error(404);
        assert_eq!(error.code.as_deref(), Some("model_not_found"));
        assert_eq!(error.param.as_deref(), Some("model"));
        assert!(error.message.contains("\"gpt-9\""), "{error:?}");
        assert!(error.message.contains("served here: chat"), "{error:?}");
    }
    assert_eq!(worker.calls(), []);
}

#[tokio::test]
async fn a_model_of_the_other_kind_names_the_right_address() {
    let (bus, worker) = Bus::start().await;
    let with_task = |task: &str| {
        let mut state = state(&worker);
        state.workers.get_mut(ASSIGNMENT).expect("the worker").task = task.to_owned();
        state
    };
    bus.gateway.apply(with_task("embed"));
    let error = bus.post(CHAT, &body(CHAT, &json!({}))).await.error(400);
    assert!(error.message.contains("/v1/embeddings"), "{error:?}");
    bus.gateway.apply(with_task("generate"));
    let error = bus
        .post(EMBEDDINGS, &body(EMBEDDINGS, &json!({})))
        .await
        .error(400);
    assert!(error.message.contains("/v1/chat/completions"), "{error:?}");
    assert_eq!(error.param.as_deref(), Some("model"));
}
