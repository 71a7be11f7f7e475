//! The listener: connections with limits on what a slow or silent client can hold.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::middleware::map_response;
use axum::response::Response;
use http::{HeaderValue, header};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Sleep, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::gateway::Gateway;

/// Pause after a failed accept: the usual cause, no free file descriptors, passes as others close.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Longest head of a request in bytes.
const HEAD_LIMIT: usize = 64 << 10;

impl Gateway {
    /// Serves until `shutdown`, then lets requests in flight finish within the drain limit.
    ///
    /// # Errors
    /// When the listener is not usable at all. A failed accept is logged and tried again.
    pub async fn serve(&self, listener: TcpListener, shutdown: CancellationToken) -> io::Result<()> {
        let address = listener.local_addr()?;
        info!(%address, "Serving the bus");
        let leaving = shutdown.clone();
        let router = self.router().layer(map_response(move |answer: Response| {
            std::future::ready(last_answer(answer, leaving.is_cancelled()))
        }));
        let places = Arc::new(Semaphore::new(self.inner.options.connection_limit.max(1)));
        let connections = TaskTracker::new();
        let abandon = CancellationToken::new();
        loop {
            // Both arms are cancel-safe: a place is taken back, a connection stays in the backlog.
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = accept(&listener, &places) => accepted,
            };
            match accepted {
                Ok((stream, place)) => {
                    let connection = serve_connection(
                        self.clone(),
                        stream,
                        router.clone(),
                        shutdown.clone(),
                        abandon.clone(),
                    );
                    connections.spawn(async move {
                        connection.await;
                        drop(place);
                    });
                }
                Err(error) => {
                    warn!(%error, "Failed to accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        connections.close();
        if tokio::time::timeout(self.inner.options.drain_limit, connections.wait())
            .await
            .is_err()
        {
            warn!(
                left = connections.len(),
                "Closed connections that were still busy at the end"
            );
            abandon.cancel();
            connections.wait().await;
        }
        self.flush_audit().await;
        info!(%address, "Stopped serving the bus");
        Ok(())
    }
}

/// An answer; at the end with the word that no other follows on its connection.
fn last_answer(mut answer: Response, is_last: bool) -> Response {
    if is_last {
        let close = HeaderValue::from_static("close");
        answer.headers_mut().insert(header::CONNECTION, close);
    }
    answer
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

async fn serve_connection(
    gateway: Gateway,
    stream: TcpStream,
    router: Router,
    shutdown: CancellationToken,
    abandon: CancellationToken,
) {
    let options = &gateway.inner.options;
    // A token is a small packet that should leave at once.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "Failed to set TCP_NODELAY");
    }
    gateway.inner.metrics.connections.inc();
    let guarded = StallGuard::new(stream, options.write_stall_limit);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(options.header_read_limit)
        .max_buf_size(HEAD_LIMIT)
        .serve_connection(TokioIo::new(guarded), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let mut lingering = pin!(async {
        shutdown.cancelled().await;
        sleep(options.linger_limit).await;
    });
    let mut draining = false;
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    // A client that leaves in the middle, or is too slow: its own affair.
                    debug!(%error, "Lost a client");
                }
                break;
            }
            () = &mut lingering, if !draining => {
                draining = true;
                connection.as_mut().graceful_shutdown();
            }
            () = abandon.cancelled() => break,
        }
    }
    gateway.inner.metrics.connections.dec();
}

/// A stream that fails once nothing of what is written has been taken for `limit`.
#[derive(Debug)]
struct StallGuard {
    stream: TcpStream,
    limit: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl StallGuard {
    fn new(stream: TcpStream, limit: Duration) -> Self {
        Self {
            stream,
            limit,
            stalled: None,
        }
    }

    fn watch<T>(&mut self, result: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.stalled = None;
            return result;
        }
        let limit = self.limit;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the client took nothing of its answer for too long",
        )))
    }
}

impl AsyncRead for StallGuard {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for StallGuard {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(result, context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.watch(result, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
