//! Objects and their history: all in memory for reading, in a transactional file for keeping.
//!
//! One writer at a time builds a [`Transaction`], commits it to the file (fsync included) and only then
//! shows it to readers, so what was answered survives `kill -9`. Readers never wait for the disk.
//! A write that the disk refuses (it is full, say) changes nothing, and the next one tries anew.
//! The history of changes is a bounded ring: a watcher that falls behind it is told to list again.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde_json::{Value, json};
use tokio::sync::watch;

const OBJECTS: TableDefinition<&str, &[u8]> = TableDefinition::new("objects");
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const REVISION: &str = "revision";
/// 4 MiB of page cache: the objects are in memory anyway.
const CACHE_BYTES: usize = 4 << 20;
/// Changes that watchers can still ask for.
const HISTORY_CHANGES: usize = 1024;
/// Bytes of objects that the history may hold beyond what is current.
const HISTORY_BYTES: usize = 4 << 20;

/// Where an object lies.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) storage: String,
    /// Empty for cluster-scoped objects.
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn new(storage: &str, namespace: &str, name: &str) -> Self {
        Self {
            storage: storage.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }

    fn encode(&self) -> String {
        format!("{}\0{}\0{}", self.storage, self.namespace, self.name)
    }

    fn decode(text: &str) -> Option<Self> {
        let mut parts = text.split('\0');
        Some(Self::new(parts.next()?, parts.next()?, parts.next()?))
    }
}

/// One change, as watchers see it.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) revision: u64,
    pub(crate) key: Key,
    /// None when the change is a deletion.
    pub(crate) object: Option<Arc<Value>>,
    /// None when the change is a creation.
    pub(crate) previous: Option<Arc<Value>>,
    bytes: usize,
}

#[derive(Default)]
struct State {
    revision: u64,
    objects: BTreeMap<Key, Arc<Value>>,
    history: VecDeque<Change>,
    history_bytes: usize,
    /// Changes up to this revision are forgotten.
    compacted: u64,
}

/// What went wrong with the file.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct StoreError(String);

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        Self(error.into().to_string())
    }
}

/// The objects of the API.
pub(crate) struct Store {
    state: RwLock<State>,
    /// Held by the one writer from reading to showing. None keeps everything in memory.
    disk: Mutex<Option<Disk>>,
    latest: watch::Sender<u64>,
}

/// The file, and what is not certain about it.
struct Disk {
    path: PathBuf,
    /// None after the disk refused a write: redb takes no more writes then until it is opened anew.
    database: Option<Database>,
    /// Keys of refused writes. Nobody was shown them, but the file may hold them all the same.
    uncertain: Vec<Key>,
}

impl Disk {
    fn open(path: &Path) -> Result<Database, StoreError> {
        // Secrets lie in it: nobody but the owner may read it.
        let mut options = std::fs::OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        let failed = |error: std::io::Error| StoreError(error.to_string());
        let file = options.open(path).map_err(failed)?;
        file.set_permissions(std::fs::Permissions::from_mode(0o600))
            .map_err(failed)?;
        let mut builder = Database::builder();
        builder
            .set_cache_size(CACHE_BYTES)
            .set_check_integrity_on_open(true);
        Ok(builder.create_with_backend(redb::backends::FileBackend::new(file)?)?)
    }

    /// Writes `pending`. `shown` gives what readers see under a key.
    fn write(
        &mut self,
        pending: &[Change],
        revision: u64,
        shown: impl Fn(&Key) -> Option<Arc<Value>>,
    ) -> Result<(), StoreError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => Self::open(&self.path)?,
        };
        let before = self.uncertain.iter().map(|key| (key, shown(key)));
        let after = pending.iter().map(|change| (&change.key, change.object.clone()));
        match commit(&database, before.chain(after), revision) {
            Ok(()) => {
                self.database = Some(database);
                self.uncertain.clear();
                Ok(())
            }
            Err(error) => {
                self.uncertain
                    .extend(pending.iter().map(|change| change.key.clone()));
                Err(error)
            }
        }
    }
}

fn commit<'a>(
    database: &Database,
    changes: impl Iterator<Item = (&'a Key, Option<Arc<Value>>)>,
    revision: u64,
) -> Result<(), StoreError> {
    let transaction = database.begin_write()?;
    {
        let mut objects = transaction.open_table(OBJECTS)?;
        for (key, object) in changes {
            let key = key.encode();
            match object {
                Some(object) => {
                    let bytes = serde_json::to_vec(object.as_ref()).map_err(|e| StoreError(e.to_string()))?;
                    objects.insert(key.as_str(), bytes.as_slice())?;
                }
                None => {
                    objects.remove(key.as_str())?;
                }
            }
        }
        transaction.open_table(META)?.insert(REVISION, revision)?;
    }
    transaction.commit()?;
    Ok(())
}

/// Asked for a revision that is forgotten.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Compacted {
    /// The oldest revision that can still be asked for.
    pub(crate) oldest: u64,
}

impl Store {
    /// Opens the file, or keeps everything in memory without one.
    pub(crate) fn open(file: Option<&Path>) -> Result<Self, StoreError> {
        let mut state = State {
            revision: 1,
            ..State::default()
        };
        let disk = match file {
            None => None,
            Some(path) => {
                let database = Disk::open(path)?;
                let transaction = database.begin_write()?;
                {
                    transaction.open_table(OBJECTS)?;
                    transaction.open_table(META)?;
                }
                transaction.commit()?;
                let read = database.begin_read()?;
                if let Some(revision) = read.open_table(META)?.get(REVISION)? {
                    state.revision = revision.value();
                }
                for row in read.open_table(OBJECTS)?.iter()? {
                    let (key, value) = row?;
                    let object = serde_json::from_slice(value.value()).map_err(|error| {
                        StoreError(format!("object {:?} does not read: {error}", key.value()))
                    })?;
                    if let Some(key) = Key::decode(key.value()) {
                        state.objects.insert(key, Arc::new(object));
                    }
                }
                Some(Disk {
                    path: path.to_owned(),
                    database: Some(database),
                    uncertain: Vec::new(),
                })
            }
        };
        state.compacted = state.revision;
        let (latest, _) = watch::channel(state.revision);
        Ok(Self {
            state: RwLock::new(state),
            disk: Mutex::new(disk),
            latest,
        })
    }

    fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The number of the latest change; wakes whoever waits for the next.
    pub(crate) fn latest(&self) -> watch::Receiver<u64> {
        self.latest.subscribe()
    }

    pub(crate) fn revision(&self) -> u64 {
        self.read(|state| state.revision)
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Arc<Value>> {
        self.read(|state| state.objects.get(key).cloned())
    }

    /// The objects of one storage (and namespace, unless empty), in order of their keys, and the revision.
    pub(crate) fn list(&self, storage: &str, namespace: &str) -> (Vec<(Key, Arc<Value>)>, u64) {
        self.read(|state| {
            let from = Key::new(storage, namespace, "");
            let range = state.objects.range(from..);
            let inside = range.take_while(|(key, _)| {
                key.storage == storage && (namespace.is_empty() || key.namespace == namespace)
            });
            (
                inside
                    .map(|(key, object)| (key.clone(), Arc::clone(object)))
                    .collect(),
                state.revision,
            )
        })
    }

    /// The same as it was at `revision`: the present, with later changes taken back.
    pub(crate) fn list_at(
        &self,
        storage: &str,
        namespace: &str,
        revision: u64,
    ) -> Result<Vec<(Key, Arc<Value>)>, Compacted> {
        let (present, _) = self.list(storage, namespace);
        let mut objects: BTreeMap<Key, Arc<Value>> = present.into_iter().collect();
        self.read(|state| {
            if revision < state.compacted {
                return Err(Compacted {
                    oldest: state.compacted,
                });
            }
            for change in state
                .history
                .iter()
                .rev()
                .take_while(|change| change.revision > revision)
            {
                if change.key.storage != storage
                    || !(namespace.is_empty() || change.key.namespace == namespace)
                {
                    continue;
                }
                match &change.previous {
                    Some(previous) => objects.insert(change.key.clone(), Arc::clone(previous)),
                    None => objects.remove(&change.key),
                };
            }
            Ok(())
        })?;
        Ok(objects.into_iter().collect())
    }

    /// Changes after `revision`, at most `limit` of them.
    pub(crate) fn changes_after(&self, revision: u64, limit: usize) -> Result<Vec<Change>, Compacted> {
        self.read(|state| {
            if revision < state.compacted {
                return Err(Compacted {
                    oldest: state.compacted,
                });
            }
            let start = state
                .history
                .partition_point(|change| change.revision <= revision);
            Ok(state.history.range(start..).take(limit).cloned().collect())
        })
    }

    /// Runs `change` alone; what it puts and deletes is kept and shown if it ends well and `keep` is true.
    ///
    /// # Errors
    /// What `change` answers, or `failed` made from what the disk said (nothing is shown then).
    pub(crate) fn transact<T, E>(
        &self,
        keep: bool,
        change: impl FnOnce(&mut Transaction<'_>) -> Result<T, E>,
        failed: impl FnOnce(StoreError) -> E,
    ) -> Result<T, E> {
        let mut disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        let mut transaction = Transaction {
            store: self,
            revision: self.revision(),
            pending: Vec::new(),
        };
        let answer = change(&mut transaction)?;
        let Transaction {
            revision, pending, ..
        } = transaction;
        if keep && !pending.is_empty() {
            if let Some(disk) = disk.as_mut() {
                disk.write(&pending, revision, |key| self.get(key))
                    .map_err(failed)?;
            }
            self.show(pending, revision);
        }
        Ok(answer)
    }

    fn show(&self, pending: Vec<Change>, revision: u64) {
        {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            for change in pending {
                match &change.object {
                    Some(object) => state.objects.insert(change.key.clone(), Arc::clone(object)),
                    None => state.objects.remove(&change.key),
                };
                state.history_bytes += change.bytes;
                state.history.push_back(change);
            }
            while state.history.len() > HISTORY_CHANGES || state.history_bytes > HISTORY_BYTES {
                let Some(oldest) = state.history.pop_front() else {
                    break;
                };
                state.history_bytes -= oldest.bytes;
                state.compacted = oldest.revision;
            }
            state.revision = revision;
        }
        self.latest.send_replace(revision);
    }
}

/// Reads that see what the transaction itself wrote, and writes that nobody sees yet.
pub(crate) struct Transaction<'a> {
    store: &'a Store,
    revision: u64,
    pending: Vec<Change>,
}

impl Transaction<'_> {
    pub(crate) fn get(&self, key: &Key) -> Option<Arc<Value>> {
        match self.pending.iter().rev().find(|change| change.key == *key) {
            Some(change) => change.object.clone(),
            None => self.store.get(key),
        }
    }

    /// Everything for which `wanted` holds, in every storage.
    pub(crate) fn find(&self, wanted: impl Fn(&Key, &Value) -> bool) -> Vec<(Key, Arc<Value>)> {
        let keys: Vec<Key> = self.store.read(|state| state.objects.keys().cloned().collect());
        let present = keys
            .into_iter()
            .filter_map(|key| self.get(&key).map(|object| (key, object)));
        present.filter(|(key, object)| wanted(key, object)).collect()
    }

    /// Puts an object and gives it as it is kept, with its `resourceVersion`.
    pub(crate) fn put(&mut self, key: Key, mut object: Value) -> Arc<Value> {
        self.revision += 1;
        set_revision(&mut object, self.revision);
        let previous = self.get(&key);
        let object = Arc::new(object);
        // The text's length is close enough to what the tree takes, and cheap to bound by.
        let bytes = previous.as_ref().map_or(0, |p| p.to_string().len());
        self.pending.push(Change {
            revision: self.revision,
            key,
            object: Some(Arc::clone(&object)),
            previous,
            bytes,
        });
        object
    }

    /// Deletes an object and gives its last state.
    pub(crate) fn delete(&mut self, key: &Key) -> Option<Arc<Value>> {
        let previous = self.get(key)?;
        self.revision += 1;
        let mut last = previous.as_ref().clone();
        set_revision(&mut last, self.revision);
        let bytes = previous.to_string().len();
        let change = Change {
            revision: self.revision,
            key: key.clone(),
            object: None,
            previous: Some(previous),
            bytes,
        };
        self.pending.push(change);
        Some(Arc::new(last))
    }
}

/// Writes `metadata.resourceVersion`.
pub(crate) fn set_revision(object: &mut Value, revision: u64) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert("resourceVersion".to_owned(), json!(revision.to_string()));
    }
}
