//! `freehold inspect`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use freehold_crds::model_deployment::{EngineSettings, ModelFacts};
use freehold_engine::{KvType, ModelKind, inspect};
use freehold_rules::plan::memory;

use crate::output;

/// Settings of `freehold inspect`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// GGUF file, or folder with model.safetensors, config.json and tokenizer.json
    pub file: PathBuf,
    /// Context in tokens to reckon memory for
    #[arg(long, default_value_t = memory::DEFAULT_CONTEXT)]
    pub context: u32,
    /// Requests at once to reckon memory for
    #[arg(long, default_value_t = 4)]
    pub concurrency: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Says what a file holds; ends with 1 when it is not sound.
///
/// # Errors
/// When the answer cannot be printed.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let facts = match inspect::inspect(&arguments.file) {
        Ok(facts) => facts,
        Err(error) => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                text.push_str(&format!(": {cause}"));
                source = cause.source();
            }
            eprintln!("not sound: {text}");
            return Ok(ExitCode::FAILURE);
        }
    };
    let engine = EngineSettings {
        context_length: Some(arguments.context),
        concurrency: arguments.concurrency,
        ..EngineSettings::default()
    };
    let model = ModelFacts {
        file_bytes: facts.file_bytes,
        weight_bytes: facts.weight_bytes,
        kv_bytes_per_token: facts.kv_bytes_per_token(KvType::F16),
        context_length: facts.context_length,
        ..ModelFacts::default()
    };
    let estimate = memory::estimate(&model, &engine, None);
    if arguments.json {
        let memory = serde_json::to_value(&estimate)?;
        println!(
            "{}",
            serde_json::to_string_pretty(
                &serde_json::json!({"sound": true, "model": facts, "memory": memory})
            )?
        );
        return Ok(ExitCode::SUCCESS);
    }
    let task = match facts.kind {
        ModelKind::Generate => "writes text",
        ModelKind::Embed => "turns text into vectors",
    };
    let template = if facts.has_chat_template { "yes" } else { "no" };
    let rows = [
        ("Name", facts.name.clone().unwrap_or_else(|| "-".to_owned())),
        ("Model", format!("{} ({task})", facts.summary())),
        ("Format", facts.format.to_string()),
        (
            "Licence",
            facts.licence.clone().unwrap_or_else(|| "not told".to_owned()),
        ),
        ("File", output::bytes(facts.file_bytes)),
        ("Context", format!("{} tokens", facts.context_length)),
        (
            "Shape",
            format!(
                "{} layers, hidden {}, {} heads ({} for keys and values) of {}",
                facts.block_count,
                facts.embedding_length,
                facts.head_count,
                facts.kv_head_count,
                facts.head_dim
            ),
        ),
        (
            "Vocabulary",
            format!("{} tokens, chat template: {template}", facts.vocab_size),
        ),
        ("Memory", estimate.arithmetic.clone()),
        ("Sound", "yes".to_owned()),
    ];
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(name, value)| vec![name.to_owned(), value])
        .collect();
    println!("{}", output::align(&rows).join("\n"));
    Ok(ExitCode::SUCCESS)
}
