//! Texts to vectors: this engine beside candle-transformers, in one process, in turn.
//!
//! `bench_embeddings FOLDER [RUNS]`: medians of texts a second, for one text and for sixteen at once.

use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert;
use freehold_engine::{Engine, EngineOptions, Prompt, Special};

type Failure = Box<dyn std::error::Error>;

const TEXT: &str = "The harbour lies at the mouth of two rivers. Ships from the south bring copper, salt and oranges; \
ships from the north bring timber, furs and dried fish, and every barrel of herring pays for the lighthouse.";

fn reference(folder: &Path) -> Result<bert::BertModel, Failure> {
    let config: bert::Config = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
    let weights = std::fs::read(folder.join("model.safetensors"))?;
    let weights = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu)?;
    Ok(bert::BertModel::load(weights, &config)?)
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: bench_embeddings FOLDER [RUNS]")?;
    let runs: usize = arguments.next().map_or(Ok(5), |runs| runs.parse())?;
    let folder = Path::new(&folder);
    let engine = Engine::load(folder, &EngineOptions::default(), |_| ())?;
    let oracle = reference(folder)?;
    println!(
        "{:>6} {:>7} {:>12} {:>12} {:>6}",
        "texts", "tokens", "freehold/s", "candle/s", "ratio"
    );
    for count in [1, 16] {
        // A word more for each, so that no two have one length.
        let texts: Vec<String> = (0..count)
            .map(|i| format!("{TEXT}{}", " tide".repeat(i)))
            .collect();
        let tokens: Vec<Vec<u32>> = texts
            .iter()
            .map(|text| {
                engine.tokenizer().encode(
                    text,
                    Special {
                        add: true,
                        parse: false,
                    },
                )
            })
            .collect();
        let prompts: Vec<Prompt> = texts.into_iter().map(Prompt::Text).collect();
        let longest = tokens.iter().map(Vec::len).max().unwrap_or(0);
        let padded: Vec<u32> = tokens
            .iter()
            .flat_map(|text| text.iter().copied().chain(std::iter::repeat(0)).take(longest))
            .collect();
        let mask: Vec<u32> = tokens
            .iter()
            .flat_map(|text| (0..longest).map(|i| u32::from(i < text.len())))
            .collect();
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for run in 0..=runs {
            let begun = Instant::now();
            for _ in 0..16 / count {
                engine.embed(&prompts)?;
            }
            let own = 16.0 / begun.elapsed().as_secs_f64();
            let begun = Instant::now();
            for _ in 0..16 / count {
                let ids = Tensor::new(padded.as_slice(), &Device::Cpu)?.reshape((count, longest))?;
                let mask = Tensor::new(mask.as_slice(), &Device::Cpu)?.reshape((count, longest))?;
                oracle.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
            }
            // The first run warms up.
            if run > 0 {
                ours.push(own);
                theirs.push(16.0 / begun.elapsed().as_secs_f64());
            }
        }
        ours.sort_by(f64::total_cmp);
        theirs.sort_by(f64::total_cmp);
        let (own, other) = (ours[ours.len() / 2], theirs[theirs.len() / 2]);
        println!(
            "{count:>6} {longest:>7} {own:>12.1} {other:>12.1} {:>6.2}",
            own / other
        );
    }
    Ok(())
}
