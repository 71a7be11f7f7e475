//! Events: told beside the work, never in its way.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tracing::warn;

use crate::FIELD_MANAGER;
use crate::metrics::Metrics;
use crate::story::Story;

/// Stories that wait to be told. When the API is slow and this is full, further ones are dropped and
/// counted: statuses hold the truth, events only tell how it came about.
const WAITING: usize = 256;
/// Longest note that the API takes is 1 KiB.
const LONGEST_NOTE: usize = 1000;

/// Where stories are left.
#[derive(Clone)]
pub(crate) struct Events {
    queue: mpsc::Sender<(ObjectReference, Story)>,
    metrics: Metrics,
}

/// What tells them.
pub(crate) struct Teller {
    queue: mpsc::Receiver<(ObjectReference, Story)>,
    recorder: Recorder,
}

/// Both ends.
pub(crate) fn channel(client: Client, identity: &str, metrics: Metrics) -> (Events, Teller) {
    let (sender, queue) = mpsc::channel(WAITING);
    let reporter = Reporter {
        controller: FIELD_MANAGER.to_owned(),
        instance: Some(identity.to_owned()),
    };
    // The recorder folds repetitions within minutes into one event with a count.
    let recorder = Recorder::new(client, reporter);
    (
        Events {
            queue: sender,
            metrics,
        },
        Teller { queue, recorder },
    )
}

impl Events {
    /// Leaves stories about `object` to be told.
    pub(crate) fn tell(&self, object: &ObjectReference, stories: impl IntoIterator<Item = Story>) {
        for story in stories {
            if self.queue.try_send((object.clone(), story)).is_err() {
                self.metrics.events_dropped.inc();
            }
        }
    }
}

impl Teller {
    /// Tells stories until every [`Events`] is dropped.
    pub(crate) async fn run(mut self) {
        while let Some((object, story)) = self.queue.recv().await {
            let Story {
                warning,
                reason,
                action,
                note,
                related,
            } = story;
            let event = Event {
                type_: if warning {
                    EventType::Warning
                } else {
                    EventType::Normal
                },
                reason,
                note: Some(note.chars().take(LONGEST_NOTE).collect()),
                action,
                secondary: related,
            };
            if let Err(error) = self.recorder.publish(&event, &object).await {
                warn!(reason = event.reason, object = object.name, %error, "Failed to record event");
            }
        }
    }
}
