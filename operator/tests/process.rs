//! The binary, as a cluster runs it: over TLS with a kubeconfig, stopped by SIGTERM.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, its helpers too"
)]

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::World;

fn operator(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_freehold-operator"));
    command
        .args(["--metrics-listen", "127.0.0.1:0"])
        .args(arguments)
        .env_clear()
        .stderr(Stdio::piped());
    command
}

/// Ends with the test, whatever happens in it.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks a process to end; returns how it did, or None when it did not within 10 s.
async fn terminate(process: &mut Killed) -> Option<ExitStatus> {
    let signalled = Command::new("kill")
        .arg(process.0.id().to_string())
        .status()
        .unwrap();
    assert!(signalled.success());
    let asked = Instant::now();
    while asked.elapsed() < Duration::from_secs(10) {
        if let Some(status) = process.0.try_wait().unwrap() {
            return Some(status);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    None
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_binary_works_over_tls_and_ends_cleanly() {
    let world = World::new();
    let folder = tempfile::tempdir().unwrap();
    let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let server = world.control_plane.serve(anywhere, folder.path()).await.unwrap();
    let _agent = world.agent("pi");
    let process = operator(&["--leader-elect", "--identity", "binary", "--log-format", "json"])
        .env("KUBECONFIG", server.kubeconfig())
        .spawn()
        .unwrap();
    let mut process = Killed(process);
    world.deploy("chat").await;
    world.until_ready("chat").await;
    let applied = Instant::now();
    world.deploy("second").await;
    world.until_ready("second").await;
    let took = applied.elapsed();
    eprintln!("apply to Ready, with an agent that is ready at once: {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    let lease = world.leases().get("freehold-operator").await.unwrap();
    let holder = lease.spec.unwrap().holder_identity.unwrap();
    assert!(holder.starts_with("binary-"), "{holder}");
    let asked = Instant::now();
    let status = terminate(&mut process).await;
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    let lease = world.leases().get("freehold-operator").await.unwrap();
    assert_eq!(
        lease.spec.unwrap().holder_identity,
        None,
        "the Lease is given back"
    );
    server.shutdown().await;
}

#[test]
fn without_an_api_the_binary_says_what_to_set() {
    let output = operator(&[])
        .env("KUBECONFIG", "/nowhere/kubeconfig")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("KUBECONFIG"), "{said}");
}

/// Answers each connection with the next of these, and the last one for good; returns its port.
fn says(answers: &'static [&'static str]) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for (at, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            let mut request = [0; 1024];
            let read = stream.read(&mut request).unwrap();
            assert!(request[..read].starts_with(b"GET /readyz HTTP/1.1\r\n"));
            stream
                .write_all(answers[at.min(answers.len() - 1)].as_bytes())
                .unwrap();
        }
    });
    port
}

const WELL: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const UNWELL: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 7\r\n\r\nwaiting";

fn check(seconds: &str, ports: &[u16]) -> (Option<i32>, String) {
    let addresses = ports.iter().map(|port| format!("http://127.0.0.1:{port}/readyz"));
    let mut command = operator(&["check", "--seconds", seconds]);
    let output = command.args(addresses).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), said)
}

#[test]
fn check_waits_until_every_address_answers_well() {
    let (code, said) = check("60", &[says(&[WELL]), says(&[UNWELL, WELL])]);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn check_names_the_address_that_is_not_well_and_what_it_says() {
    let unwell = says(&[UNWELL]);
    let (code, said) = check("0", &[says(&[WELL]), unwell]);
    assert_eq!(code, Some(1), "{said}");
    let found =
        format!("http://127.0.0.1:{unwell}/readyz is not well: it answers 503 Service Unavailable: waiting");
    assert!(said.contains(&found), "{said}");

    // Bound, given back, and so nobody's.
    let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = nobody.local_addr().unwrap().port();
    drop(nobody);
    let (code, said) = check("0", &[port]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("failed to connect: "), "{said}");
}
