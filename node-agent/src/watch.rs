//! Watches this machine's InferenceNode, and nothing else.

use std::time::Duration;

use freehold_crds::{InferenceNode, InferenceNodeSpec};
use futures::TryStreamExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{DefaultBackoff, watch_object};
use kube::{Api, Client};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::spec_file::{Accepted, SpecFile};

/// Longest pause between two attempts to watch, with as much again by chance: many machines lose the API at once.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The usual pauses, which grow to half a minute, cut at that.
#[derive(Default)]
struct Patience(DefaultBackoff);

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let longest = LONGEST_PAUSE.mul_f64(1.0 + rand::random::<f64>());
        self.0.next().map(|pause| pause.min(longest))
    }
}

impl Backoff for Patience {
    fn reset(&mut self) {
        self.0.reset();
    }
}

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
    let mut objects = std::pin::pin!(watch_object(api, &node).backoff(Patience::default()));
    let mut reachable = true;
    loop {
        match objects.try_next().await {
            Ok(Some(Some(object))) => {
                reachable = true;
                let generation = object.metadata.generation.unwrap_or_default();
                let accepted = to_accept(generation, object.spec, &spec.borrow());
                if let Some(accepted) = accepted {
                    accept(accepted, &file, &spec).await;
                }
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

/// What an object says that this machine shall do; None: nothing yet.
///
/// The object of a machine is made empty, and filled once the operator has heard of the machine and
/// planned for it. When it is made anew (someone deleted it, or restored an old backup), taking the empty
/// one at its word would end every model here for as long as that takes.
fn to_accept(generation: i64, spec: InferenceNodeSpec, kept: &Accepted) -> Option<Accepted> {
    if spec.planned {
        return Some(Accepted { generation, spec });
    }
    if *kept == Accepted::default() {
        return None;
    }
    Some(Accepted {
        generation,
        spec: kept.spec.clone(),
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_that_nobody_planned_for_changes_nothing() {
        let planned = InferenceNodeSpec {
            planned: true,
            ..InferenceNodeSpec::default()
        };
        let kept = Accepted {
            generation: 7,
            spec: planned.clone(),
        };
        let empty = InferenceNodeSpec::default();
        let goes_on = to_accept(1, empty.clone(), &kept).expect("it is noticed");
        assert_eq!((goes_on.generation, goes_on.spec), (1, planned.clone()));
        assert_eq!(to_accept(1, empty, &Accepted::default()), None);
        assert_eq!(
            to_accept(2, planned, &kept).expect("it is taken up").generation,
            2
        );
    }
}
