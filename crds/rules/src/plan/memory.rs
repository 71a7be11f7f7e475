//! How much memory a replica takes, as arithmetic that a person can follow.

use freehold_crds::KvType;
use freehold_crds::model_deployment::{EngineSettings, MemoryEstimate, ModelFacts};

/// Longest context that is reserved when the spec names none.
pub const DEFAULT_CONTEXT: u32 = 8192;
/// Code, tokenizer, activations: what a small worker takes beyond weights and KV cache.
const BASE_OVERHEAD_BYTES: u64 = 48 << 20;
/// A twentieth of the file: vocabulary and repacked scales grow with the model.
const OVERHEAD_PART: u64 = 20;

/// The context that the engine uses, in tokens.
#[must_use]
pub fn context_length(model_context: u32, engine: &EngineSettings) -> u32 {
    let own = if model_context == 0 {
        DEFAULT_CONTEXT
    } else {
        model_context
    };
    engine.context_length.unwrap_or(DEFAULT_CONTEXT).min(own)
}

/// Tokens that the KV cache holds for all requests together: at least one context, at most one for each.
#[must_use]
pub fn kv_cache_tokens(context: u32, engine: &EngineSettings) -> u64 {
    let most = u64::from(context) * u64::from(engine.concurrency);
    engine.kv_cache_tokens.map_or(most, |tokens| {
        // Whole blocks of 32, as the engine divides it.
        u64::from(tokens)
            .max(u64::from(context))
            .next_multiple_of(32)
            .min(most)
    })
}

/// Memory of one replica: weights + KV cache of every concurrent request at full context + overhead.
/// `facts.kv_bytes_per_token` is for an F16 cache.
#[must_use]
pub fn estimate(facts: &ModelFacts, engine: &EngineSettings, memory_override: Option<u64>) -> MemoryEstimate {
    let context = context_length(facts.context_length, engine);
    let per_token = match engine.kv_type {
        KvType::F16 => facts.kv_bytes_per_token,
        KvType::F32 => facts.kv_bytes_per_token.saturating_mul(2),
        // A byte for each number and 4 for every 32 of them; 5/8 covers heads down to 16 numbers.
        KvType::Q8 => facts.kv_bytes_per_token.saturating_mul(5).div_ceil(8),
    };
    let tokens = kv_cache_tokens(context, engine);
    let kv_bytes = per_token.saturating_mul(tokens);
    let overhead_bytes = BASE_OVERHEAD_BYTES + facts.file_bytes / OVERHEAD_PART;
    let weight_bytes = facts.weight_bytes;
    // What does not parse was refused before.
    let draft_memory = engine.draft.as_ref().and_then(|draft| draft.memory.as_ref());
    let draft_bytes = draft_memory.and_then(|memory| memory.bytes().ok());
    let sum = weight_bytes
        .saturating_add(kv_bytes)
        .saturating_add(overhead_bytes)
        .saturating_add(draft_bytes.unwrap_or(0));
    let total_bytes = memory_override.unwrap_or(sum);
    let kv_tokens = match engine.kv_cache_tokens {
        Some(_) => format!("{tokens} tokens for all requests"),
        None => format!("{context} tokens x {} requests", engine.concurrency),
    };
    let mut arithmetic = format!(
        "{} weights + {} KV cache ({kv_tokens} x {per_token} B) + {} overhead{} = {}",
        mib(weight_bytes),
        mib(kv_bytes),
        mib(overhead_bytes),
        draft_bytes.map_or_else(String::new, |bytes| format!(" + {} draft model", mib(bytes))),
        mib(sum),
    );
    if memory_override.is_some() {
        arithmetic.push_str(&format!("; spec.placement.memory reserves {}", mib(total_bytes)));
    }
    MemoryEstimate {
        weight_bytes,
        kv_bytes,
        overhead_bytes,
        total_bytes,
        total_summary: Some(mib(total_bytes)),
        arithmetic,
    }
}

/// Bytes for the eye.
#[must_use]
pub fn mib(bytes: u64) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    let value = bytes as f64 / MIB;
    if value >= 10_240.0 {
        format!("{:.1} GiB", value / 1024.0)
    } else {
        format!("{value:.0} MiB")
    }
}

#[cfg(test)]
mod tests {
    use freehold_crds::common::Quantity;
    use freehold_crds::model_deployment::DraftModel;

    use super::*;

    #[test]
    fn the_sum_is_that_of_its_parts() {
        let facts = ModelFacts {
            weight_bytes: 100 << 20,
            file_bytes: 100 << 20,
            kv_bytes_per_token: 1024,
            context_length: 4096,
            ..ModelFacts::default()
        };
        let engine = EngineSettings {
            context_length: Some(1024),
            concurrency: 4,
            ..EngineSettings::default()
        };
        let estimate = estimate(&facts, &engine, None);
        assert_eq!(estimate.kv_bytes, 4 << 20);
        assert_eq!(
            estimate.total_bytes,
            estimate.weight_bytes + estimate.kv_bytes + estimate.overhead_bytes
        );
        assert_eq!(
            estimate.arithmetic,
            "100 MiB weights + 4 MiB KV cache (1024 tokens x 4 requests x 1024 B) + 53 MiB overhead = 157 MiB"
        );
    }

    #[test]
    fn a_draft_model_takes_what_it_says() {
        let draft = |memory: Option<&str>| EngineSettings {
            draft: Some(DraftModel {
                path: "/models/small.gguf".to_owned(),
                memory: memory.map(|text| Quantity(text.to_owned())),
                ..DraftModel::default()
            }),
            ..EngineSettings::default()
        };
        let facts = ModelFacts::default();
        let without = estimate(&facts, &draft(None), None);
        let with = estimate(&facts, &draft(Some("200Mi")), None);
        assert_eq!(with.total_bytes, without.total_bytes + (200 << 20));
        assert!(
            with.arithmetic.contains(" + 200 MiB draft model = "),
            "{}",
            with.arithmetic
        );
        assert!(!without.arithmetic.contains("draft"));
    }

    #[test]
    fn the_context_never_exceeds_the_models_own() {
        let engine = EngineSettings {
            context_length: Some(100_000),
            ..EngineSettings::default()
        };
        assert_eq!(context_length(2048, &engine), 2048);
        assert_eq!(
            context_length(200_000, &EngineSettings::default()),
            DEFAULT_CONTEXT
        );
    }
}
