//! What every controller does alike: take its objects to what the latest plan says, count, back off.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::controller::{Action, Config, Error, applier};
use kube::runtime::reflector::ObjectRef;
use kube::{Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::backoff::Failures;
use crate::compare::same;
use crate::events::Events;
use crate::fleet::Shelves;
use crate::metrics::{Kind, Metrics, Outcome};
use crate::planner::{Latest, Planned};
use crate::shelf::{Shelf, reference};
use crate::story::Story;
use crate::writes::apply_status;

/// Objects of one kind that are reconciled at once: enough to hide the API's latency, few enough not
/// to flood it after an outage.
const CONCURRENCY: u16 = 8;
/// A write that takes longer is given up and tried again.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// What the controllers share.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) shelves: Shelves,
    pub(crate) latest: Latest,
    pub(crate) events: Events,
    pub(crate) metrics: Metrics,
    pub(crate) failures: Failures,
    /// Resource versions of malformed objects that were told so.
    pub(crate) malformed: Mutex<HashMap<String, String>>,
}

impl Context {
    /// The latest plan.
    pub(crate) fn planned(&self) -> Option<Arc<Planned>> {
        self.latest.borrow().clone()
    }
}

/// Why an object was not brought to what the plan says.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileObject {
    /// The API refused, or was not there.
    #[error("failed to {action} {kind} {name}: {source}")]
    Write {
        /// What was tried.
        action: &'static str,
        /// The kind.
        kind: &'static str,
        /// The object.
        name: String,
        /// What the API said.
        source: kube::Error,
    },
    /// The API did not answer.
    #[error("failed to {action} {kind} {name}: no answer within {} s", WRITE_TIMEOUT.as_secs())]
    TimedOut {
        /// What was tried.
        action: &'static str,
        /// The kind.
        kind: &'static str,
        /// The object.
        name: String,
    },
}

/// Talks to the API with a time limit, and says what it was about when that fails.
pub(crate) async fn ask<T>(
    action: &'static str,
    kind: &'static str,
    name: &str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ReconcileObject> {
    let name = name.to_owned();
    match tokio::time::timeout(WRITE_TIMEOUT, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(ReconcileObject::Write {
            action,
            kind,
            name,
            source,
        }),
        Err(_) => Err(ReconcileObject::TimedOut { action, kind, name }),
    }
}

/// One controller.
pub(crate) trait Controller: 'static {
    /// What it reconciles.
    type Object: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static;
    /// Name of the kind in logs and metrics.
    const KIND: &'static str;

    /// Where its objects are.
    fn shelf(shelves: &Shelves) -> &Shelf<Self::Object>;

    /// Brings one object to what the latest plan says. It must do nothing when there is nothing to do.
    fn reconcile(
        object: Arc<Self::Object>,
        context: Arc<Context>,
    ) -> impl Future<Output = Result<(), ReconcileObject>> + Send;
}

/// Runs a controller until `stop`; what is under way then is finished.
pub(crate) async fn run<C: Controller>(context: Arc<Context>, stop: CancellationToken) {
    let shelf = C::shelf(&context.shelves).clone();
    let reader = shelf.reader();
    // Whatever changes, an object of this kind or any other, makes a new plan; so the plan is the only
    // trigger that is needed, and it concerns every object.
    let queue = WatchStream::new(context.latest.clone())
        .flat_map(move |_| stream::iter(shelf.state().into_iter().map(|object| reference(&*object))))
        .map(Ok::<_, Infallible>)
        .take_until(stop.cancelled_owned());
    applier(
        |object, context| Box::pin(counted::<C>(object, context)),
        |object: Arc<C::Object>, _: &ReconcileObject, context: Arc<Context>| {
            Action::requeue(context.failures.failed(&failure_key::<C>(&object)))
        },
        context,
        reader,
        queue,
        Config::default().concurrency(CONCURRENCY),
    )
    .for_each(|outcome| async move { log::<C>(outcome) })
    .await;
}

async fn counted<C: Controller>(
    object: Arc<C::Object>,
    context: Arc<Context>,
) -> Result<Action, ReconcileObject> {
    let started = Instant::now();
    let key = failure_key::<C>(&object);
    let outcome = C::reconcile(object, Arc::clone(&context)).await;
    let labels = Outcome {
        kind: C::KIND,
        outcome: if outcome.is_ok() { "ok" } else { "error" },
    };
    context.metrics.reconciles.get_or_create(&labels).inc();
    let seconds = context
        .metrics
        .reconcile_seconds
        .get_or_create(&Kind { kind: C::KIND })
        .clone();
    seconds.observe(started.elapsed().as_secs_f64());
    if outcome.is_ok() {
        context.failures.succeeded(&key);
    }
    outcome.map(|()| Action::await_change())
}

fn failure_key<C: Controller>(object: &C::Object) -> String {
    format!(
        "{} {}/{}",
        C::KIND,
        object.namespace().unwrap_or_default(),
        object.name_any()
    )
}

type Reconciled<K> = Result<(ObjectRef<K>, Action), Error<ReconcileObject, Infallible>>;

fn log<C: Controller>(outcome: Reconciled<C::Object>) {
    match outcome {
        Ok(_) => {}
        Err(Error::ReconcilerFailed(error, _)) => {
            warn!(kind = C::KIND, %error, "Failed to reconcile; trying again");
        }
        // Deleted since it was put into the queue.
        Err(Error::ObjectNotFound(object)) => debug!(kind = C::KIND, %object, "Object is gone"),
        Err(error) => warn!(kind = C::KIND, %error, "Failed to reconcile"),
    }
}

/// Whether the plan was made from this very spec. If not, the next plan is on its way, and a status
/// made now would speak of a spec that the plan does not know.
pub(crate) fn was_planned<'a, K: Resource + 'a>(
    object: &K,
    mut planned: impl Iterator<Item = &'a K>,
) -> bool {
    let (wanted, own) = (object.meta().generation, object.meta());
    planned.any(|seen| {
        let seen = seen.meta();
        seen.uid == own.uid && seen.generation == wanted
    })
}

/// Writes `new` as the status of `object` where it differs from what is there, and tells the stories
/// that `stories` finds in the difference.
pub(crate) async fn update_status<K, S>(
    context: &Context,
    kind: &'static str,
    shelf: &Shelf<kube::core::DeserializeGuard<K>>,
    object: &K,
    old: Option<&S>,
    new: &S,
    stories: impl FnOnce() -> Vec<Story>,
) -> Result<(), ReconcileObject>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    S: Serialize,
{
    if old.is_some_and(|old| same(old, new)) {
        return Ok(());
    }
    let (namespace, name) = (object.namespace(), object.name_any());
    let written = apply_status(&context.client, namespace.as_deref(), &name, new);
    let Some(written) = ask("write the status of", kind, &name, written).await? else {
        return Ok(());
    };
    context.metrics.writes.get_or_create(&Kind { kind }).inc();
    shelf.wrote(written);
    let stories = stories();
    for story in &stories {
        info!(
            kind,
            namespace,
            name,
            reason = story.reason,
            note = story.note,
            "Told"
        );
    }
    context.events.tell(&reference_of(object), stories);
    Ok(())
}

/// An object as events refer to it.
pub(crate) fn reference_of<K: Resource<DynamicType = ()>>(object: &K) -> ObjectReference {
    object.object_ref(&())
}
