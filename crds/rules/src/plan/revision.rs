//! A revision is named by what it is made of, so the same spec is the same revision on every machine.

use freehold_crds::Device;
use freehold_crds::model_deployment::{EngineSettings, ModelSource};
use sha2::{Digest, Sha256};

/// Digits of a revision's name: 40 bits, plenty among the few revisions of one deployment.
const DIGITS: usize = 10;

/// The name of the revision with this model, settings and device. Licence and size only describe, so
/// they make no new revision.
#[must_use]
pub fn revision_name(model: &ModelSource, engine: &EngineSettings, device: Device) -> String {
    let model = ModelSource {
        licence: None,
        size: None,
        ..model.clone()
    };
    let text = serde_json::to_vec(&(model, engine, device)).unwrap_or_default();
    let mut name = hex::encode(Sha256::digest(text));
    name.truncate(DIGITS);
    name
}
