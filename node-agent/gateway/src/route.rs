//! Who takes a request: a worker here that is ready, one that is woken for it, or another machine.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tracing::info;

use crate::bus::{ActivityGuard, Target, WorkerEndpoint};
use crate::error::ApiError;
use crate::exchange::Exchange;
use crate::gateway::Gateway;
use crate::metrics::Endpoint;
use crate::worker::WorkerClient;

/// Longest wait for the bus to show a worker that its activator says is ready.
const SHOW_LIMIT: Duration = Duration::from_secs(5);

/// An assignment on a machine.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) node: String,
    pub(crate) assignment: String,
}

/// Where a request goes.
pub(crate) enum Destination {
    /// To a worker of this machine, which counts it in flight from now on.
    Worker {
        place: Place,
        client: WorkerClient,
        activity: ActivityGuard,
    },
    /// To another machine's gateway.
    Peer { place: Place, address: String },
}

/// The search for one request, which remembers who could not take it.
pub(crate) struct Routing {
    gateway: Gateway,
    model: String,
    endpoint: Endpoint,
    may_forward: bool,
    /// Machine and assignment: replicas on several machines share the assignment's name.
    tried: BTreeSet<(String, String)>,
    last: Option<ApiError>,
    deadline: Instant,
}

/// What was found in one look at the bus.
enum Found {
    Destination(Destination),
    Sleeping(String, ActivityGuard),
    Changed,
}

impl Routing {
    pub(crate) fn new(exchange: &Exchange, may_forward: bool) -> Self {
        let gateway = exchange.gateway().clone();
        Self {
            deadline: Instant::now() + gateway.inner.options.activation_limit,
            gateway,
            model: exchange.model().to_owned(),
            endpoint: exchange.endpoint(),
            may_forward,
            tried: BTreeSet::new(),
            last: None,
        }
    }

    /// Notes that a place did not take the request, so that [`Routing::next`] looks further.
    pub(crate) fn failed(&mut self, place: Place, error: ApiError) {
        let Place { node, assignment } = place;
        info!(node, assignment, error = %error, "Looked for another place for a request");
        self.tried.insert((node, assignment));
        self.last = Some(error);
    }

    /// The best place for the request now. Waits for a sleeping model.
    pub(crate) async fn next(&mut self) -> Result<Destination, ApiError> {
        loop {
            match self.look()? {
                Found::Destination(destination) => return Ok(destination),
                Found::Changed => {}
                Found::Sleeping(assignment, activity) => {
                    if let Err(error) = self.wake(&assignment).await {
                        let node = self.gateway.inner.options.node.clone();
                        self.failed(Place { node, assignment }, error);
                    }
                    drop(activity);
                }
            }
        }
    }

    fn look(&self) -> Result<Found, ApiError> {
        let snapshot = self.gateway.snapshot();
        let node = self.gateway.inner.options.node.as_str();
        let Some(route) = snapshot.route(&self.model) else {
            return Err(ApiError::not_ready(
                &self.model,
                "its deployment was just removed",
            ));
        };
        let target = snapshot
            .targets(route, node, self.may_forward)
            .into_iter()
            .find(|target| !self.tried.contains(&place_of(target, node)));
        match target {
            None => Err(match &self.last {
                Some(error) => error.clone(),
                None => ApiError::not_ready(&self.model, &snapshot.waiting_for(route, node)),
            }),
            Some(Target::Peer {
                node,
                assignment,
                address,
            }) => Ok(Found::Destination(Destination::Peer {
                place: Place {
                    node: node.to_owned(),
                    assignment: assignment.to_owned(),
                },
                address: address.to_owned(),
            })),
            Some(Target::Worker { assignment, worker } | Target::Sleeping { assignment, worker }) => {
                self.check_task(worker)?;
                let activity = self.gateway.inner.activity.enter(assignment);
                // The agent takes a worker off the bus first and then waits until nothing is in flight.
                // Looking again after counting in closes the gap between the two.
                let current = self.gateway.snapshot();
                let Some(now) = current.state.workers.get(assignment) else {
                    return Ok(Found::Changed);
                };
                if now.ready {
                    Ok(Found::Destination(Destination::Worker {
                        place: Place {
                            node: node.to_owned(),
                            assignment: assignment.to_owned(),
                        },
                        client: WorkerClient::new(&now.socket),
                        activity,
                    }))
                } else if now.idle {
                    Ok(Found::Sleeping(assignment.to_owned(), activity))
                } else {
                    Ok(Found::Changed)
                }
            }
        }
    }

    fn check_task(&self, worker: &WorkerEndpoint) -> Result<(), ApiError> {
        match (worker.task.as_str(), self.endpoint) {
            ("embed", Endpoint::chat_completions | Endpoint::completions) => Err(ApiError::wrong_task(
                &self.model,
                "makes embeddings and does not generate text",
                "/v1/embeddings",
            )),
            ("generate", Endpoint::embeddings) => Err(ApiError::wrong_task(
                &self.model,
                "generates text and makes no embeddings",
                "/v1/chat/completions",
            )),
            _ => Ok(()),
        }
    }

    /// Wakes a model and waits until the bus shows it.
    async fn wake(&self, assignment: &str) -> Result<(), ApiError> {
        let waking = self.gateway.inner.activator.activate(assignment);
        match timeout_at(self.deadline, waking).await {
            Err(_) => {
                let seconds = self.gateway.inner.options.activation_limit.as_secs();
                return Err(ApiError::not_ready(
                    &self.model,
                    &format!("it is being loaded and was not ready within {seconds} s"),
                ));
            }
            Ok(Err(error)) => return Err(ApiError::not_ready(&self.model, &error.to_string())),
            Ok(Ok(())) => {}
        }
        let mut bus = self.gateway.watch_bus();
        let deadline = self.deadline.min(Instant::now() + SHOW_LIMIT);
        let awake = bus.wait_for(|snapshot| {
            snapshot
                .state
                .workers
                .get(assignment)
                .is_none_or(|worker| worker.ready)
        });
        match timeout_at(deadline, awake).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(ApiError::not_ready(&self.model, "it was loaded and left again")),
        }
    }
}

fn place_of(target: &Target<'_>, here: &str) -> (String, String) {
    let (node, assignment) = match target {
        Target::Worker { assignment, .. } | Target::Sleeping { assignment, .. } => (here, assignment),
        Target::Peer { node, assignment, .. } => (*node, assignment),
    };
    (node.to_owned(), (*assignment).to_owned())
}
