//! What the operator knows of the API: one shelf a kind, fed by a watch and by the operator's own writes.
//!
//! A watch tells of a write some time after it happened. A controller that acted on the watch alone
//! would read its own past and write twice, or undo itself. So the answer to each write goes onto the
//! shelf at once, and news that is older than what the shelf holds is passed over.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use kube::runtime::reflector::{Lookup, ObjectRef, Store, store::Writer};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tracing::{info, warn};

/// Longest pause between two attempts to watch. The usual ones grow to half a minute, and after an outage as many kinds
/// as one waits for come late by that.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The usual pauses, none longer than [`LONGEST_PAUSE`].
#[derive(Default)]
struct Patience(watcher::DefaultBackoff);

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next().map(|pause| pause.min(LONGEST_PAUSE))
    }
}

impl Backoff for Patience {
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// The objects of one kind.
pub(crate) struct Shelf<K>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    state: Arc<Mutex<State<K>>>,
    reader: Store<K>,
    /// Woken by whatever the shelf did not know before.
    news: Arc<Notify>,
}

struct State<K>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    writer: Writer<K>,
    /// Identities that the watch told to be gone. The answer to an own write may come after the news
    /// that the object was deleted since, and must not bring it back.
    gone: VecDeque<String>,
}

/// How many identities are kept. A write takes seconds, so what matters are the latest.
const GONE_KEPT: usize = 1024;

impl<K> Clone for Shelf<K>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    fn clone(&self) -> Self {
        Self {
            state: Arc::clone(&self.state),
            reader: self.reader.clone(),
            news: Arc::clone(&self.news),
        }
    }
}

impl<K> Shelf<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    /// An empty shelf that wakes `news`.
    pub(crate) fn new(news: Arc<Notify>) -> Self {
        let writer = Writer::default();
        let reader = writer.as_reader();
        let state = State {
            writer,
            gone: VecDeque::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            reader,
            news,
        }
    }

    /// The read half, as kube's runtime wants it.
    pub(crate) fn reader(&self) -> Store<K> {
        self.reader.clone()
    }

    /// Waits until the watch has told everything once.
    pub(crate) async fn filled(&self) {
        // Fails only when the writer is gone, which this shelf itself holds.
        let _ = self.reader.wait_until_ready().await;
    }

    /// Everything on the shelf, by namespace and name.
    pub(crate) fn state(&self) -> Vec<Arc<K>> {
        let mut objects = self.reader.state();
        let key = |object: &Arc<K>| (object.meta().namespace.clone(), object.meta().name.clone());
        objects.sort_by_key(key);
        objects
    }

    /// One object.
    pub(crate) fn get(&self, namespace: Option<&str>, name: &str) -> Option<Arc<K>> {
        let reference = ObjectRef::new(name);
        self.reader.get(&match namespace {
            Some(namespace) => reference.within(namespace),
            None => reference,
        })
    }

    /// Puts the answer to an own write onto the shelf.
    pub(crate) fn wrote(&self, object: K) {
        let mut state = self.lock();
        let is_gone = object
            .meta()
            .uid
            .as_ref()
            .is_some_and(|uid| state.gone.contains(uid));
        if !is_gone {
            self.take_locked(&mut state, Event::Apply(object));
        }
    }

    /// Takes an object off the shelf that the operator has deleted itself.
    pub(crate) fn deleted(&self, object: &K) {
        self.take(Event::Delete(object.clone()));
    }

    /// Takes what the watch tells.
    pub(crate) fn take(&self, event: Event<K>) {
        self.take_locked(&mut self.lock(), event);
    }

    /// There is no such kind: the shelf is as full as it will be.
    pub(crate) fn leave_empty(&self) {
        self.take(Event::Init);
        self.take(Event::InitDone);
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        // A poisoned lock means that a thread panicked between two whole updates: the map is sound.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_locked(&self, state: &mut State<K>, event: Event<K>) {
        let held = |object: &K| {
            self.reader
                .get(&object.to_object_ref(()))
                .filter(|held| held.meta().uid == object.meta().uid)
        };
        let (event, is_news) = match event {
            Event::Apply(object) => match held(&object) {
                Some(held) if revision(&*held) >= revision(&object) => return,
                _ => (Event::Apply(object), true),
            },
            // The listing may be older than an own write that it races with.
            Event::InitApply(object) => match held(&object) {
                Some(held) if revision(&*held) > revision(&object) => {
                    (Event::InitApply((*held).clone()), false)
                }
                _ => (Event::InitApply(object), false),
            },
            Event::Delete(object) => {
                state.bury(&object);
                // An object of the same name that was made since must stay.
                if held(&object).is_none() {
                    return;
                }
                (Event::Delete(object), true)
            }
            Event::Init => (Event::Init, false),
            Event::InitDone => (Event::InitDone, true),
        };
        let relisted = matches!(event, Event::InitDone);
        let before = if relisted { self.reader.state() } else { Vec::new() };
        state.writer.apply_watcher_event(&event);
        for object in before.iter().filter(|object| held(object).is_none()) {
            state.bury(object);
        }
        if is_news {
            self.news.notify_one();
        }
    }

    /// Follows the kind until dropped. `seen` is told of every event before the shelf takes it.
    pub(crate) async fn follow(
        self,
        api: Api<K>,
        config: watcher::Config,
        seen: impl Fn(Seen<'_, K>) + Send,
    ) {
        let kind = K::kind(&()).into_owned();
        let mut events = watch(api, config).backoff(Patience::default()).boxed();
        let mut failing = false;
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    if failing {
                        failing = false;
                        info!(kind, "Watched again");
                        seen(Seen::Recovered);
                    }
                    seen(Seen::Event(&event));
                    self.take(event);
                }
                Err(error) => {
                    // Once an outage, not once an attempt.
                    if !failing {
                        failing = true;
                        warn!(kind, %error, "Failed to watch; trying again");
                        seen(Seen::Failed);
                    }
                }
            }
        }
    }
}

impl<K> State<K>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    fn bury(&mut self, object: &K) {
        let Some(uid) = &object.meta().uid else { return };
        if self.gone.len() == GONE_KEPT {
            self.gone.pop_front();
        }
        self.gone.push_back(uid.clone());
    }
}

/// What a watch has to tell.
pub(crate) enum Seen<'a, K> {
    /// A change.
    Event(&'a Event<K>),
    /// The watch failed; it is tried again.
    Failed,
    /// The watch works again after a failure.
    Recovered,
}

/// Resource versions of one kind are numbers that grow (Kubernetes 1.35 says so; every version before
/// behaves so). What does not read as a number is never taken for old.
fn revision(object: &impl Resource) -> u64 {
    object
        .meta()
        .resource_version
        .as_deref()
        .and_then(|version| version.parse().ok())
        .unwrap_or(u64::MAX)
}

/// The reference of an object of a kind without a dynamic type.
pub(crate) fn reference<K>(object: &K) -> ObjectRef<K>
where
    K: Resource<DynamicType = ()>,
{
    ObjectRef::from_obj(object)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    fn config_map(uid: &str, version: &str) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.namespace = Some("default".into());
        object.metadata.name = Some("a".into());
        object.metadata.uid = Some(uid.into());
        object.metadata.resource_version = Some(version.into());
        object
    }

    fn version(shelf: &Shelf<ConfigMap>) -> Option<String> {
        shelf
            .get(Some("default"), "a")
            .and_then(|object| object.metadata.resource_version.clone())
    }

    #[test]
    fn late_news_does_not_undo_an_own_write() {
        let shelf = Shelf::new(Arc::new(Notify::new()));
        shelf.wrote(config_map("1", "10"));
        shelf.take(Event::Apply(config_map("1", "9")));
        assert_eq!(version(&shelf).as_deref(), Some("10"));
        shelf.take(Event::Apply(config_map("1", "11")));
        assert_eq!(version(&shelf).as_deref(), Some("11"));
    }

    #[test]
    fn late_removal_of_a_namesake_leaves_the_new_object() {
        let shelf = Shelf::new(Arc::new(Notify::new()));
        shelf.wrote(config_map("2", "10"));
        shelf.take(Event::Delete(config_map("1", "9")));
        assert_eq!(version(&shelf).as_deref(), Some("10"));
        shelf.take(Event::Delete(config_map("2", "11")));
        assert_eq!(version(&shelf), None);
    }

    #[test]
    fn the_answer_to_a_write_does_not_bring_a_deleted_object_back() {
        let shelf = Shelf::new(Arc::new(Notify::new()));
        shelf.take(Event::Apply(config_map("1", "9")));
        shelf.take(Event::Delete(config_map("1", "11")));
        shelf.wrote(config_map("1", "10"));
        assert_eq!(version(&shelf), None, "deleted while the write was under way");
        shelf.wrote(config_map("2", "12"));
        shelf.take(Event::Init);
        shelf.take(Event::InitDone);
        shelf.wrote(config_map("2", "13"));
        assert_eq!(version(&shelf), None, "gone from a new listing");
        shelf.take(Event::Apply(config_map("2", "14")));
        assert_eq!(
            version(&shelf).as_deref(),
            Some("14"),
            "the watch itself is believed"
        );
    }

    #[test]
    fn relisting_drops_what_is_gone_and_keeps_a_newer_own_write() {
        let shelf = Shelf::new(Arc::new(Notify::new()));
        shelf.wrote(config_map("1", "10"));
        shelf.take(Event::Init);
        shelf.take(Event::InitApply(config_map("1", "9")));
        shelf.take(Event::InitDone);
        assert_eq!(version(&shelf).as_deref(), Some("10"));
        shelf.take(Event::Init);
        shelf.take(Event::InitDone);
        assert_eq!(version(&shelf), None);
    }
}
