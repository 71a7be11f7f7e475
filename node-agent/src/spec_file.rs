//! The last accepted spec on disk: what the machine goes on doing when the API is gone.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use freehold_crds::inference_node::InferenceNodeSpec;
use serde::{Deserialize, Serialize};
use tracing::warn;

/// A spec with its generation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Accepted {
    pub(crate) generation: i64,
    pub(crate) spec: InferenceNodeSpec,
}

/// The file.
#[derive(Clone, Debug)]
pub(crate) struct SpecFile {
    path: PathBuf,
}

impl SpecFile {
    pub(crate) fn in_folder(data_dir: &Path) -> Self {
        Self {
            path: data_dir.join("spec.json"),
        }
    }

    /// What was accepted last, if anything readable is there.
    pub(crate) fn load(&self) -> Option<Accepted> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => {
                warn!(path = %self.path.display(), %error, "Failed to read the last accepted spec");
                return None;
            }
        };
        // The file is this agent's own; what does not read is from another version, or a damaged disk.
        serde_json::from_slice(&text)
            .inspect_err(
                |error| warn!(path = %self.path.display(), %error, "The last accepted spec does not read"),
            )
            .ok()
    }

    /// Keeps `accepted`, whole or not at all. It holds hashes of keys, so it is its owner's alone.
    pub(crate) fn store(&self, accepted: &Accepted) -> std::io::Result<()> {
        let temporary = self.path.with_extension("json.tmp");
        let mut options = fs::OpenOptions::new();
        let mut file = options
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&serde_json::to_vec(accepted)?)?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freehold_crds::inference_node::Assignment;

    #[test]
    fn a_spec_survives_the_disk_and_a_damaged_file_is_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = SpecFile::in_folder(folder.path());
        assert_eq!(file.load(), None);
        let assignment = Assignment {
            name: "home.chat.1".to_owned(),
            ..Assignment::default()
        };
        let spec = InferenceNodeSpec {
            assignments: vec![assignment],
            ..InferenceNodeSpec::default()
        };
        let accepted = Accepted { generation: 7, spec };
        file.store(&accepted).expect("stored");
        assert_eq!(file.load(), Some(accepted));
        fs::write(folder.path().join("spec.json"), "{\"generation\": 7, \"sp").expect("written");
        assert_eq!(file.load(), None);
    }
}
