//! Keeping the cluster as a folder says: apply what is there, prune what left it.
//!
//! Everything that was applied carries a label that names the folder; what has the label and stands in
//! the folder no more is deleted. A folder that does not read is reported and changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::discovery::{ApiResource, Scope};
use kube::{Client, ResourceExt, discovery};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::manifests::{self, Manifest, title};

/// Says which folder an object came from.
pub const APPLY_SET_LABEL: &str = "freehold.dev/apply-set";
/// How often the folder is looked at. A look is a few `stat` calls.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// The cluster is compared with the folder this often even if no file changed.
const RESYNC_EVERY: Duration = Duration::from_secs(300);

/// What an apply did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// The object is new.
    Created,
    /// The object changed.
    Configured,
    /// The object was as the manifest says.
    Unchanged,
}

/// The API of a manifest's kind.
async fn api(client: &Client, object: &DynamicObject, namespace: &str) -> Result<Api<DynamicObject>> {
    let types = object.types.clone().unwrap_or_default();
    let gvk = GroupVersionKind::try_from(&types).map_err(|error| anyhow::anyhow!("{error}"))?;
    let (resource, capabilities) = discovery::pinned_kind(client, &gvk)
        .await
        .with_context(|| format!("{} {} is not served here", types.api_version, types.kind))?;
    Ok(match capabilities.scope {
        Scope::Namespaced => Api::namespaced_with(
            client.clone(),
            object.metadata.namespace.as_deref().unwrap_or(namespace),
            &resource,
        ),
        Scope::Cluster => Api::all_with(client.clone(), &resource),
    })
}

/// Applies one manifest by server-side apply.
///
/// # Errors
/// What the API answers, with where the manifest stands.
pub async fn apply(
    client: &Client,
    manifest: &Manifest,
    namespace: &str,
    dry_run: bool,
) -> Result<(DynamicObject, Applied)> {
    let name = manifest.object.name_any();
    let context = || format!("{}: {}", manifest.origin, manifest.title());
    let api = api(client, &manifest.object, namespace)
        .await
        .with_context(context)?;
    let before = api.get_opt(&name).await.with_context(context)?;
    let mut parameters = PatchParams::apply("freehold").force();
    parameters.dry_run = dry_run;
    parameters.field_validation = Some(kube::api::ValidationDirective::Strict);
    let after = api
        .patch(&name, &parameters, &Patch::Apply(&manifest.object))
        .await
        .with_context(context)?;
    let applied = match before {
        None => Applied::Created,
        Some(before) if before.resource_version() == after.resource_version() => Applied::Unchanged,
        Some(_) => Applied::Configured,
    };
    Ok((after, applied))
}

/// Deletes one object; false when it was not there.
///
/// # Errors
/// What the API answers.
pub async fn delete(client: &Client, object: &DynamicObject, namespace: &str) -> Result<bool> {
    let api = api(client, object, namespace).await?;
    match api.delete(&object.name_any(), &DeleteParams::default()).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(error)) if error.code == 404 => Ok(false),
        Err(error) => Err(error).with_context(|| title(object)),
    }
}

/// A folder that is kept applied.
pub struct FolderSync {
    client: Client,
    folder: PathBuf,
    namespace: String,
    label: String,
}

/// What one round did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Objects that are new or changed.
    pub applied: Vec<String>,
    /// Objects that were deleted.
    pub pruned: Vec<String>,
}

impl FolderSync {
    /// For this folder.
    ///
    /// # Errors
    /// When the folder is not there.
    pub fn new(client: Client, folder: &Path, namespace: &str) -> Result<Self> {
        let folder = folder
            .canonicalize()
            .with_context(|| format!("failed to find {}", folder.display()))?;
        if !folder.is_dir() {
            bail!("{} is not a folder", folder.display());
        }
        let mut label = hex::encode(Sha256::digest(folder.as_os_str().as_encoded_bytes()));
        label.truncate(16);
        Ok(Self {
            client,
            folder,
            namespace: namespace.to_owned(),
            label,
        })
    }

    /// Applies and prunes once.
    ///
    /// # Errors
    /// When the folder does not read (nothing was done then), or the API refuses something (the rest was
    /// applied and nothing was pruned).
    pub async fn round(&self) -> Result<Round> {
        let mut wanted = manifests::read(&self.folder)?;
        // Namespaces before what is in them; policies before what they govern.
        wanted.sort_by_key(|manifest| {
            match manifest.object.types.as_ref().map(|types| types.kind.as_str()) {
                Some("Namespace") => 0,
                Some("GovernancePolicy") => 1,
                _ => 2,
            }
        });
        let (mut round, mut kept, mut failures) = (Round::default(), BTreeSet::new(), Vec::new());
        for manifest in &mut wanted {
            manifest
                .object
                .labels_mut()
                .insert(APPLY_SET_LABEL.to_owned(), self.label.clone());
            match apply(&self.client, manifest, &self.namespace, false).await {
                Ok((object, applied)) => {
                    kept.insert(object.uid().unwrap_or_default());
                    if applied != Applied::Unchanged {
                        round.applied.push(title(&object));
                    }
                }
                Err(error) => failures.push(format!("{error:#}")),
            }
        }
        if !failures.is_empty() {
            bail!("{}; nothing was pruned", failures.join("; "));
        }
        for kind in ["ModelDeployment", "HealthProbe", "GovernancePolicy"] {
            round.pruned.extend(self.prune(kind, &kept).await?);
        }
        Ok(round)
    }

    async fn prune(&self, kind: &str, kept: &BTreeSet<String>) -> Result<Vec<String>> {
        let gvk = GroupVersionKind::gvk(freehold_crds::GROUP, freehold_crds::VERSION, kind);
        let (resource, _): (ApiResource, _) = discovery::pinned_kind(&self.client, &gvk).await?;
        let all: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let mine = all
            .list(&ListParams::default().labels(&format!("{APPLY_SET_LABEL}={}", self.label)))
            .await?;
        let mut pruned = Vec::new();
        for mut object in mine
            .items
            .into_iter()
            .filter(|object| !object.uid().is_some_and(|uid| kept.contains(&uid)))
        {
            object.types = Some(kube::core::TypeMeta {
                api_version: resource.api_version.clone(),
                kind: resource.kind.clone(),
            });
            if delete(&self.client, &object, &self.namespace).await? {
                pruned.push(title(&object));
            }
        }
        Ok(pruned)
    }

    /// Keeps the folder applied until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut seen: Option<BTreeMap<PathBuf, (u64, SystemTime)>> = None;
        let mut next_resync = tokio::time::Instant::now();
        let mut told = String::new();
        while !shutdown.is_cancelled() {
            let now = fingerprint(&self.folder);
            if seen.as_ref() != Some(&now) || tokio::time::Instant::now() >= next_resync {
                match self.round().await {
                    Ok(round) => {
                        for object in &round.applied {
                            info!(object = %object, "Applied");
                        }
                        for object in &round.pruned {
                            info!(object = %object, "Pruned");
                        }
                        seen = Some(now);
                        next_resync = tokio::time::Instant::now() + RESYNC_EVERY;
                        told.clear();
                    }
                    Err(error) => {
                        // Told once; tried again at every look, because the mistake may not be in a file.
                        let text = format!("{error:#}");
                        if text != told {
                            warn!(folder = %self.folder.display(), error = %text, "Failed to apply the folder; what runs stays as it is");
                            told = text;
                        }
                    }
                }
            }
            // Both arms only wait.
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = shutdown.cancelled() => {}
            }
        }
    }
}

fn fingerprint(folder: &Path) -> BTreeMap<PathBuf, (u64, SystemTime)> {
    let files = manifests::files(folder).unwrap_or_default().into_iter();
    let stamped = files.filter_map(|path| {
        let metadata = std::fs::metadata(&path).ok()?;
        Some((path, (metadata.len(), metadata.modified().ok()?)))
    });
    stamped.collect()
}
