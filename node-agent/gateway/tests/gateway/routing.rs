//! Which worker, or which machine, takes a request.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use freehold_gateway::worker::{FinishReason, WorkerErrorKind, WorkerEvent};
use freehold_gateway::{ActivateModel, Activator, BusState, Gateway, NoActivation, WorkerEndpoint};
use futures::future::BoxFuture;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::bus::{ASSIGNMENT, Bus, NODE, access, backend, eventually, ready, route, state};
use crate::worker::{FakeWorker, Reply, answer, finished, refusal, text};

const PATH: &str = "/v1/chat/completions";

fn chat() -> Value {
    json!({"model": "chat", "messages": [{"role": "user", "content": "x"}]})
}

fn content(body: &Value) -> &str {
    body["choices"][0]["message"]["content"].as_str().expect("text")
}

#[tokio::test]
async fn before_the_first_state_the_gateway_says_what_it_waits_for() {
    let bus = Bus::bare(|_| {}, Arc::new(NoActivation)).await;
    assert_eq!(bus.get("/healthz").await.status, 200);
    let readyz = bus.get("/readyz").await;
    assert_eq!(readyz.status, 503);
    assert!(readyz.text().contains("waiting for the agent"));
    let answer = bus.post(PATH, &chat()).await;
    let error = answer.error(503);
    assert_eq!(error.code.as_deref(), Some("model_not_ready"));
    assert!(answer.header("retry-after").is_some());
    bus.gateway.apply(BusState::default());
    assert_eq!(bus.get("/readyz").await.status, 200);
    let error = bus.post(PATH, &chat()).await.error(404);
    assert!(error.message.contains("none is served here yet"), "{error:?}");
    // What it held is being loaded: no traffic is sent here yet, and who comes all the same is served.
    bus.gateway.apply(BusState {
        coming_back: true,
        ..BusState::default()
    });
    let readyz = bus.get("/readyz").await;
    assert_eq!(readyz.status, 503);
    assert!(readyz.text().contains("loading the models"));
    bus.post(PATH, &chat()).await.error(404);
}

#[tokio::test]
async fn a_model_on_its_way_says_how_far_it_is() {
    let (bus, worker) = Bus::start().await;
    let mut state = state(&worker);
    let endpoint = state.workers.get_mut(ASSIGNMENT).expect("the worker");
    endpoint.ready = false;
    endpoint.waiting_for = Some("fetching 41 % (38 of 92 MiB), 12 s left".to_owned());
    bus.gateway.apply(state.clone());
    let answer = bus.post(PATH, &chat()).await;
    let error = answer.error(503);
    assert!(error.message.contains("fetching 41 %"), "{error:?}");
    assert_eq!(answer.header("retry-after"), Some("2"));
    state.routes[0].backends.clear();
    bus.gateway.apply(state);
    let error = bus.post(PATH, &chat()).await.error(503);
    assert!(
        error.message.contains("no machine holds the model yet"),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_new_revision_takes_over_without_a_failed_request() {
    let (bus, old) = Bus::start().await;
    let new = bus.worker("new");
    let live = old.live();
    live.send(WorkerEvent::Started { prompt_tokens: 1 })
        .expect("listening");
    let mut body = chat();
    body["stream"] = json!(true);
    let mut running = bus.stream(PATH, &body).await;
    running.event().await.expect("the role");
    assert_eq!(bus.gateway.activity(ASSIGNMENT).in_flight, 1);

    // The name moves: new requests go to the new worker, the running one stays with the old.
    let mut state = state(&old);
    state.routes = vec![route(
        "chat",
        vec![
            backend(NODE, "team.chat.r2", None),
            backend(NODE, ASSIGNMENT, None),
        ],
    )];
    state.workers.insert("team.chat.r2".to_owned(), ready(&new));
    bus.gateway.apply(state);
    new.reply(answer(1, &["from the new"], FinishReason::Stop));
    let whole = bus.post(PATH, &chat()).await.ok();
    assert_eq!(content(&whole), "from the new");
    assert_eq!(whole["system_fingerprint"], "r2");

    live.send(text("from the old")).expect("listening");
    live.send(finished(1, 1, FinishReason::Stop)).expect("listening");
    let (chunks, done) = running.events().await;
    assert!(done);
    assert_eq!(chunks[0]["choices"][0]["delta"]["content"], "from the old");
    let activity = eventually(
        || bus.gateway.activity(ASSIGNMENT),
        |activity| activity.in_flight == 0,
    )
    .await;
    assert!(activity.last_request.is_some());
}

#[tokio::test]
async fn a_worker_on_its_way_out_hands_the_request_to_the_next() {
    let (bus, stopping) = Bus::start().await;
    let next = bus.worker("next");
    let mut state = state(&stopping);
    state.routes[0].backends.push(backend(NODE, "team.chat.r0", None));
    state.workers.insert("team.chat.r0".to_owned(), ready(&next));
    bus.gateway.apply(state);
    stopping.reply(Reply::Refuse(refusal(WorkerErrorKind::Stopping, "going")));
    next.reply(answer(1, &["taken"], FinishReason::Stop));
    let whole = bus.post(PATH, &chat()).await.ok();
    assert_eq!(content(&whole), "taken");
    assert_eq!(whole["system_fingerprint"], "r0");
    assert_eq!(stopping.calls().len(), 1);
}

#[tokio::test]
async fn a_full_worker_hands_the_request_to_another_replica() {
    let (near, far, worker) = two_machines().await;
    let full = near.worker("full");
    let address = format!("http://{}", far.address);
    let mut state = state(&full);
    state.routes[0]
        .backends
        .push(backend("far", ASSIGNMENT, Some(address)));
    near.gateway.apply(state);
    full.reply(Reply::Refuse(refusal(WorkerErrorKind::QueueFull, "full")));
    worker.reply(answer(1, &["there is room"], FinishReason::Stop));
    assert_eq!(content(&near.post(PATH, &chat()).await.ok()), "there is room");
    assert_eq!((full.calls().len(), worker.calls().len()), (1, 1));
}

#[tokio::test]
async fn a_worker_that_is_gone_is_told_as_restarting() {
    let (bus, worker) = Bus::start().await;
    let socket = worker.socket.clone();
    drop(worker);
    std::fs::remove_file(socket).expect("the socket");
    let answer = bus.post(PATH, &chat()).await;
    let error = answer.error(503);
    assert_eq!(error.code.as_deref(), Some("worker_unavailable"));
    assert!(answer.header("retry-after").is_some());
}

/// Wakes a model when the test lets it.
struct Alarm {
    gateway: Mutex<Option<Gateway>>,
    awake: Mutex<Option<BusState>>,
    calls: AtomicUsize,
    let_go: Arc<Semaphore>,
    fail: bool,
}

impl Alarm {
    fn new(fail: bool) -> Arc<Self> {
        Arc::new(Self {
            gateway: Mutex::default(),
            awake: Mutex::default(),
            calls: AtomicUsize::new(0),
            let_go: Arc::new(Semaphore::new(0)),
            fail,
        })
    }
}

impl Activator for Alarm {
    fn activate(&self, assignment: &str) -> BoxFuture<'static, Result<(), ActivateModel>> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let gateway = self.gateway.lock().expect("not poisoned").clone();
        let awake = self.awake.lock().expect("not poisoned").clone();
        let (let_go, fail, assignment) = (Arc::clone(&self.let_go), self.fail, assignment.to_owned());
        Box::pin(async move {
            let _permit = let_go.acquire_owned().await;
            if fail {
                return Err(ActivateModel {
                    assignment,
                    reason: "needs 400 MiB and 100 MiB are free".to_owned(),
                });
            }
            if let (Some(gateway), Some(awake)) = (gateway, awake) {
                gateway.apply(awake);
            }
            Ok(())
        })
    }
}

/// A bus whose worker sleeps until the alarm is let go.
async fn sleeping(alarm: &Arc<Alarm>, limit: Duration) -> (Bus, FakeWorker) {
    let bus = Bus::bare(
        |options| options.activation_limit = limit,
        Arc::clone(alarm) as Arc<dyn Activator>,
    )
    .await;
    let worker = bus.worker("chat");
    let mut asleep = state(&worker);
    asleep.workers.insert(
        ASSIGNMENT.to_owned(),
        WorkerEndpoint {
            ready: false,
            idle: true,
            ..ready(&worker)
        },
    );
    bus.gateway.apply(asleep);
    *alarm.gateway.lock().expect("not poisoned") = Some(bus.gateway.clone());
    *alarm.awake.lock().expect("not poisoned") = Some(state(&worker));
    (bus, worker)
}

#[tokio::test]
async fn the_first_request_wakes_a_sleeping_model_and_waits() {
    let alarm = Alarm::new(false);
    let (bus, worker) = sleeping(&alarm, Duration::from_secs(30)).await;
    worker.reply(answer(1, &["awake"], FinishReason::Stop));
    let let_go = async {
        eventually(
            || bus.gateway.activity(ASSIGNMENT).in_flight,
            |waiting| *waiting == 1,
        )
        .await;
        alarm.let_go.add_permits(1);
    };
    let request = chat();
    let (whole, ()) = tokio::join!(bus.post(PATH, &request), let_go);
    assert_eq!(content(&whole.ok()), "awake");
    assert_eq!(alarm.calls.load(Ordering::SeqCst), 1);
    assert_eq!(bus.gateway.activity(ASSIGNMENT).in_flight, 0);
}

#[tokio::test]
async fn a_model_that_does_not_wake_in_time_gives_503() {
    let alarm = Alarm::new(false);
    let (bus, worker) = sleeping(&alarm, Duration::from_millis(50)).await;
    let answer = bus.post(PATH, &chat()).await;
    let error = answer.error(503);
    assert!(error.message.contains("being loaded"), "{error:?}");
    assert!(answer.header("retry-after").is_some());
    assert_eq!(worker.calls(), []);
}

#[tokio::test]
async fn a_model_that_cannot_wake_says_why() {
    let alarm = Alarm::new(true);
    alarm.let_go.add_permits(1);
    let (bus, _worker) = sleeping(&alarm, Duration::from_secs(30)).await;
    let error = bus.post(PATH, &chat()).await.error(503);
    assert!(error.message.contains("needs 400 MiB"), "{error:?}");
}

/// Two machines: `near` knows that `far` holds the model.
async fn two_machines() -> (Bus, Bus, FakeWorker) {
    let far = Bus::bare(|options| options.node = "far".to_owned(), Arc::new(NoActivation)).await;
    let worker = far.worker("chat");
    far.gateway.apply(BusState {
        routes: vec![route("chat", vec![backend("far", ASSIGNMENT, None)])],
        workers: state(&worker).workers,
        ..BusState::default()
    });
    let near = Bus::bare(|_| {}, Arc::new(NoActivation)).await;
    let address = format!("http://{}", far.address);
    near.gateway.apply(BusState {
        routes: vec![route("chat", vec![backend("far", ASSIGNMENT, Some(address))])],
        ..BusState::default()
    });
    (near, far, worker)
}

#[tokio::test]
async fn a_model_on_another_machine_answers_through_its_gateway() {
    let (near, _far, worker) = two_machines().await;
    worker.reply(answer(1, &["from ", "far"], FinishReason::Stop));
    let answer_whole = near.post(PATH, &chat()).await;
    assert_eq!(content(&answer_whole.ok()), "from far");

    let live = worker.live();
    live.send(WorkerEvent::Started { prompt_tokens: 1 })
        .expect("listening");
    let mut body = chat();
    body["stream"] = json!(true);
    let mut call = near.stream(PATH, &body).await;
    assert_eq!(call.headers["content-type"], "text/event-stream; charset=utf-8");
    call.event().await.expect("the role");
    live.send(text("piece")).expect("listening");
    assert!(
        call.event()
            .await
            .expect("a piece before the end")
            .contains("piece")
    );
    drop(call);
    eventually(|| worker.cancelled(), |cancelled| *cancelled == 1).await;
}

#[tokio::test]
async fn the_other_machine_sees_the_key_and_the_request_id_and_answers_for_itself() {
    let (near, far, worker) = two_machines().await;
    far.gateway.apply(BusState {
        routes: vec![route("chat", vec![backend("far", ASSIGNMENT, None)])],
        policies: vec![access(&[("ann", "key-of-ann", &[])])],
        workers: state(&worker).workers,
        ..BusState::default()
    });
    let error = near.post(PATH, &chat()).await.error(401);
    assert_eq!(error.code.as_deref(), Some("invalid_api_key"));
    worker.reply(answer(1, &["fine"], FinishReason::Stop));
    let headers = [
        ("content-type", "application/json"),
        ("authorization", "Bearer key-of-ann"),
        ("x-request-id", "trace-7"),
    ];
    let call = near
        .call(http::Method::POST, PATH, &headers, chat().to_string())
        .await;
    let answer = call.whole().await;
    answer.ok();
    assert_eq!(answer.header("x-request-id"), Some("trace-7"));
    assert_eq!(worker.only_call().request_id, "trace-7-0");
}

#[tokio::test]
async fn a_request_is_passed_on_once() {
    let (near, far, worker) = two_machines().await;
    // Each machine believes that the other holds the model.
    let address = format!("http://{}", near.address);
    far.gateway.apply(BusState {
        routes: vec![route("chat", vec![backend(NODE, ASSIGNMENT, Some(address))])],
        ..BusState::default()
    });
    let error = near.post(PATH, &chat()).await.error(503);
    assert!(error.message.contains("far, cannot answer now"), "{error:?}");
    assert_eq!(worker.calls(), []);
}

#[tokio::test]
async fn a_machine_that_is_gone_is_passed_over() {
    let (near, far, worker) = two_machines().await;
    let gone = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        format!("http://{}", listener.local_addr().expect("an address"))
    };
    let backends = vec![
        backend("gone", "team.chat.r9", Some(gone.clone())),
        backend("far", ASSIGNMENT, Some(format!("http://{}", far.address))),
    ];
    near.gateway.apply(BusState {
        routes: vec![route("chat", backends)],
        ..BusState::default()
    });
    worker.reply(answer(1, &["still here"], FinishReason::Stop));
    assert_eq!(content(&near.post(PATH, &chat()).await.ok()), "still here");

    near.gateway.apply(BusState {
        routes: vec![route("chat", vec![backend("gone", "team.chat.r9", Some(gone))])],
        ..BusState::default()
    });
    let error = near.post(PATH, &chat()).await.error(503);
    assert!(error.message.contains("gone, cannot answer now"), "{error:?}");
}
