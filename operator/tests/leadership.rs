//! Who leads, who stands by, and how an operator ends.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, its helpers too"
)]

mod common;

use common::{World, let_pass};
use k8s_openapi::api::coordination::v1::Lease;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

async fn scrape(operator: &common::Running, path: &str) -> String {
    let address = operator.operator.metrics_address().unwrap();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref()
}

#[tokio::test(start_paused = true)]
async fn of_two_candidates_one_works_and_the_other_takes_over_at_once_when_it_leaves() {
    let world = World::new();
    let _agent = world.agent("pi");
    let first = world.candidate("first").await;
    world
        .until(&world.leases(), "freehold-operator", "had a holder", |lease| {
            holder(lease) == Some("first")
        })
        .await;
    let second = world.candidate("second").await;
    world.deploy("chat").await;
    world.until_ready("chat").await;
    let_pass(120).await;
    assert_eq!(second.line.all_writes(), 0, "who stands by writes nothing");
    assert!(
        scrape(&first, "/metrics")
            .await
            .contains("freehold_operator_leader 1")
    );
    assert!(
        scrape(&second, "/metrics")
            .await
            .contains("freehold_operator_leader 0")
    );
    assert!(
        scrape(&second, "/readyz").await.starts_with("HTTP/1.1 200"),
        "standing by is being ready"
    );

    let since = Instant::now();
    first.stop().await;
    world
        .until(
            &world.leases(),
            "freehold-operator",
            "went to the second",
            |lease| holder(lease) == Some("second"),
        )
        .await;
    let taken = since.elapsed().as_secs();
    assert!(taken <= 3, "a Lease that was given back is taken after {taken} s");
    world.deploy("later").await;
    world.until_ready("later").await;
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_is_cut_off_stops_before_another_starts() {
    let world = World::new();
    let _agent = world.agent("pi");
    let first = world.candidate("first").await;
    world
        .until(&world.leases(), "freehold-operator", "had a holder", |lease| {
            holder(lease) == Some("first")
        })
        .await;
    let second = world.candidate("second").await;
    let_pass(30).await;
    first.line.cut(true);
    let since = Instant::now();
    while !scrape(&first, "/metrics")
        .await
        .contains("freehold_operator_leader 0")
    {
        let_pass(1).await;
        assert!(since.elapsed().as_secs() < 60, "the first never stopped");
    }
    let stopped = since.elapsed().as_secs();
    assert!(stopped <= 11, "it stops {stopped} s after its last renewal");
    assert!(
        scrape(&second, "/metrics")
            .await
            .contains("freehold_operator_leader 0"),
        "nobody leads yet"
    );
    world
        .until(
            &world.leases(),
            "freehold-operator",
            "went to the second",
            |lease| holder(lease) == Some("second"),
        )
        .await;
    let taken = since.elapsed().as_secs();
    assert!((10..=20).contains(&taken), "after {taken} s");
    world.deploy("chat").await;
    world.until_ready("chat").await;
    // Back on the line, the first one stands by.
    first.line.cut(false);
    let before = first.line.all_writes();
    let_pass(120).await;
    assert_eq!(first.line.all_writes(), before);
}

#[tokio::test(start_paused = true)]
async fn a_leader_whose_lease_is_taken_stops_at_its_next_renewal() {
    let world = World::new();
    let first = world.candidate("first").await;
    let mut lease = world
        .until(&world.leases(), "freehold-operator", "had a holder", |lease| {
            holder(lease) == Some("first")
        })
        .await;
    lease.spec.as_mut().unwrap().holder_identity = Some("thief".into());
    world
        .leases()
        .replace("freehold-operator", &kube::api::PostParams::default(), &lease)
        .await
        .unwrap();
    let_pass(6).await;
    assert!(
        scrape(&first, "/metrics")
            .await
            .contains("freehold_operator_leader 0")
    );
    // The thief never renews, so the Lease runs out and the first takes it again.
    world
        .until(&world.leases(), "freehold-operator", "went back", |lease| {
            holder(lease) == Some("first")
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn shutdown_is_prompt() {
    let world = World::new();
    let _agent = world.agent("pi");
    let operator = world.operator().await;
    world.deploy("chat").await;
    world.until_ready("chat").await;
    let (since, really) = (Instant::now(), std::time::Instant::now());
    operator.stop().await;
    assert!(since.elapsed().as_secs() < 2, "{:?}", since.elapsed());
    assert!(really.elapsed().as_secs() < 2, "{:?}", really.elapsed());
}

#[tokio::test(start_paused = true)]
async fn shutdown_is_prompt_without_an_api() {
    let world = World::new();
    let operator = world.operator().await;
    operator.line.cut(true);
    let_pass(60).await;
    let since = Instant::now();
    operator.stop().await;
    assert!(since.elapsed().as_secs() < 2, "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn metrics_and_probes_tell_how_it_goes() {
    let world = World::new();
    let cut = world.operator().await;
    let _agent = world.agent("pi");
    world.deploy("chat").await;
    world.until_ready("chat").await;
    assert!(scrape(&cut, "/healthz").await.ends_with("ok"));
    assert!(scrape(&cut, "/readyz").await.ends_with("ok"));
    let metrics = scrape(&cut, "/metrics").await;
    for expected in [
        "freehold_operator_objects{kind=\"ModelDeployment\"} 1",
        "freehold_operator_nodes{state=\"alive\"} 1",
        "freehold_operator_plan_breaches 0",
        "freehold_operator_leader 1",
        "freehold_operator_reconciles_total{kind=\"ModelDeployment\",outcome=\"ok\"}",
        "freehold_operator_reconcile_seconds_bucket",
    ] {
        assert!(metrics.contains(expected), "{expected} in {metrics}");
    }
}
