//! Watches: a stream of changes, pulled by the client at its own pace.
//!
//! There is no queue between store and client: the stream remembers the revision up to which it has
//! told, and reads the next changes from the store's ring when the client asks for more. A client that
//! asks too late finds its revision forgotten, gets `410 Expired` as an event, and lists again.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;
use crate::listing;
use crate::registry::Registry;
use crate::resource::Resource;
use crate::selector::Selector;
use crate::store::{Change, Key, set_revision};
use crate::table;

/// How objects are shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum View {
    /// As they are.
    #[default]
    Object,
    /// Nothing but metadata.
    Partial,
    /// As a table, with the value of `includeObject`.
    Table(String),
}

/// What a watch asks for.
#[derive(Clone, Debug)]
pub(crate) struct WatchOptions {
    pub(crate) namespace: String,
    pub(crate) selector: Selector,
    /// Tell changes after this revision; None: begin with what is there.
    pub(crate) after: Option<u64>,
    pub(crate) bookmarks: bool,
    /// Tell what is there, then a bookmark that says so.
    pub(crate) initial_events: bool,
    pub(crate) timeout: Duration,
    pub(crate) view: View,
}

/// A bookmark a minute keeps an idle client's revision young.
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// Changes that are read from the ring at once.
const BATCH: usize = 64;

/// A client whose watch is about to end gets a last bookmark, to go on from.
const BOOKMARK_BEFORE_END: Duration = Duration::from_secs(2);

fn next_bookmark(at: Instant, ends: Instant) -> Instant {
    let last = ends.checked_sub(BOOKMARK_BEFORE_END).unwrap_or(ends);
    if at < last {
        last.min(at + BOOKMARK_EVERY)
    } else {
        at
    }
}

struct Watch {
    registry: Arc<Registry>,
    resource: usize,
    options: WatchOptions,
    cursor: u64,
    ready: VecDeque<Bytes>,
    latest: tokio::sync::watch::Receiver<u64>,
    ends: Instant,
    next_bookmark: Instant,
    shutdown: CancellationToken,
    ended: bool,
}

/// The stream of one watch: lines of JSON.
///
/// # Errors
/// When the revision lies in the future.
pub(crate) fn watch(
    registry: Arc<Registry>,
    resource: usize,
    options: WatchOptions,
    shutdown: CancellationToken,
) -> Result<impl Stream<Item = Result<Bytes, Infallible>> + Send + use<>, ApiError> {
    let latest = registry.store.latest();
    let now = Instant::now();
    let mut watch = Watch {
        cursor: 0,
        ready: VecDeque::new(),
        ends: now + options.timeout,
        next_bookmark: next_bookmark(now, now + options.timeout),
        latest,
        registry,
        resource,
        options,
        shutdown,
        ended: false,
    };
    match watch.options.after {
        Some(after) if !watch.options.initial_events => {
            let present = watch.registry.store.revision();
            if after > present {
                let mut error = ApiError::new(
                    http::StatusCode::GATEWAY_TIMEOUT,
                    "Timeout",
                    format!("Too large resource version: {after}, current: {present}"),
                );
                error.causes = vec![crate::error::Cause::new(
                    "ResourceVersionTooLarge",
                    "",
                    "Too large resource version",
                )];
                return Err(error);
            }
            watch.cursor = after;
        }
        _ => watch.begin_with_present(),
    }
    Ok(futures::stream::unfold(watch, |mut watch| async move {
        let line = watch.next().await?;
        Some((Ok(line), watch))
    }))
}

impl Watch {
    fn resource(&self) -> Option<&Resource> {
        self.registry.resources.get(self.resource)
    }

    fn begin_with_present(&mut self) {
        let Some(resource) = self.registry.resources.get(self.resource) else {
            return;
        };
        let Ok((objects, revision)) =
            listing::snapshot(&self.registry, resource, &self.options.namespace, None)
        else {
            return;
        };
        self.cursor = revision;
        let matching = objects
            .iter()
            .filter(|(_, object)| self.options.selector.matches(object));
        let lines: Vec<Bytes> = matching
            .map(|(_, object)| event(resource, &self.options.view, "ADDED", object))
            .collect();
        self.ready.extend(lines);
        if self.options.initial_events {
            let mut line = self.bookmark();
            line["object"]["metadata"]["annotations"] = json!({"k8s.io/initial-events-end": "true"});
            self.ready.push_back(to_line(&line));
        }
    }

    fn bookmark(&self) -> Value {
        let (api_version, kind) = self
            .resource()
            .map(|r| (r.api_version(), r.kind.clone()))
            .unwrap_or_default();
        let metadata = json!({"resourceVersion": self.cursor.to_string()});
        json!({"type": "BOOKMARK", "object": {"kind": kind, "apiVersion": api_version, "metadata": metadata}})
    }

    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(line) = self.ready.pop_front() {
                return Some(line);
            }
            if self.ended || self.shutdown.is_cancelled() {
                return None;
            }
            // Marked seen before the ring is read, so a change in between wakes the wait below.
            self.latest.borrow_and_update();
            self.read_changes();
            if !self.ready.is_empty() {
                continue;
            }
            // Every arm waits for a change or a time; none holds anything that a drop would lose.
            tokio::select! {
                changed = self.latest.changed() => self.ended |= changed.is_err(),
                () = sleep_until(self.ends) => self.ended = true,
                () = self.shutdown.cancelled() => self.ended = true,
                () = sleep_until(self.next_bookmark) => {
                    self.next_bookmark = next_bookmark(Instant::now() + BOOKMARK_EVERY, self.ends);
                    if self.options.bookmarks {
                        let line = self.bookmark();
                        self.ready.push_back(to_line(&line));
                    }
                }
            }
        }
    }

    fn read_changes(&mut self) {
        loop {
            match self.registry.store.changes_after(self.cursor, BATCH) {
                Err(compacted) => {
                    let message = format!("too old resource version: {} ({})", self.cursor, compacted.oldest);
                    let status = ApiError::expired(message).to_status();
                    self.ready
                        .push_back(to_line(&json!({"type": "ERROR", "object": status})));
                    self.ended = true;
                    return;
                }
                Ok(changes) => {
                    let Some(last) = changes.last() else { return };
                    self.cursor = last.revision;
                    for change in &changes {
                        let line = self.line_for(change);
                        self.ready.extend(line);
                    }
                    if !self.ready.is_empty() {
                        return;
                    }
                }
            }
        }
    }

    /// What this watch tells of a change: an object that comes into (or leaves) the selection is added
    /// (or deleted) for it.
    fn line_for(&self, change: &Change) -> Option<Bytes> {
        let resource = self.resource()?;
        let Key {
            storage, namespace, ..
        } = &change.key;
        let elsewhere = !self.options.namespace.is_empty() && *namespace != self.options.namespace;
        if *storage != resource.storage || elsewhere {
            return None;
        }
        let selected = |object: &Option<Arc<Value>>| {
            object
                .as_ref()
                .is_some_and(|object| self.options.selector.matches(object))
        };
        let (kind, object) = match (selected(&change.previous), selected(&change.object)) {
            (false, false) => return None,
            (false, true) => ("ADDED", change.object.as_ref()?),
            (true, true) => ("MODIFIED", change.object.as_ref()?),
            (true, false) => {
                let mut last = change.previous.as_ref()?.as_ref().clone();
                set_revision(&mut last, change.revision);
                return Some(event(resource, &self.options.view, "DELETED", &last));
            }
        };
        Some(event(resource, &self.options.view, kind, object))
    }
}

fn event(resource: &Resource, view: &View, kind: &str, object: &Value) -> Bytes {
    let object = Registry::served(resource, object);
    let shown = match view {
        View::Object => object,
        View::Partial => table::partial(&object),
        View::Table(include) => {
            let revision = object
                .pointer("/metadata/resourceVersion")
                .cloned()
                .unwrap_or_default();
            table::table(
                resource,
                &[&object],
                json!({"resourceVersion": revision}),
                include,
            )
        }
    };
    to_line(&json!({"type": kind, "object": shown}))
}

fn to_line(value: &Value) -> Bytes {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    Bytes::from(line)
}
