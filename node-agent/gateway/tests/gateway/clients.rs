//! Clients that leave, stall, dawdle or come at the wrong moment.

use std::time::Duration;

use freehold_gateway::worker::{FinishReason, WorkerEvent};
use http::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::bus::{ASSIGNMENT, Bus, PATIENCE, eventually};
use crate::worker::{Reply, answer, finished, text};

const PATH: &str = "/v1/chat/completions";

fn chat(stream: bool) -> Value {
    json!({"model": "chat", "messages": [{"role": "user", "content": "x"}], "stream": stream})
}

fn raw_request(body: &str) -> String {
    format!(
        "POST {PATH} HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_frees_its_slot() {
    let (bus, worker) = Bus::start().await;
    let live = worker.live();
    live.send(WorkerEvent::Started { prompt_tokens: 1 })
        .expect("listening");
    let mut call = bus.stream(PATH, &chat(true)).await;
    call.event().await.expect("the role");
    assert_eq!((worker.busy(), worker.cancelled()), (1, 0));
    drop(call);
    eventually(|| worker.cancelled(), |cancelled| *cancelled == 1).await;
    assert_eq!(worker.busy(), 0);
    eventually(|| bus.gateway.activity(ASSIGNMENT).in_flight, |left| *left == 0).await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_frees_its_slot() {
    let (bus, worker) = Bus::start().await;
    let live = worker.live();
    let mut stream = TcpStream::connect(bus.address).await.expect("a connection");
    let request = raw_request(&chat(false).to_string());
    stream.write_all(request.as_bytes()).await.expect("sent");
    eventually(|| worker.busy(), |busy| *busy == 1).await;
    drop(stream);
    eventually(|| worker.cancelled(), |cancelled| *cancelled == 1).await;
    drop(live);
}

#[tokio::test]
async fn a_client_that_leaves_several_answers_frees_all_their_slots() {
    let (bus, worker) = Bus::start().await;
    let lives: Vec<_> = (0..3).map(|_| worker.live()).collect();
    for live in &lives {
        live.send(WorkerEvent::Started { prompt_tokens: 1 })
            .expect("listening");
    }
    let mut body = chat(true);
    body["n"] = json!(3);
    let call = bus.stream(PATH, &body).await;
    eventually(|| worker.busy(), |busy| *busy == 3).await;
    drop(call);
    eventually(|| worker.cancelled(), |cancelled| *cancelled == 3).await;
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_cut_off_and_disturbs_nobody() {
    let limit = Duration::from_millis(300);
    let (bus, worker) = Bus::with(|options| options.write_stall_limit = limit, Vec::new()).await;
    worker.reply(Reply::Endless(text(&"x".repeat(1000))));
    // The head is read and then nothing more, for as long as the connection lives.
    let stalled = bus.stream(PATH, &chat(true)).await;
    assert_eq!(stalled.status, 200);
    worker.reply(answer(1, &["fine"], FinishReason::Stop));
    bus.post(PATH, &chat(false)).await.ok();
    eventually(|| worker.cancelled(), |cancelled| *cancelled == 1).await;
    let closed = eventually_closed(&bus).await;
    let stalled_lines = closed.iter().filter(|line| line["code"] == 499).count();
    assert_eq!(stalled_lines, 1, "{closed:?}");
    drop(stalled);
}

/// The ends of both requests in the audit log.
async fn eventually_closed(bus: &Bus) -> Vec<Value> {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let closed: Vec<_> = bus
            .audit()
            .await
            .into_iter()
            .filter(|line| line["event"] == "closed")
            .collect();
        if closed.len() == 2 {
            return closed;
        }
        assert!(std::time::Instant::now() < deadline, "{closed:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_slow_but_steady_reader_gets_everything() {
    let limit = Duration::from_secs(5);
    let (bus, worker) = Bus::with(|options| options.write_stall_limit = limit, Vec::new()).await;
    let pieces = vec!["x"; 5000];
    worker.reply(answer(1, &pieces, FinishReason::Stop));
    let (chunks, done) = bus.stream(PATH, &chat(true)).await.events().await;
    assert!(done);
    assert_eq!(chunks.len(), 5002);
}

#[tokio::test]
async fn a_head_that_never_ends_is_cut_off() {
    let limit = Duration::from_millis(100);
    let (bus, _worker) = Bus::with(|options| options.header_read_limit = limit, Vec::new()).await;
    let mut stream = TcpStream::connect(bus.address).await.expect("a connection");
    stream
        .write_all(b"POST /v1/models HTTP/1.1\r\nhost: h")
        .await
        .expect("sent");
    let mut rest = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
    // Closed, with or without a word.
    read.expect("cut off in time").ok();
    assert_eq!(bus.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn a_body_that_never_ends_gets_408() {
    let limit = Duration::from_millis(100);
    let (bus, worker) = Bus::with(|options| options.body_read_limit = limit, Vec::new()).await;
    let mut stream = TcpStream::connect(bus.address).await.expect("a connection");
    let request = raw_request(&chat(false).to_string());
    let (part, _) = request.split_at(request.len() - 5);
    stream.write_all(part.as_bytes()).await.expect("sent");
    let mut reply = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut reply)).await;
    read.expect("answered in time").expect("read");
    let reply = String::from_utf8(reply).expect("UTF-8");
    assert!(reply.starts_with("HTTP/1.1 408"), "{reply}");
    assert!(reply.contains("request_timeout"), "{reply}");
    assert_eq!(worker.calls(), []);
}

#[tokio::test]
async fn request_ids_are_kept_or_made() {
    let (bus, worker) = Bus::start().await;
    worker.reply(answer(1, &["fine"], FinishReason::Stop));
    let json = ("content-type", "application/json");
    let kept = bus
        .call(
            Method::POST,
            PATH,
            &[json, ("x-request-id", "my-id_1.2:3/4")],
            chat(false).to_string(),
        )
        .await;
    assert_eq!(kept.headers["x-request-id"], "my-id_1.2:3/4");
    assert_eq!(worker.only_call().request_id, "my-id_1.2:3/4-0");

    let long = "x".repeat(129);
    for bad in ["", "two words", "semi;colon", long.as_str()] {
        let answer = bus
            .call(Method::GET, "/v1/models", &[("x-request-id", bad)], "")
            .await;
        let made = answer.headers["x-request-id"].to_str().expect("text");
        assert!(made.starts_with("req-") && made.len() == 36, "{made}");
    }
    let error = bus.get("/nowhere").await;
    assert!(error.header("x-request-id").is_some(), "errors have one too");
}

#[tokio::test]
async fn at_the_end_requests_in_flight_finish_and_new_ones_are_not_taken() {
    let (bus, worker) = Bus::start().await;
    let live = worker.live();
    live.send(WorkerEvent::Started { prompt_tokens: 1 })
        .expect("listening");
    let mut call = bus.stream(PATH, &chat(true)).await;
    call.event().await.expect("the role");
    let address = bus.address;
    let stopping = tokio::spawn(bus.stop());
    let deadline = std::time::Instant::now() + PATIENCE;
    while TcpStream::connect(address).await.is_ok() {
        assert!(std::time::Instant::now() < deadline, "still listening");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    live.send(text("the rest")).expect("listening");
    live.send(finished(1, 1, FinishReason::Stop)).expect("listening");
    let (chunks, done) = call.events().await;
    assert!(done);
    assert_eq!(chunks[0]["choices"][0]["delta"]["content"], "the rest");
    let folder = stopping.await.expect("stops");
    let lines = crate::bus::read_audit(&folder.path().join("audit"));
    assert_eq!(lines.last().expect("a line")["code"], 200);
}

/// One answer on a connection that may stay open.
async fn read_answer(stream: &mut TcpStream) -> String {
    let mut seen = Vec::new();
    while !seen.ends_with(b"}}") {
        let mut buffer = [0; 4096];
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut buffer));
        let count = read.await.expect("in time").expect("read");
        assert_ne!(count, 0, "{}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8(seen).expect("text")
}

/// A client that keeps its connection, and one that has just made it, cannot know that the end has begun.
#[tokio::test]
async fn at_the_end_a_request_on_a_connection_that_is_there_is_answered_and_told_to_be_the_last() {
    let (bus, worker) = Bus::with(|options| options.linger_limit = PATIENCE, Vec::new()).await;
    let request = raw_request(&chat(false).to_string());
    let mut kept = TcpStream::connect(bus.address).await.expect("a connection");
    worker.reply(answer(1, &["fine"], FinishReason::Stop));
    kept.write_all(request.as_bytes()).await.expect("sent");
    let first = read_answer(&mut kept).await;
    assert!(!first.to_lowercase().contains("connection: close"), "{first}");
    let mut fresh = TcpStream::connect(bus.address).await.expect("a connection");
    eventually(|| bus.gateway.metrics(), |text| text.contains("connections 2")).await;

    let address = bus.address;
    let stopping = tokio::spawn(bus.stop());
    let deadline = std::time::Instant::now() + PATIENCE;
    while TcpStream::connect(address).await.is_ok() {
        assert!(std::time::Instant::now() < deadline, "still listening");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    for stream in [&mut kept, &mut fresh] {
        worker.reply(answer(1, &["fine"], FinishReason::Stop));
        stream.write_all(request.as_bytes()).await.expect("sent");
        let last = read_answer(stream).await;
        assert!(last.starts_with("HTTP/1.1 200"), "{last}");
        assert!(last.to_lowercase().contains("connection: close"), "{last}");
        let end = tokio::time::timeout(PATIENCE, stream.read(&mut [0; 1])).await;
        assert_eq!(end.expect("in time").expect("an end"), 0);
    }
    stopping.await.expect("stops");
}

#[tokio::test]
async fn at_the_end_an_idle_connection_is_kept_no_longer_than_its_limit() {
    let limit = Duration::from_millis(20);
    let (bus, _worker) = Bus::with(|options| options.linger_limit = limit, Vec::new()).await;
    let mut idle = TcpStream::connect(bus.address).await.expect("a connection");
    eventually(|| bus.gateway.metrics(), |text| text.contains("connections 1")).await;
    bus.stop().await;
    let end = tokio::time::timeout(PATIENCE, idle.read(&mut [0; 1])).await;
    assert_eq!(end.expect("in time").expect("an end"), 0);
}

#[tokio::test]
async fn at_the_end_a_request_that_never_finishes_is_given_up() {
    let limit = Duration::from_millis(100);
    let (bus, worker) = Bus::with(|options| options.drain_limit = limit, Vec::new()).await;
    let live = worker.live();
    live.send(WorkerEvent::Started { prompt_tokens: 1 })
        .expect("listening");
    let mut call = bus.stream(PATH, &chat(true)).await;
    call.event().await.expect("the role");
    bus.stop().await;
    eventually(|| worker.cancelled(), |cancelled| *cancelled == 1).await;
    drop(live);
}

#[tokio::test]
async fn one_connection_serves_many_requests() {
    let (bus, worker) = Bus::start().await;
    let mut stream = TcpStream::connect(bus.address).await.expect("a connection");
    for _ in 0..3 {
        worker.reply(answer(1, &["fine"], FinishReason::Stop));
        let request = raw_request(&chat(false).to_string());
        stream.write_all(request.as_bytes()).await.expect("sent");
        let seen = read_answer(&mut stream).await;
        assert!(seen.starts_with("HTTP/1.1 200"));
    }
}
