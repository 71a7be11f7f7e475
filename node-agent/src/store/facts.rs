//! From a file's bytes to what the API says of it.

use std::path::Path;

use freehold_crds::model_deployment::ModelFacts;
use freehold_engine::inspect::{KvType, ModelKind, inspect};

use super::FetchModel;

/// Reads and checks the model at `path`. Hostile files are refused in bounded time and memory.
pub(super) async fn read(
    path: &Path,
    sha256: Option<String>,
    verified: bool,
) -> Result<ModelFacts, FetchModel> {
    let owned = path.to_owned();
    let invalid = |detail: String| FetchModel::InvalidModel {
        path: path.to_owned(),
        detail,
    };
    let facts = tokio::task::spawn_blocking(move || inspect(&owned))
        .await
        .map_err(|error| invalid(error.to_string()))?
        .map_err(|error| invalid(error.to_string()))?;
    Ok(describe(&facts, sha256, verified))
}

/// The engine's facts as the API tells them.
pub(crate) fn describe(
    facts: &freehold_engine::ModelFacts,
    sha256: Option<String>,
    verified: bool,
) -> ModelFacts {
    ModelFacts {
        summary: Some(facts.summary()),
        sha256,
        verified,
        format: facts.format.to_string(),
        architecture: facts.architecture.clone(),
        quantization: facts.quantization.clone(),
        task: match facts.kind {
            ModelKind::Generate => "generate".to_owned(),
            ModelKind::Embed => "embed".to_owned(),
        },
        parameters: facts.parameter_count,
        file_bytes: facts.file_bytes,
        weight_bytes: facts.weight_bytes,
        kv_bytes_per_token: facts.kv_bytes_per_token(KvType::F16),
        context_length: facts.context_length,
    }
}
