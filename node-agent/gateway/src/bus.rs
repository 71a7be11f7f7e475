//! What the gateway knows of the bus: names, rules and workers, as one snapshot that is swapped whole.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use freehold_crds::inference_node::{Backend, CompiledPolicy, Route};
use futures::future::BoxFuture;

/// Everything that the gateway acts on. The agent hands in a whole new one when anything changes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BusState {
    /// The names, and who can answer to them.
    pub routes: Vec<Route>,
    /// The rules.
    pub policies: Vec<CompiledPolicy>,
    /// The workers of this machine, by assignment.
    pub workers: BTreeMap<String, WorkerEndpoint>,
    /// Models that this machine held before its agent was started are still being loaded: `/readyz` says no, so
    /// that a rollout does not go on to the next machine.
    pub coming_back: bool,
}

/// One worker of this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerEndpoint {
    /// Its socket.
    pub socket: PathBuf,
    /// Whether it answers.
    pub ready: bool,
    /// Whether it is on demand and out of memory: a request may activate it.
    pub idle: bool,
    /// What the model does: `generate` or `embed`. Empty: not known yet.
    pub task: String,
    /// Longest context in tokens that it serves; 0: not known yet.
    pub context_length: u32,
    /// While it is not ready: what it waits for, such as `fetching 41 %`. Clients read it.
    pub waiting_for: Option<String>,
}

/// Loads models that sleep.
pub trait Activator: Send + Sync {
    /// Brings an idle assignment into memory. Completes when its worker is ready or cannot be.
    fn activate(&self, assignment: &str) -> BoxFuture<'static, Result<(), ActivateModel>>;
}

/// Why a sleeping model did not wake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("failed to load {assignment}: {reason}")]
pub struct ActivateModel {
    /// The assignment.
    pub assignment: String,
    /// Why, for the client's eye.
    pub reason: String,
}

/// An activator for machines whose models are all `Always`.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoActivation;

impl Activator for NoActivation {
    fn activate(&self, assignment: &str) -> BoxFuture<'static, Result<(), ActivateModel>> {
        let error = ActivateModel {
            assignment: assignment.to_owned(),
            reason: "this machine loads no models on demand".to_owned(),
        };
        Box::pin(async move { Err(error) })
    }
}

/// How busy an assignment is, as the gateway sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Requests that were handed to the worker, or wait for it to wake, and are not answered yet.
    pub in_flight: usize,
    /// When a request last began or ended.
    pub last_request: Option<Instant>,
}

#[derive(Debug, Default)]
struct ActivityCell {
    in_flight: AtomicUsize,
    last_request: Mutex<Option<Instant>>,
}

/// The activity of every assignment that a request has reached.
#[derive(Debug, Default)]
pub(crate) struct ActivityBook {
    cells: Mutex<BTreeMap<String, Arc<ActivityCell>>>,
}

impl ActivityBook {
    pub(crate) fn of(&self, assignment: &str) -> Activity {
        match lock(&self.cells).get(assignment) {
            Some(cell) => Activity {
                in_flight: cell.in_flight.load(Ordering::SeqCst),
                last_request: *lock(&cell.last_request),
            },
            None => Activity::default(),
        }
    }

    /// Counts a request in, until the guard is dropped.
    pub(crate) fn enter(&self, assignment: &str) -> ActivityGuard {
        let cell = Arc::clone(lock(&self.cells).entry(assignment.to_owned()).or_default());
        cell.in_flight.fetch_add(1, Ordering::SeqCst);
        *lock(&cell.last_request) = Some(Instant::now());
        ActivityGuard { cell }
    }

    /// Forgets assignments that are gone and have nothing in flight.
    pub(crate) fn retain(&self, known: &BTreeMap<String, WorkerEndpoint>) {
        lock(&self.cells).retain(|assignment, cell| {
            known.contains_key(assignment) || cell.in_flight.load(Ordering::SeqCst) > 0
        });
    }
}

/// Counts one request in flight.
#[derive(Debug)]
pub(crate) struct ActivityGuard {
    cell: Arc<ActivityCell>,
}

impl Drop for ActivityGuard {
    fn drop(&mut self) {
        *lock(&self.cell.last_request) = Some(Instant::now());
        self.cell.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Locks, also after a panic elsewhere: what these locks guard is whole between statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A [`BusState`] with its look-ups.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    /// Whether the agent has handed in a state at all.
    pub(crate) applied: bool,
    pub(crate) state: BusState,
    routes: BTreeMap<String, usize>,
    /// Deployment (`namespace/name`) to its policies.
    policies: BTreeMap<String, Vec<usize>>,
}

impl Snapshot {
    pub(crate) fn new(state: BusState) -> Self {
        let mut routes = BTreeMap::new();
        for (index, route) in state.routes.iter().enumerate() {
            // The plan holds names unique; were they not, the first would keep its name.
            routes.entry(route.name.clone()).or_insert(index);
        }
        let mut policies: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (index, policy) in state.policies.iter().enumerate() {
            for deployment in &policy.deployments {
                policies.entry(deployment.clone()).or_default().push(index);
            }
        }
        Self {
            applied: true,
            state,
            routes,
            policies,
        }
    }

    pub(crate) fn route(&self, name: &str) -> Option<&Route> {
        self.routes
            .get(name)
            .and_then(|&index| self.state.routes.get(index))
    }

    /// The policies that select the deployment behind a route.
    pub(crate) fn policies(&self, route: &Route) -> Vec<&CompiledPolicy> {
        self.policies
            .get(&deployment_key(route))
            .into_iter()
            .flatten()
            .filter_map(|&index| self.state.policies.get(index))
            .collect()
    }

    /// Who could take a request for the route now, best first: workers here that are ready; then, as
    /// the plan orders them, workers here that sleep and other machines.
    pub(crate) fn targets<'a>(&'a self, route: &'a Route, node: &str, may_forward: bool) -> Vec<Target<'a>> {
        let mut ready = Vec::new();
        let mut others = Vec::new();
        for backend in &route.backends {
            match self.state.workers.get(&backend.assignment) {
                Some(worker) if backend.node == node => {
                    let assignment = backend.assignment.as_str();
                    if worker.ready {
                        ready.push(Target::Worker { assignment, worker });
                    } else if worker.idle {
                        others.push(Target::Sleeping { assignment, worker });
                    }
                }
                _ => {
                    if let (true, true, Some(address)) =
                        (backend.node != node, may_forward, backend.address.as_deref())
                    {
                        others.push(Target::Peer {
                            node: &backend.node,
                            assignment: &backend.assignment,
                            address,
                        });
                    }
                }
            }
        }
        ready.extend(others);
        ready
    }

    /// Why nobody can take a request for the route, for the client's eye.
    pub(crate) fn waiting_for(&self, route: &Route, node: &str) -> String {
        let local = |backend: &Backend| {
            (backend.node == node)
                .then(|| self.state.workers.get(&backend.assignment))
                .flatten()
                .and_then(|worker| worker.waiting_for.as_deref())
        };
        if route.backends.is_empty() {
            return "no machine holds the model yet".to_owned();
        }
        match route.backends.iter().find_map(local) {
            Some(reason) => reason.to_owned(),
            None => "its worker is not ready yet".to_owned(),
        }
    }
}

/// Who can take a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target<'a> {
    /// A worker of this machine that answers.
    Worker {
        assignment: &'a str,
        worker: &'a WorkerEndpoint,
    },
    /// A worker of this machine that a request may wake.
    Sleeping {
        assignment: &'a str,
        worker: &'a WorkerEndpoint,
    },
    /// Another machine's gateway.
    Peer {
        node: &'a str,
        assignment: &'a str,
        address: &'a str,
    },
}

/// `namespace/name` of the deployment behind a route.
pub(crate) fn deployment_key(route: &Route) -> String {
    format!("{}/{}", route.namespace, route.deployment)
}

/// The revision in the name of an assignment (`namespace.deployment.revision`).
pub(crate) fn revision(assignment: &str) -> &str {
    assignment.rsplit('.').next().unwrap_or(assignment)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(node: &str, assignment: &str, address: Option<&str>) -> Backend {
        Backend {
            node: node.to_owned(),
            assignment: assignment.to_owned(),
            address: address.map(ToOwned::to_owned),
        }
    }

    fn worker(ready: bool, idle: bool) -> WorkerEndpoint {
        WorkerEndpoint {
            ready,
            idle,
            ..WorkerEndpoint::default()
        }
    }

    fn snapshot(backends: Vec<Backend>, workers: &[(&str, WorkerEndpoint)]) -> Snapshot {
        Snapshot::new(BusState {
            routes: vec![Route {
                name: "chat".to_owned(),
                backends,
                ..Route::default()
            }],
            workers: workers
                .iter()
                .map(|(name, worker)| ((*name).to_owned(), worker.clone()))
                .collect(),
            ..BusState::default()
        })
    }

    fn order(snapshot: &Snapshot, may_forward: bool) -> Vec<String> {
        let route = snapshot.route("chat").expect("the route");
        snapshot
            .targets(route, "here", may_forward)
            .iter()
            .map(|target| match target {
                Target::Worker { assignment, .. } => format!("worker {assignment}"),
                Target::Sleeping { assignment, .. } => format!("sleeping {assignment}"),
                Target::Peer { node, .. } => format!("peer {node}"),
            })
            .collect()
    }

    #[test]
    fn the_first_ready_worker_wins_and_others_follow() {
        let snapshot = snapshot(
            vec![
                backend("here", "new", None),
                backend("there", "far", Some("http://there:1")),
                backend("here", "old", None),
                backend("here", "asleep", None),
            ],
            &[
                ("new", worker(false, false)),
                ("old", worker(true, false)),
                ("asleep", worker(false, true)),
            ],
        );
        assert_eq!(
            order(&snapshot, true),
            ["worker old", "peer there", "sleeping asleep"]
        );
        assert_eq!(order(&snapshot, false), ["worker old", "sleeping asleep"]);
    }

    #[test]
    fn activity_is_counted_until_the_guard_goes() {
        let book = ActivityBook::default();
        assert_eq!(book.of("a"), Activity::default());
        let guard = book.enter("a");
        assert_eq!(book.of("a").in_flight, 1);
        book.retain(&BTreeMap::new());
        drop(guard);
        assert_eq!(book.of("a").in_flight, 0);
        assert!(book.of("a").last_request.is_some());
        book.retain(&BTreeMap::new());
        assert_eq!(book.of("a").last_request, None);
    }
}
