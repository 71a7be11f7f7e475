//! Tokens a second of the engine beside candle-transformers, and memory beside the file's size.
//!
//! ```sh
//! cargo run --release -p freehold-engine --example bench_engine -- FILE.gguf [RUNS]
//! ```
//! Both run the same file in this process, in turn, so that what else the machine does hits both; the
//! figures are medians; with 0 RUNS the engine runs alone, for a profiler. Memory is the engine's alone: it is measured before the other is loaded.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use candle_core::quantized::gguf_file;
use candle_core::{D, Device, Tensor};
use candle_transformers::models::{quantized_gemma3, quantized_llama};
use freehold_engine::{
    Engine, EngineOptions, GenerateEvent, GenerateRequest, Prompt, SamplingParams, Special,
};

type Outcome<T> = Result<T, Box<dyn Error>>;

const PREFILL: usize = 512;
const DECODE: usize = 128;
const BATCH: usize = 8;
const BATCH_DECODE: usize = 64;
const TEXT: &str = "The lighthouse keeper wrote down the wind, the height of the waves and the name of every \
    ship that passed. In winter nobody came for weeks, and the list of ships grew short. ";

/// candle-transformers' models.
enum Peer {
    Llama(quantized_llama::ModelWeights),
    Gemma(quantized_gemma3::ModelWeights),
}

impl Peer {
    fn load(path: &Path, architecture: &str) -> Outcome<Self> {
        let mut file = std::fs::File::open(path)?;
        let content = gguf_file::Content::read(&mut file)?;
        Ok(match architecture {
            "gemma3" => Self::Gemma(quantized_gemma3::ModelWeights::from_gguf(
                content,
                &mut file,
                &Device::Cpu,
            )?),
            _ => Self::Llama(quantized_llama::ModelWeights::from_gguf(
                content,
                &mut file,
                &Device::Cpu,
            )?),
        })
    }

    /// Reads rows of `tokens` at `position` and gives the best next token of each row.
    fn step(&mut self, tokens: &Tensor, position: usize) -> Outcome<Tensor> {
        let logits = match self {
            Self::Llama(model) => model.forward(tokens, position)?,
            Self::Gemma(model) => model.forward(tokens, position)?,
        };
        Ok(logits.argmax(D::Minus1)?.reshape((tokens.dim(0)?, 1))?)
    }

    /// Tokens a second of prefill and of decoding after it.
    fn single(&mut self, prompt: &[u32]) -> Outcome<(f64, f64)> {
        let started = Instant::now();
        let mut next = self.step(&Tensor::new(prompt, &Device::Cpu)?.unsqueeze(0)?, 0)?;
        let prefill = prompt.len() as f64 / started.elapsed().as_secs_f64();
        let started = Instant::now();
        for index in 0..DECODE {
            next = self.step(&next, prompt.len() + index)?;
        }
        Ok((prefill, DECODE as f64 / started.elapsed().as_secs_f64()))
    }

    /// Tokens a second of sequences in step. The peer reads no batch of prompts, so they begin empty.
    fn batch(&mut self) -> Outcome<f64> {
        let mut next = Tensor::new(vec![vec![5_u32]; BATCH], &Device::Cpu)?;
        let started = Instant::now();
        for index in 0..BATCH_DECODE {
            next = self.step(&next, index)?;
        }
        Ok((BATCH * BATCH_DECODE) as f64 / started.elapsed().as_secs_f64())
    }
}

/// The engine, asked so that no answer ends early.
struct Ours {
    engine: Engine,
    bias: Vec<(u32, f32)>,
}

/// When an answer's first and last pieces came.
#[derive(Clone, Copy)]
struct Times {
    first: Duration,
    end: Duration,
    tokens: usize,
}

impl Ours {
    fn load(path: &Path) -> Outcome<Self> {
        let options = EngineOptions {
            context_length: Some(1024),
            max_sequences: BATCH as u32,
            prefix_tokens: Some(0),
            speculate: false,
            ..EngineOptions::default()
        };
        let engine = Engine::load(path, &options, |_| ())?;
        let ends = 0..engine.tokenizer().vocab_size() as u32;
        let bias = ends
            .filter(|&token| engine.tokenizer().is_end_of_generation(token))
            .map(|token| (token, -100.0))
            .collect();
        Ok(Self { engine, bias })
    }

    fn ask(&self, prompts: &[Vec<u32>], count: usize) -> Outcome<Vec<Times>> {
        let started = Instant::now();
        let (sender, events) = channel();
        let mut handles = Vec::new();
        for prompt in prompts {
            let request = GenerateRequest {
                id: "bench".to_owned(),
                prompt: Prompt::Tokens(prompt.clone()),
                max_tokens: Some(count as u32),
                max_context: None,
                scope: String::new(),
                constraint: None,
                stop: Vec::new(),
                sampling: SamplingParams {
                    logit_bias: self.bias.clone(),
                    ..SamplingParams::default()
                },
            };
            let (sender, mut first) = (sender.clone(), None);
            let sink = Box::new(move |event| {
                match event {
                    GenerateEvent::Started { .. } => {}
                    GenerateEvent::Text { .. } => {
                        first.get_or_insert_with(|| started.elapsed());
                    }
                    GenerateEvent::Finished(finished) => {
                        let end = started.elapsed();
                        let _ = sender.send(Times {
                            first: first.unwrap_or(end),
                            end,
                            tokens: finished.completion_tokens,
                        });
                    }
                }
                ControlFlow::Continue(())
            });
            handles.push(self.engine.generate(request, sink)?);
        }
        drop(sender);
        Ok(events.iter().collect())
    }

    fn single(&self, prompt: &[u32]) -> Outcome<(f64, f64)> {
        let times = self.ask(&[prompt.to_vec()], DECODE + 1)?;
        let times = times.first().ok_or("the engine gave no answer")?;
        let prefill = prompt.len() as f64 / times.first.as_secs_f64();
        let decode = (times.tokens - 1) as f64 / (times.end - times.first).as_secs_f64();
        Ok((prefill, decode))
    }

    fn batch(&self, prompt: &[u32]) -> Outcome<f64> {
        let prompts = vec![prompt.get(..1).unwrap_or(prompt).to_vec(); BATCH];
        let started = Instant::now();
        let times = self.ask(&prompts, BATCH_DECODE)?;
        let tokens: usize = times.iter().map(|times| times.tokens).sum();
        Ok(tokens as f64 / started.elapsed().as_secs_f64())
    }
}

/// Bytes of this process in memory, where the system tells.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Outcome<()> {
    let mut arguments = std::env::args().skip(1);
    let path: PathBuf = arguments
        .next()
        .ok_or("usage: bench_engine FILE.gguf [RUNS]")?
        .into();
    let runs: usize = arguments.next().map_or(Ok(5), |runs| runs.parse())?;
    let started = Instant::now();
    let ours = Ours::load(&path)?;
    let loaded = started.elapsed();
    let special = Special {
        add: true,
        parse: false,
    };
    let mut prompt = ours.engine.tokenizer().encode(&TEXT.repeat(40), special);
    prompt.truncate(PREFILL);
    ours.single(&prompt)?;
    let facts = ours.engine.facts().clone();
    let (resident, mib) = (resident().unwrap_or(0), f64::from(1 << 20));
    println!(
        "{}: loaded in {:.2} s, {:.1} MiB resident after {} tokens, file {:.1} MiB, ratio {:.2}",
        facts.summary(),
        loaded.as_secs_f64(),
        resident as f64 / mib,
        PREFILL + DECODE,
        facts.file_bytes as f64 / mib,
        resident as f64 / facts.file_bytes as f64
    );
    if runs == 0 {
        let mut alone = Vec::new();
        for _ in 0..5 {
            let (decode, prefill) = (ours.single(&prompt[..16])?.1, ours.single(&prompt)?.0);
            alone.push((prefill, decode));
        }
        let batch = median(
            (0..3)
                .map(|_| ours.batch(&prompt))
                .collect::<Outcome<Vec<_>>>()?
                .into_iter(),
        );
        println!(
            "alone: prefill {:.1}, decode {:.1}, {BATCH} sequences {batch:.1} tokens/s",
            median(alone.iter().map(|run| run.0)),
            median(alone.iter().map(|run| run.1)),
        );
        return Ok(());
    }
    let mut peer = Peer::load(&path, &facts.architecture)?;
    peer.single(&prompt)?;
    let mut results = Vec::new();
    for _ in 0..runs {
        let ours = (ours.single(&prompt)?, ours.batch(&prompt)?);
        results.push((ours, (peer.single(&prompt)?, peer.batch()?)));
    }
    println!("tokens/s (medians of {runs})  | freehold | candle-transformers | ratio");
    type Pick = fn(&((f64, f64), f64)) -> f64;
    let rows: [(&str, Pick); 3] = [
        ("prefill of 512 tokens", |result| result.0.0),
        ("decode of 128 tokens", |result| result.0.1),
        ("8 sequences decoded", |result| result.1),
    ];
    for (name, pick) in rows {
        let ours = median(results.iter().map(|result| pick(&result.0)));
        let theirs = median(results.iter().map(|result| pick(&result.1)));
        println!("{name:28} | {ours:8.1} | {theirs:19.1} | {:.2}", ours / theirs);
    }
    Ok(())
}
