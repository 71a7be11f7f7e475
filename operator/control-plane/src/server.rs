//! Serving on localhost: TLS, a bearer token, and the kubeconfig that holds both.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::error::ApiError;
use crate::http::{Api, User, error_response};

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Serve {
    /// The port is taken, or the address is not this machine's.
    #[error("failed to listen on {address}; choose another address (--api-listen)")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Certificates could not be made or read.
    #[error("failed to set up TLS: {detail}; remove {folder:?} to have certificates made anew")]
    SetUpTls {
        /// Where they lie.
        folder: PathBuf,
        /// What the library said.
        detail: String,
    },
    /// A file could not be written.
    #[error("failed to write {path:?}")]
    WriteFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// The API on a port.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    kubeconfig: PathBuf,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

/// Requests under way get this long to end at shutdown.
const DRAIN: Duration = Duration::from_secs(5);
/// A connection that does not finish its handshake in this time is closed.
const HANDSHAKE: Duration = Duration::from_secs(10);

impl Server {
    /// Where the API listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The kubeconfig for it, readable by its owner only.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Stops listening, ends the watches and waits for requests under way.
    pub async fn shutdown(self) {
        self.shutdown.cancel();
        let _ = self.task.await;
    }
}

/// Serves `api` on `address`, keeping certificates, token and kubeconfig in `folder`.
pub(crate) async fn serve(api: Api, address: SocketAddr, folder: &Path) -> Result<Server, Serve> {
    fs::create_dir_all(folder).map_err(|source| Serve::WriteFile {
        path: folder.to_owned(),
        source,
    })?;
    let token = token(folder)?;
    let (acceptor, authority) = tls(folder)?;
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| Serve::Listen { address, source })?;
    let address = listener
        .local_addr()
        .map_err(|source| Serve::Listen { address, source })?;
    let kubeconfig = folder.join("kubeconfig");
    write_private(
        &kubeconfig,
        kubeconfig_text(address, &authority, &token).as_bytes(),
    )?;
    let shutdown = CancellationToken::new();
    let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
    let task = tokio::spawn(accept(listener, acceptor, api, digest, shutdown.clone()));
    info!(%address, kubeconfig = %kubeconfig.display(), "Serving the API");
    Ok(Server {
        address,
        kubeconfig,
        shutdown,
        task,
    })
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    api: Api,
    token_digest: [u8; 32],
    shutdown: CancellationToken,
) {
    let graceful = GracefulShutdown::new();
    let api = Api {
        shutdown: shutdown.child_token(),
        ..api
    };
    loop {
        // Both arms can be dropped while they wait without losing a connection.
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, most often: wait for some to come back.
                    debug!(%error, "Failed to accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = shutdown.cancelled() => break,
        };
        let (acceptor, api, watcher) = (acceptor.clone(), api.clone(), graceful.watcher());
        tokio::spawn(async move {
            let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await else {
                return;
            };
            let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let api = api.clone();
                async move { Ok::<_, std::convert::Infallible>(authenticated(&api, request, &token_digest).await) }
            });
            let mut builder = auto::Builder::new(TokioExecutor::new());
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(HANDSHAKE);
            let connection = builder
                .serve_connection(TokioIo::new(stream), service)
                .into_owned();
            let _ = watcher.watch(connection).await;
        });
    }
    let _ = tokio::time::timeout(DRAIN, graceful.shutdown()).await;
}

async fn authenticated(
    api: &Api,
    request: http::Request<hyper::body::Incoming>,
    token_digest: &[u8; 32],
) -> http::Response<axum::body::Body> {
    let presented = request
        .headers()
        .get(http::header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok());
    let presented = presented
        .and_then(|text| text.strip_prefix("Bearer "))
        .unwrap_or_default();
    // Digests are compared, so the time taken tells nothing of the token.
    let found: [u8; 32] = Sha256::digest(presented.as_bytes()).into();
    if found != *token_digest {
        return error_response(&ApiError::unauthorized());
    }
    let user = User {
        name: "freehold:owner".to_owned(),
        groups: vec!["system:masters".to_owned(), "system:authenticated".to_owned()],
    };
    api.handle(request, &user).await
}

/// The token, made at the first start.
fn token(folder: &Path) -> Result<String, Serve> {
    let path = folder.join("token");
    if let Ok(text) = fs::read_to_string(&path)
        && text.trim().len() >= 32
    {
        return Ok(text.trim().to_owned());
    }
    let token = format!(
        "{}{}",
        uuid::Uuid::new_v4().simple(),
        uuid::Uuid::new_v4().simple()
    );
    write_private(&path, token.as_bytes())?;
    Ok(token)
}

/// The acceptor, and the authority's certificate as PEM. Both certificates are kept, so a kubeconfig
/// stays good over a restart.
fn tls(folder: &Path) -> Result<(TlsAcceptor, String), Serve> {
    let failed = |detail: String| Serve::SetUpTls {
        folder: folder.to_owned(),
        detail,
    };
    let names = ["ca.crt", "server.crt", "server.key"].map(|name| folder.join(name));
    let read = || -> Option<[String; 3]> {
        let [a, b, c] = &names;
        Some([
            fs::read_to_string(a).ok()?,
            fs::read_to_string(b).ok()?,
            fs::read_to_string(c).ok()?,
        ])
    };
    let [authority, certificate, key] = match read() {
        Some(kept) => kept,
        None => {
            let made = certificates().map_err(|error| failed(error.to_string()))?;
            for (path, text) in names.iter().zip(&made) {
                write_private(path, text.as_bytes())?;
            }
            made
        }
    };
    use rustls_pki_types::pem::PemObject;
    let chain = rustls_pki_types::CertificateDer::from_pem_slice(certificate.as_bytes())
        .map_err(|e| failed(e.to_string()))?;
    let key =
        rustls_pki_types::PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| failed(e.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| failed(e.to_string()))?
        .with_no_client_auth()
        .with_single_cert(vec![chain], key)
        .map_err(|e| failed(e.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((TlsAcceptor::from(Arc::new(config)), authority))
}

/// A certificate authority of this machine's own, a server certificate for loopback, and its key.
fn certificates() -> Result<[String; 3], rcgen::Error> {
    let authority_key = KeyPair::generate()?;
    let mut authority = CertificateParams::default();
    authority
        .distinguished_name
        .push(DnType::CommonName, "freehold-local-ca");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let authority_certificate = authority.self_signed(&authority_key)?;
    let issuer = Issuer::new(authority, authority_key);

    let server_key = KeyPair::generate()?;
    let mut server = CertificateParams::new(vec!["localhost".to_owned(), "kubernetes".to_owned()])?;
    server.distinguished_name.push(DnType::CommonName, "freehold-api");
    server
        .subject_alt_names
        .push(SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    server.subject_alt_names.push(SanType::IpAddress(
        "::1"
            .parse()
            .map_err(|_| rcgen::Error::CouldNotParseCertificate)?,
    ));
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let server_certificate = server.signed_by(&server_key, &issuer)?;
    Ok([
        authority_certificate.pem(),
        server_certificate.pem(),
        server_key.serialize_pem(),
    ])
}

fn kubeconfig_text(address: SocketAddr, authority: &str, token: &str) -> String {
    let authority = STANDARD.encode(authority);
    format!(
        "apiVersion: v1\nkind: Config\nclusters:\n- name: freehold\n  cluster:\n    server: https://{address}\n    certificate-authority-data: {authority}\nusers:\n- name: owner\n  user:\n    token: {token}\ncontexts:\n- name: freehold\n  context:\n    cluster: freehold\n    user: owner\n    namespace: default\ncurrent-context: freehold\n"
    )
}

/// Writes a file that only its owner can read, whole or not at all.
fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Serve> {
    let temporary = path.with_extension("tmp");
    let write = || -> std::io::Result<()> {
        let _ = fs::remove_file(&temporary);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|source| Serve::WriteFile {
        path: path.to_owned(),
        source,
    })
}
