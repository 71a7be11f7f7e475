//! `/v1/chat/completions`: what reaches the worker, and what reaches the client.

use freehold_gateway::worker::{ConstraintInput, FinishReason, PromptInput, WorkerErrorKind, WorkerEvent};
use serde_json::{Value, json};

use crate::bus::Bus;
use crate::worker::{Reply, answer, finished, refusal, text, text_with_logprob};

const PATH: &str = "/v1/chat/completions";

fn question() -> Value {
    json!({"model": "chat", "messages": [{"role": "user", "content": "Where?"}]})
}

fn with(extra: &Value) -> Value {
    let mut body = question();
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

#[tokio::test]
async fn answers_whole_in_openai_shape() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(7, &["In ", "Paris", "."], FinishReason::Stop));
    let body = bus.post(PATH, &question()).await.ok();
    assert_eq!(body["object"], "chat.completion");
    assert!(body["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")));
    assert!(
        body["created"]
            .as_i64()
            .is_some_and(|created| created > 1_700_000_000)
    );
    assert_eq!(body["model"], "chat");
    assert_eq!(body["system_fingerprint"], "r1");
    assert_eq!(
        body["choices"],
        json!([{
            "index": 0,
            "message": {"role": "assistant", "content": "In Paris.", "refusal": null},
            "logprobs": null,
            "finish_reason": "stop",
        }])
    );
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10})
    );
}

#[tokio::test]
async fn streams_each_piece_and_ends_with_done() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(7, &["In ", "Paris"], FinishReason::Length));
    let call = bus.stream(PATH, &with(&json!({"stream": true}))).await;
    assert_eq!(call.status, 200);
    assert_eq!(call.headers["content-type"], "text/event-stream; charset=utf-8");
    let (chunks, done) = call.events().await;
    assert!(done);
    let deltas: Vec<_> = chunks
        .iter()
        .map(|chunk| chunk["choices"][0]["delta"].clone())
        .collect();
    assert_eq!(
        deltas,
        [
            json!({"role": "assistant", "content": "", "refusal": null}),
            json!({"content": "In "}),
            json!({"content": "Paris"}),
            json!({}),
        ]
    );
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["id"], chunks[0]["id"]);
        assert!(chunk.get("usage").is_none(), "nobody asked for it");
    }
    assert_eq!(chunks[3]["choices"][0]["finish_reason"], "length");
    assert_eq!(chunks[2]["choices"][0]["finish_reason"], Value::Null);
}

#[tokio::test]
async fn stream_with_usage_ends_with_a_chunk_of_it() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(7, &["a", "b"], FinishReason::Stop));
    let body = with(&json!({"stream": true, "stream_options": {"include_usage": true}}));
    let (chunks, done) = bus.stream(PATH, &body).await.events().await;
    assert!(done);
    let (last, before) = chunks.split_last().expect("chunks");
    assert_eq!(last["choices"], json!([]));
    assert_eq!(
        last["usage"],
        json!({"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9})
    );
    for chunk in before {
        assert_eq!(chunk["usage"], Value::Null);
        assert!(chunk.as_object().is_some_and(|chunk| chunk.contains_key("usage")));
    }
}

#[tokio::test]
async fn first_piece_arrives_before_the_answer_is_complete() {
    let (bus, worker) = Bus::start().await;
    let live = worker.live();
    live.send(WorkerEvent::Started { prompt_tokens: 1 })
        .expect("listening");
    let mut call = bus.stream(PATH, &with(&json!({"stream": true}))).await;
    call.event().await.expect("the role");
    live.send(text("first")).expect("listening");
    assert!(call.event().await.expect("a piece").contains("first"));
    live.send(text("second")).expect("listening");
    live.send(finished(1, 2, FinishReason::Stop)).expect("listening");
    let (chunks, done) = call.events().await;
    assert_eq!((chunks.len(), done), (2, true));
}

#[tokio::test]
async fn parameters_reach_the_worker() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(1, &["x"], FinishReason::Stop));
    let body = with(&json!({
        "max_completion_tokens": 5, "temperature": 0.5, "top_p": 0.25, "top_k": 40, "min_p": 0.125,
        "repetition_penalty": 1.5, "frequency_penalty": -2, "presence_penalty": 2, "seed": -1,
        "logit_bias": {"50256": -100}, "stop": ["\n", "END"], "logprobs": true, "top_logprobs": 3,
        "user": "someone", "metadata": {"a": "b"}, "store": false, "n": 1, "stream": false,
        "response_format": {"type": "text"}, "service_tier": "auto", "parallel_tool_calls": true,
    }));
    bus.post(PATH, &body).await.ok();
    let call = worker.only_call();
    assert_eq!(call.max_tokens, Some(5));
    assert_eq!(call.stop, ["\n", "END"]);
    assert!(!call.echo);
    let sampling = call.sampling;
    assert_eq!(sampling.temperature, Some(0.5));
    assert_eq!(sampling.top_p, Some(0.25));
    assert_eq!(sampling.top_k, Some(40));
    assert_eq!(sampling.min_p, Some(0.125));
    assert_eq!(sampling.repetition_penalty, Some(1.5));
    assert_eq!(sampling.frequency_penalty, Some(-2.0));
    assert_eq!(sampling.presence_penalty, Some(2.0));
    assert_eq!(sampling.seed, Some(u64::MAX));
    assert_eq!(sampling.logit_bias.get(&50256), Some(&-100.0));
    assert_eq!(sampling.logprobs, Some(3));
}

#[tokio::test]
async fn what_is_not_asked_for_is_left_to_the_engine() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(1, &["x"], FinishReason::Stop));
    bus.post(
        PATH,
        &with(&json!({"temperature": null, "stop": null, "tools": null})),
    )
    .await
    .ok();
    let call = worker.only_call();
    assert_eq!((call.max_tokens, call.max_context), (None, None));
    assert_eq!(call.sampling, freehold_gateway::worker::SamplingCall::default());
}

#[tokio::test]
async fn no_probability_mass_still_leaves_the_likeliest_token() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(1, &["x"], FinishReason::Stop));
    bus.post(PATH, &with(&json!({"top_p": 0}))).await.ok();
    assert_eq!(worker.only_call().sampling.top_p, Some(f32::EPSILON));
}

#[tokio::test]
async fn messages_are_made_ready_for_a_template() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(1, &["x"], FinishReason::Stop));
    let tools = json!([{"type": "function", "function": {"name": "look", "parameters": {}}}]);
    let body = json!({
        "model": "chat",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}], "name": "ann"},
            {"role": "assistant", "content": null, "refusal": null, "annotations": [],
             "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "nothing"},
        ],
        "tools": tools,
        "tool_choice": "auto",
    });
    bus.post(PATH, &body).await.ok();
    // Templates write JSON of arguments themselves, so they get the object.
    let expected = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?", "name": "ann"},
        {"role": "assistant", "content": "",
         "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": {}}}]},
        {"role": "tool", "content": "nothing", "tool_call_id": "c1"},
    ]);
    assert_eq!(
        worker.only_call().prompt,
        PromptInput::Chat {
            messages: expected,
            tools: Some(tools)
        }
    );
}

#[tokio::test]
async fn tools_are_left_out_where_the_client_chooses_none() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(1, &["x"], FinishReason::Stop));
    let tools = json!([{"type": "function", "function": {"name": "look"}}]);
    bus.post(PATH, &with(&json!({"tools": tools, "tool_choice": "none"})))
        .await
        .ok();
    assert!(matches!(
        worker.only_call().prompt,
        PromptInput::Chat { tools: None, .. }
    ));
}

#[tokio::test]
async fn several_answers_share_one_prompt_in_the_usage() {
    let (bus, worker) = Bus::start().await;
    for piece in ["one", "two", "three"] {
        worker.reply(answer(5, &[piece], FinishReason::Stop));
    }
    let body = bus.post(PATH, &with(&json!({"n": 3, "seed": 10}))).await.ok();
    let mut texts: Vec<_> = body["choices"]
        .as_array()
        .expect("choices")
        .iter()
        .enumerate()
        .map(|(index, choice)| {
            assert_eq!(choice["index"], index);
            choice["message"]["content"].as_str().expect("text").to_owned()
        })
        .collect();
    texts.sort();
    assert_eq!(texts, ["one", "three", "two"]);
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8})
    );
    let mut seeds: Vec<_> = worker.calls().iter().map(|call| call.sampling.seed).collect();
    seeds.sort();
    assert_eq!(
        seeds,
        [Some(10), Some(11), Some(12)],
        "equal seeds would give equal answers"
    );
}

#[tokio::test]
async fn several_answers_stream_side_by_side() {
    let (bus, worker) = Bus::start().await;
    for _ in 0..2 {
        worker.reply(answer(5, &["a", "b"], FinishReason::Stop));
    }
    let (chunks, done) = bus
        .stream(PATH, &with(&json!({"n": 2, "stream": true})))
        .await
        .events()
        .await;
    assert!(done);
    for index in 0..2 {
        let text: String = chunks
            .iter()
            .map(|chunk| &chunk["choices"][0])
            .filter(|choice| choice["index"] == index)
            .filter_map(|choice| choice["delta"]["content"].as_str())
            .collect();
        assert_eq!(text, "ab");
    }
}

#[tokio::test]
async fn a_full_queue_makes_siblings_wait_for_each_other() {
    let (bus, worker) = Bus::start().await;
    let live = worker.live();
    worker.reply(Reply::Refuse(refusal(WorkerErrorKind::QueueFull, "full")));
    let request = tokio::spawn(async move {
        let answer = bus.post(PATH, &with(&json!({"n": 2}))).await;
        (bus, answer)
    });
    crate::bus::eventually(|| worker.calls().len(), |calls| *calls == 2).await;
    worker.reply(answer(1, &["second"], FinishReason::Stop));
    live.send(WorkerEvent::Started { prompt_tokens: 1 })
        .expect("listening");
    live.send(text("first")).expect("listening");
    live.send(finished(1, 1, FinishReason::Stop)).expect("listening");
    let (_bus, answer) = request.await.expect("an answer");
    assert_eq!(answer.ok()["choices"].as_array().map(Vec::len), Some(2));
    assert_eq!(worker.calls().len(), 3);
}

#[tokio::test]
async fn logprobs_have_openai_shape() {
    let (bus, worker) = Bus::start().await;
    let events = || {
        Reply::Events(vec![
            WorkerEvent::Started { prompt_tokens: 1 },
            text_with_logprob("é", -0.5),
            finished(1, 1, FinishReason::Stop),
        ])
    };
    let expected = json!({
        "content": [{
            "token": "é",
            "bytes": [195, 169],
            "logprob": -0.5,
            "top_logprobs": [{"token": "other", "bytes": [111, 116, 104, 101, 114], "logprob": -3.5}],
        }],
        "refusal": null,
    });
    let asked = json!({"logprobs": true, "top_logprobs": 1});
    worker.reply(events());
    let whole = bus.post(PATH, &with(&asked)).await.ok();
    assert_eq!(whole["choices"][0]["logprobs"], expected);

    worker.reply(events());
    let mut asked = asked;
    asked["stream"] = json!(true);
    let (chunks, _) = bus.stream(PATH, &with(&asked)).await.events().await;
    assert_eq!(chunks[1]["choices"][0]["logprobs"], expected);
}

#[tokio::test]
async fn a_worker_that_fails_in_the_middle_ends_the_stream_with_an_error() {
    let (bus, worker) = Bus::start().await;
    worker.reply(Reply::Events(vec![
        WorkerEvent::Started { prompt_tokens: 1 },
        text("half"),
        WorkerEvent::Failed {
            message: "out of blocks".to_owned(),
        },
    ]));
    let (chunks, done) = bus
        .stream(PATH, &with(&json!({"stream": true})))
        .await
        .events()
        .await;
    assert!(!done);
    let error = &chunks.last().expect("a chunk")["error"];
    assert_eq!(error["message"], "out of blocks");
    assert_eq!(error["type"], "server_error");
}

#[tokio::test]
async fn a_worker_that_dies_in_the_middle_is_told_to_the_client() {
    let (bus, worker) = Bus::start().await;
    for _ in 0..2 {
        worker.reply(Reply::Events(vec![
            WorkerEvent::Started { prompt_tokens: 1 },
            text("half"),
        ]));
    }
    let error = bus.post(PATH, &question()).await.error(502);
    assert!(error.message.contains("worker ended"), "{error:?}");
    let (chunks, done) = bus
        .stream(PATH, &with(&json!({"stream": true})))
        .await
        .events()
        .await;
    assert!(!done);
    assert_eq!(chunks.last().expect("a chunk")["error"]["code"], "bad_gateway");
}

#[tokio::test]
async fn a_worker_that_breaks_the_protocol_is_not_believed() {
    let (bus, worker) = Bus::start().await;
    worker.reply(Reply::Bytes(b"{\"type\":\"started\",\"secret\":\"prompt\"\n"));
    let error = bus.post(PATH, &question()).await.error(502);
    assert!(!error.message.contains("secret"), "{error:?}");
}

#[tokio::test]
async fn refusals_of_the_worker_keep_their_kind() {
    let cases = [
        (WorkerErrorKind::QueueFull, 429, "queue_full", None),
        (
            WorkerErrorKind::PromptTooLong,
            400,
            "context_length_exceeded",
            Some("messages"),
        ),
        (WorkerErrorKind::InvalidRequest, 400, "invalid_value", None),
        (
            WorkerErrorKind::TemplateFailed,
            400,
            "invalid_value",
            Some("messages"),
        ),
        (
            WorkerErrorKind::Unsupported,
            400,
            "unsupported_model",
            Some("model"),
        ),
        (WorkerErrorKind::Stopping, 503, "worker_unavailable", None),
        (WorkerErrorKind::Internal, 500, "internal_error", None),
    ];
    let (bus, worker) = Bus::start().await;
    for (kind, status, code, param) in cases {
        for stream in [false, true] {
            worker.reply(Reply::Refuse(refusal(kind, "the reason")));
            let answer = bus.post(PATH, &with(&json!({"stream": stream}))).await;
            let error = answer.error(status);
            assert_eq!(error.message, "the reason");
            assert_eq!(error.code.as_deref(), Some(code));
            assert_eq!(error.param.as_deref(), param);
        }
    }
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_again() {
    let (bus, worker) = Bus::start().await;
    let mut full = refusal(WorkerErrorKind::QueueFull, "36 requests are running or waiting");
    full.retry_after_ms = Some(4200);
    worker.reply(Reply::Refuse(full));
    let answer = bus.post(PATH, &question()).await;
    answer.error(429);
    assert_eq!(answer.header("retry-after"), Some("5"));
}

#[tokio::test]
async fn a_field_that_the_worker_refuses_is_named_as_the_client_knows_it() {
    let (bus, worker) = Bus::start().await;
    let mut error = refusal(
        WorkerErrorKind::InvalidRequest,
        "token 999999 is not in the vocabulary",
    );
    error.field = Some("sampling.logit_bias".to_owned());
    worker.reply(Reply::Refuse(error));
    let error = bus.post(PATH, &question()).await.error(400);
    assert_eq!(error.param.as_deref(), Some("logit_bias"));
}

const CALL: &[&str] = &[
    "I look",
    ". <tool",
    "_call>{\"name\": \"look\", \"argu",
    "ments\": {\"at\": 1}}</tool_call>",
];

fn with_tools(more: &Value) -> Value {
    let mut body = with(more);
    body["tools"] = json!([{"type": "function", "function": {"name": "look",
        "parameters": {"type": "object", "properties": {"at": {"type": "integer"}}}}}]);
    body
}

#[tokio::test]
async fn tool_calls_are_found_whole_and_in_streams() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(1, CALL, FinishReason::Stop));
    let whole = bus.post(PATH, &with_tools(&json!({}))).await.ok();
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], "I look.");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(
        call["function"],
        json!({"name": "look", "arguments": "{\"at\":1}"})
    );
    assert!(call["id"].as_str().unwrap().starts_with("call_"));

    worker.reply(answer(1, CALL, FinishReason::Stop));
    let (chunks, done) = bus
        .stream(PATH, &with_tools(&json!({"stream": true})))
        .await
        .events()
        .await;
    assert!(done);
    let deltas: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
    let text: String = deltas
        .iter()
        .filter_map(|delta| delta["content"].as_str())
        .collect();
    assert_eq!(text, "I look.");
    let calls: Vec<&Value> = deltas
        .iter()
        .filter_map(|delta| delta["tool_calls"].get(0))
        .collect();
    assert_eq!(calls.len(), 1);
    assert_eq!(
        (&calls[0]["index"], &calls[0]["function"]["name"]),
        (&json!(0), &json!("look"))
    );
    assert_eq!(
        chunks.last().unwrap()["choices"][0]["finish_reason"],
        "tool_calls"
    );

    // Cut off in the middle, it is what it is: text.
    worker.reply(answer(1, &CALL[..2], FinishReason::Length));
    let whole = bus.post(PATH, &with_tools(&json!({}))).await.ok();
    assert_eq!(whole["choices"][0]["message"]["content"], "I look. <tool");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn what_an_answer_must_be_reaches_the_worker() {
    let (bus, worker) = Bus::start().await;
    let schema = json!({"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "null"}}});
    worker.reply(answer(1, &["{}"], FinishReason::Stop));
    let format =
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}});
    bus.post(PATH, &with(&format)).await.ok();
    let constraint = worker.only_call().constraint.unwrap();
    assert_eq!(
        constraint,
        ConstraintInput::JsonSchema {
            schema: schema.clone()
        }
    );
    // The order of properties is the order in which they are written.
    assert!(
        serde_json::to_string(&constraint)
            .unwrap()
            .contains(r#""b":{"type":"null"},"a""#)
    );

    let (bus, worker) = Bus::start().await;
    worker.reply(answer(
        1,
        &[r#"{"name": "look", "arguments": {"at": 5}}"#],
        FinishReason::Stop,
    ));
    let whole = bus
        .post(PATH, &with_tools(&json!({"tool_choice": "required"})))
        .await
        .ok();
    assert!(matches!(
        worker.only_call().constraint,
        Some(ConstraintInput::JsonSchema { .. })
    ));
    assert_eq!(whole["choices"][0]["message"]["content"], Value::Null);
    assert_eq!(
        whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"],
        "{\"at\":5}"
    );
}
