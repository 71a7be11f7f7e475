//! Watches this machine's InferenceNode, and nothing else.

use freehold_crds::InferenceNode;
use futures::TryStreamExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::watch_object;
use kube::{Api, Client};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::spec_file::{Accepted, SpecFile};

/// What is known of the object.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Observed {
    /// Uid of the object, once it was seen: a new one has an empty status.
    pub(crate) uid: Option<String>,
}

/// Follows the object until the task is dropped. What it accepts goes to the disk, then to `spec`.
///
/// An object that is gone changes nothing: the operator makes it anew, and until then the machine does
/// what it did.
pub(crate) async fn run(
    client: Client,
    node: String,
    file: SpecFile,
    spec: watch::Sender<Accepted>,
    observed: watch::Sender<Observed>,
) {
    let api: Api<InferenceNode> = Api::all(client);
    let mut objects = std::pin::pin!(watch_object(api, &node).default_backoff());
    let mut reachable = true;
    loop {
        match objects.try_next().await {
            Ok(Some(Some(object))) => {
                reachable = true;
                let accepted = Accepted {
                    generation: object.metadata.generation.unwrap_or_default(),
                    spec: object.spec,
                };
                accept(accepted, &file, &spec).await;
                let uid = object.metadata.uid;
                observed.send_if_modified(|seen| {
                    let new = seen.uid != uid;
                    seen.uid = uid;
                    new
                });
            }
            Ok(Some(None)) => {
                reachable = true;
                info!("No InferenceNode for this machine yet; the operator makes it from the heartbeat");
                observed.send_if_modified(|seen| seen.uid.take().is_some());
            }
            Ok(None) => return,
            // The stream retries by itself, with pauses. Once is news, the rest is noise.
            Err(error) if std::mem::take(&mut reachable) => {
                warn!(%error, "Lost the API; this machine goes on with the last accepted spec");
            }
            Err(error) => debug!(%error, "The API is still away"),
        }
    }
}

async fn accept(accepted: Accepted, file: &SpecFile, spec: &watch::Sender<Accepted>) {
    if *spec.borrow() == accepted {
        return;
    }
    let (file, kept) = (file.clone(), accepted.clone());
    let stored = tokio::task::spawn_blocking(move || file.store(&kept)).await;
    if let Err(error) = stored.map_err(std::io::Error::other).flatten() {
        // Better to do what is asked and forget it at a restart than not to do it.
        warn!(%error, "Failed to keep the accepted spec on disk");
    }
    info!(
        generation = accepted.generation,
        assignments = accepted.spec.assignments.len(),
        routes = accepted.spec.routes.len(),
        "Accepted spec"
    );
    spec.send_replace(accepted);
}
