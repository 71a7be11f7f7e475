//! The model store against a real HTTP server that behaves, breaks off, lies, and is not there.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use freehold_crds::conditions::reason;
use freehold_crds::model_deployment::ModelSource;
use freehold_node_agent::store::{FetchModel, FetchState, ModelStore, StoreOptions, StoredModel};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;

const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

fn model() -> Vec<u8> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
        .expect("HOME is set");
    let path = base.join("freehold/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    std::fs::read(&path).unwrap_or_else(|_| {
        panic!(
            "{} is not there: run ./tests/run, which fetches the test models",
            path.display()
        )
    })
}

/// Serves `body` with ranges; the first `breaks` answers end after half of what they promise.
async fn serve(body: Arc<Vec<u8>>, breaks: usize) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/model.gguf?secret=1", listener.local_addr().unwrap());
    let requests = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&requests);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (body, number) = (Arc::clone(&body), count.fetch_add(1, Ordering::SeqCst));
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap_or(b'\n'));
                }
                let head = String::from_utf8_lossy(&head).to_lowercase();
                let start = head
                    .split("range: bytes=")
                    .nth(1)
                    .and_then(|rest| rest.split('-').next()?.parse::<usize>().ok());
                let (start, status) = start.map_or((0, "200 OK".to_owned()), |start| {
                    (
                        start,
                        format!(
                            "206 Partial Content\r\ncontent-range: bytes {start}-{}/{}",
                            body.len() - 1,
                            body.len()
                        ),
                    )
                });
                let rest = &body[start.min(body.len())..];
                let sent = if number < breaks {
                    &rest[..rest.len() / 2]
                } else {
                    rest
                };
                let head = format!(
                    "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    rest.len()
                );
                let _ = stream.write_all(head.as_bytes()).await;
                let _ = stream.write_all(sent).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    (url, requests)
}

fn open(folder: &std::path::Path) -> ModelStore {
    ModelStore::open(folder.join("models"), StoreOptions::default()).unwrap()
}

fn source(url: &str, sha256: Option<&str>) -> ModelSource {
    ModelSource {
        url: Some(url.to_owned()),
        sha256: sha256.map(str::to_owned),
        ..ModelSource::default()
    }
}

async fn ensure(store: &ModelStore, source: &ModelSource) -> Result<StoredModel, FetchModel> {
    store
        .ensure(source, watch::channel(FetchState::default()).0)
        .await
}

fn files(store: &ModelStore) -> usize {
    ["blobs", "partial"]
        .iter()
        .map(|folder| std::fs::read_dir(store.directory().join(folder)).unwrap().count())
        .sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_transfer_is_kept_and_resumed_and_then_needs_no_network() {
    let (url, requests) = serve(Arc::new(model()), 1).await;
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let source = source(&url, Some(SHA256));
    let error = ensure(&store, &source).await.unwrap_err();
    assert!(
        !error.permanent() && error.reason() == reason::FETCH_FAILED,
        "{error}"
    );
    assert!(
        error.to_string().contains("bytes are kept") && !error.to_string().contains("secret"),
        "{error}"
    );
    let stored = ensure(&store, &source).await.unwrap();
    assert!(
        stored.facts.verified && stored.facts.summary.as_deref() == Some("llama 135M Q4_1"),
        "{:?}",
        stored.facts
    );
    assert_eq!(requests.load(Ordering::SeqCst), 2);
    // A store that is opened anew knows it still; what nothing wants stays while it is young.
    let store = open(folder.path());
    store.retain(&[]);
    ensure(&store, &source).await.unwrap();
    assert_eq!(requests.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_who_want_the_same_share_one_download() {
    let (url, requests) = serve(Arc::new(model()), 0).await;
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let source = source(&url, None);
    let (a, b, c) = tokio::join!(
        ensure(&store, &source),
        ensure(&store, &source),
        ensure(&store, &source)
    );
    assert!(a.is_ok() && b.is_ok() && c.is_ok());
    assert_eq!(requests.load(Ordering::SeqCst), 1);
    assert!(
        !a.unwrap().facts.verified,
        "nothing was promised, so nothing was verified"
    );
}

#[tokio::test]
async fn bytes_with_another_digest_are_thrown_away() {
    let (url, _) = serve(Arc::new(b"not what was promised".to_vec()), 0).await;
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let error = ensure(&store, &source(&url, Some(SHA256))).await.unwrap_err();
    assert!(
        error.permanent() && error.reason() == reason::DIGEST_MISMATCH,
        "{error}"
    );
    assert!(error.to_string().contains(SHA256), "{error}");
    assert_eq!(files(&store), 0, "nothing is kept");
}

#[tokio::test]
async fn what_is_no_model_is_told_so() {
    let (url, _) = serve(Arc::new(b"<html>sign in first</html>".to_vec()), 0).await;
    let folder = tempfile::tempdir().unwrap();
    let error = ensure(&open(folder.path()), &source(&url, None))
        .await
        .unwrap_err();
    assert!(
        error.permanent() && error.reason() == reason::INVALID_MODEL,
        "{error}"
    );
    assert!(
        error.to_string().contains("begins with the letters GGUF"),
        "{error}"
    );
}

#[tokio::test]
async fn nobody_there_is_tried_again_later() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/m.gguf", listener.local_addr().unwrap());
    drop(listener);
    let folder = tempfile::tempdir().unwrap();
    let error = ensure(&open(folder.path()), &source(&url, None))
        .await
        .unwrap_err();
    assert!(
        !error.permanent() && error.to_string().contains("refused"),
        "{error}"
    );
}

#[tokio::test]
async fn a_disk_without_room_is_found_before_the_download() {
    let (url, _) = serve(Arc::new(vec![0; 4096]), 0).await;
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions {
        reserve_bytes: u64::MAX / 2,
        ..StoreOptions::default()
    };
    let store = ModelStore::open(folder.path().join("models"), options).unwrap();
    let error = ensure(&store, &source(&url, None)).await.unwrap_err();
    assert!(
        error.reason() == reason::DISK_FULL && error.to_string().contains("4096 bytes"),
        "{error}"
    );
}

#[tokio::test]
async fn a_path_is_read_in_place_and_a_missing_one_named() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let file = folder.path().join("m.gguf");
    std::fs::write(&file, model()).unwrap();
    let at = |path: &std::path::Path, sha256: &str| ModelSource {
        path: Some(path.display().to_string()),
        sha256: Some(sha256.to_owned()),
        ..ModelSource::default()
    };
    assert_eq!(ensure(&store, &at(&file, SHA256)).await.unwrap().path, file);
    let wrong = ensure(&store, &at(&file, &"0".repeat(64))).await.unwrap_err();
    assert_eq!(wrong.reason(), reason::DIGEST_MISMATCH);
    let missing = ensure(&store, &at(&folder.path().join("none.gguf"), SHA256))
        .await
        .unwrap_err();
    assert!(
        missing.to_string().contains("none.gguf") && !missing.permanent(),
        "{missing}"
    );
    assert_eq!(files(&store), 0);
}
