//! Loading the second model, which guesses what the first will write.

use std::path::Path;

use crate::device::{self, Beginning};
use crate::engine::{EngineOptions, Precision};
use crate::gguf::GgufFile;
use crate::kernels::Compute;
use crate::kernels::attention::BLOCK_TOKENS;
use crate::model::DecoderConfig;
use crate::scheduler::DraftModel;
use crate::tokenizer::Tokenizer;
use crate::{InvalidModel, LoadModel};

/// Loads the draft model, if one is given. `compute`: the threads of the model that it guesses for; `blocks`: of
/// that one's KV cache.
///
/// # Errors
/// [`LoadModel::Draft`], also when its vocabulary is another one: its guesses would be none.
pub(super) fn load(
    options: &EngineOptions,
    tokenizer: &Tokenizer,
    compute: Option<&Compute>,
    blocks: usize,
) -> Result<Option<DraftModel>, LoadModel> {
    let Some(path) = options.draft.as_deref().filter(|_| options.speculate) else {
        return Ok(None);
    };
    match begin(path, options, tokenizer, compute, blocks) {
        Ok(draft) => Ok(Some(draft)),
        Err(source) => Err(LoadModel::Draft {
            path: path.to_owned(),
            source: Box::new(source),
        }),
    }
}

fn begin(
    path: &Path,
    options: &EngineOptions,
    tokenizer: &Tokenizer,
    compute: Option<&Compute>,
    blocks: usize,
) -> Result<DraftModel, LoadModel> {
    let file = GgufFile::open(path)?;
    let own = Tokenizer::from_gguf(&file)?;
    if let Some(difference) = difference(tokenizer, &own) {
        return Err(InvalidModel::inconsistent(
            "the draft model's vocabulary",
            difference,
            "the very vocabulary of the model that it guesses for",
        )
        .into());
    }
    let mut config = DecoderConfig::from_gguf(&file)?;
    config.serve_context(blocks * BLOCK_TOKENS);
    // What it guesses is checked: nobody needs it to be precise.
    let options = EngineOptions {
        precision: Precision::Standard,
        ..options.clone()
    };
    let beginning = Beginning {
        file: &file,
        config,
        options: &options,
        // Nothing is shared in its cache: none stays without a user.
        blocks: (blocks, 0),
        token: own.bos().unwrap_or(0),
        compute: compute.cloned(),
    };
    let begun = device::begin(&beginning, |_| ())?;
    Ok(DraftModel::new(begun.runner, begun.cache, own.vocab_size()))
}

/// The first difference between two vocabularies, in words.
fn difference(one: &Tokenizer, other: &Tokenizer) -> Option<String> {
    if one.vocab_size() != other.vocab_size() {
        return Some(format!(
            "of {} tokens, and the model's of {}",
            other.vocab_size(),
            one.vocab_size()
        ));
    }
    let (mut left, mut right) = (Vec::new(), Vec::new());
    (0..one.vocab_size() as u32).find_map(|token| {
        left.clear();
        right.clear();
        one.append_bytes(token, &mut left);
        other.append_bytes(token, &mut right);
        (left != right).then(|| {
            format!(
                "another one from token {token} on ({:?}, and the model's {:?})",
                other.token_text(token),
                one.token_text(token)
            )
        })
    })
}
