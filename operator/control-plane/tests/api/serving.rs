//! The port: its files, its address, its limits.

use std::os::unix::fs::PermissionsExt;

use freehold_control_plane::{ControlPlane, Options, Serve};
use serde_json::json;

use crate::support::{Served, crds, eventually, outcome, widget_yaml};

#[tokio::test]
async fn what_holds_secrets_is_for_its_owner_only() {
    let served = Served::start().await;
    for name in [
        "control-plane.redb",
        "kubeconfig",
        "token",
        "server.key",
        "server.crt",
        "ca.crt",
    ] {
        let mode = std::fs::metadata(served.folder.path().join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name} is {:o}", mode & 0o777);
    }
    served.server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubeconfig_stays_good_over_a_restart_on_the_same_port() {
    let Served {
        control_plane,
        server,
        folder,
    } = Served::start().await;
    let (address, kubeconfig) = (server.address(), server.kubeconfig().to_owned());
    let copy = folder.path().join("copy");
    std::fs::copy(&kubeconfig, &copy).unwrap();
    server.shutdown().await;
    drop(control_plane);
    let options = Options {
        data_dir: Some(folder.path().to_owned()),
        crds: crds(),
    };
    let control_plane = eventually("the store opens", || async {
        ControlPlane::open(options.clone()).ok()
    })
    .await;
    let server = control_plane.serve(address, folder.path()).await.unwrap();
    let served = Served {
        control_plane,
        server,
        folder,
    };
    let mut command = served.command(&["create", "-f", "-"]);
    command
        .env("KUBECONFIG", &copy)
        .stdin(std::process::Stdio::piped());
    outcome(command, &widget_yaml("w", &json!({"color": "red"})))
        .await
        .text();
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let served = Served::start().await;
    let address = served.server.address();
    let error = served
        .control_plane
        .serve(address, served.folder.path())
        .await
        .unwrap_err();
    assert!(
        matches!(error, Serve::Listen { .. }) && error.to_string().contains(&address.to_string()),
        "{error}"
    );
}

/// Clients that speak no TLS, or nothing, do not keep others out.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_at_the_port_disturb_nobody() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let served = Served::start().await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(
            tokio::net::TcpStream::connect(served.server.address())
                .await
                .unwrap(),
        );
    }
    let mut plain = tokio::net::TcpStream::connect(served.server.address())
        .await
        .unwrap();
    plain
        .write_all(b"GET /api HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!String::from_utf8_lossy(&answer).contains("200 OK"));
    served.kubectl(&["get", "widgets"]).await.text();
}
