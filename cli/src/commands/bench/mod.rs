//! `freehold bench`: how fast this machine runs a model, alone and through the gateway.
//!
//! [`engine`] measures in this process, [`bandwidth`] the memory under it, [`http`] the whole path; [`numbers`]
//! does the arithmetic.

mod bandwidth;
mod engine;
mod http;
mod numbers;
mod perplexity;

use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use freehold_engine::Precision;
use freehold_node_agent::worker::PrecisionArg;
use indicatif::{ProgressBar, ProgressStyle};

use crate::output;
use numbers::{EngineFigures, HttpFigures, Report, weights_read};

/// Settings of `freehold bench`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  freehold bench model.gguf                                  the engine alone\n  freehold bench model.gguf --http                           and through a gateway started for it\n  freehold bench smollm2 --http http://127.0.0.1:11480/v1    a gateway that runs already"
)]
pub struct Arguments {
    /// GGUF file; with --http URL the model's name on that gateway
    pub model: String,
    /// Print everything that was measured as JSON
    #[arg(long)]
    pub json: bool,
    /// Threads that compute; as many as this process may keep busy if absent
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=512))]
    pub threads: Option<u32>,
    /// Vector instructions that the engine alone computes with, such as avx2; the best of this processor if absent
    #[arg(long, value_name = "NAME", conflicts_with = "http")]
    pub instructions: Option<String>,
    /// How finely activations are rounded; of the engine alone
    #[arg(long, value_enum, default_value_t = PrecisionArg::Standard, conflicts_with = "http")]
    pub precision: PrecisionArg,
    /// How often each is measured; the median is shown
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = positive)]
    pub rounds: usize,
    /// Tokens of the prompt whose reading is measured
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive)]
    pub prompt_tokens: usize,
    /// Tokens that each sequence writes
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = positive)]
    pub decode_tokens: usize,
    /// Tokens that are in a sequence's context already when its writing is measured
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = positive)]
    pub depth: usize,
    /// Numbers of sequences that write together
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 8, 16], value_parser = positive)]
    pub sequences: Vec<usize>,
    /// Measure how fast the memory is read, and how much of that decoding one sequence uses
    #[arg(long)]
    pub bandwidth: bool,
    /// Perplexity of this text instead of speed, in windows as llama.cpp's own program has them
    #[arg(long, value_name = "TEXT", conflicts_with = "http")]
    pub perplexity: Option<PathBuf>,
    /// Tokens in a window of --perplexity
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive)]
    pub window: usize,
    /// Compute --perplexity in 32-bit floats throughout: what rounding costs is the difference
    #[arg(long, requires = "perplexity", conflicts_with = "precision")]
    pub exact: bool,
    /// Measure concurrent chats too: through this gateway, or without URL through one started for it
    #[arg(long, value_name = "URL", num_args = 0..=1)]
    pub http: Option<Option<String>>,
    /// Numbers of chats that run at once
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 8, 32], value_parser = positive)]
    pub chats: Vec<usize>,
    /// Longest answer of a chat in tokens
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    pub answer_tokens: usize,
    /// API key, where a policy of the gateway asks for one
    #[arg(long, env = "FREEHOLD_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (1..=65_536).contains(&number) => Ok(number),
        _ => Err("it must be a number from 1 to 65536".to_owned()),
    }
}

/// What to measure, and how often.
#[derive(Clone, Debug)]
pub struct Plan {
    threads: Option<u32>,
    instructions: Option<String>,
    precision: Precision,
    rounds: usize,
    prompt_tokens: usize,
    decode_tokens: usize,
    depth: usize,
    sequences: Vec<usize>,
    chats: Vec<usize>,
    answer_tokens: usize,
}

/// Measures and prints.
///
/// # Errors
/// When the model cannot be loaded or an answer fails.
pub async fn run(arguments: Arguments) -> Result<()> {
    let Arguments {
        model,
        json,
        threads,
        instructions,
        precision,
        rounds,
        prompt_tokens,
        decode_tokens,
        depth,
        sequences,
        bandwidth,
        perplexity,
        window,
        exact,
        http,
        chats,
        answer_tokens,
        api_key,
    } = arguments;
    if let Some(text) = perplexity {
        let reading = perplexity::Reading {
            model: PathBuf::from(model),
            text,
            window,
            precision: if exact { Precision::Float } else { precision.into() },
            threads,
            instructions,
        };
        return read(reading, json).await;
    }
    let plan = Plan {
        threads,
        instructions,
        precision: precision.into(),
        rounds,
        prompt_tokens,
        decode_tokens,
        depth,
        sequences,
        chats,
        answer_tokens,
    };
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        engine: None,
        http: None,
    };
    match http {
        Some(Some(base_url)) => {
            if !base_url.starts_with("http://") && !base_url.starts_with("https://") {
                bail!(
                    "--http is followed by {base_url:?}, which is no address such as http://127.0.0.1:11480/v1; to measure a file through a gateway of its own, write --http last"
                );
            }
            let bar = progress(http::steps(&plan));
            let step = |what: &str| advance(&bar, what);
            report.http = Some(http::measure(&base_url, &model, api_key, &plan, step).await?);
            bar.finish_and_clear();
        }
        own => {
            let path = PathBuf::from(model);
            let through_gateway = own.is_some();
            let more = if through_gateway { http::steps(&plan) } else { 0 };
            let bar = progress(engine::steps(&plan) + more);
            let (bar_there, path_there, plan_there) = (bar.clone(), path.clone(), plan.clone());
            let measured = tokio::task::spawn_blocking(move || {
                engine::measure(&path_there, &plan_there, |what| advance(&bar_there, what))
            });
            let mut figures = measured.await??;
            if bandwidth {
                let threads = plan.threads.map_or_else(cores, |threads| threads as usize);
                let measured =
                    tokio::task::spawn_blocking(move || bandwidth::measure(threads, bandwidth::BYTES));
                figures.memory_bytes_per_second = Some(measured.await??);
            }
            report.engine = Some(figures);
            if through_gateway {
                report.http = Some(http::measure_own(&path, &plan, |what| advance(&bar, what)).await?);
            }
            bar.finish_and_clear();
        }
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        lines(&report, rounds).iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}

async fn read(reading: perplexity::Reading, json: bool) -> Result<()> {
    let bar = progress(1);
    let bar_there = bar.clone();
    let measured = tokio::task::spawn_blocking(move || {
        perplexity::measure(&reading, |done, all| {
            bar_there.set_length(all as u64);
            bar_there.set_message("windows read");
            bar_there.set_position(done as u64);
        })
    });
    let found = measured.await??;
    bar.finish_and_clear();
    if json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        println!(
            "perplexity {:.4} over {} tokens, in windows of {}",
            found.perplexity, found.counted_tokens, found.window_tokens
        );
    }
    Ok(())
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn progress(steps: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64);
    let style = ProgressStyle::with_template("{bar:30} {pos} of {len}  {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    bar
}

fn advance(bar: &ProgressBar, what: &str) {
    bar.set_message(what.to_owned());
    bar.inc(1);
}

/// The report for the eye.
fn lines(report: &Report, rounds: usize) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(engine) = &report.engine {
        let computed = if engine.device == "cpu" {
            &engine.instructions
        } else {
            engine.device
        };
        let precision = match engine.precision {
            "standard" => String::new(),
            precision => format!(", {precision} precision"),
        };
        lines.push(format!(
            "{}, {computed}{precision}, medians of {rounds}",
            engine.model
        ));
        lines.extend(output::align(&engine_rows(engine)));
    }
    if let Some(http) = &report.http {
        if !lines.is_empty() {
            lines.push(String::new());
        }
        lines.push(format!("{} through {}", http.model, http.base_url));
        lines.extend(output::align(&http_rows(http)));
    }
    lines
}

fn engine_rows(engine: &EngineFigures) -> Vec<Vec<String>> {
    let mut rows = vec![vec![
        format!("prefill of {} tokens", engine.prefill.tokens),
        format!("{:.1} tokens/s", engine.prefill.tokens_per_second.median),
    ]];
    for pace in &engine.decode {
        let name = match pace.sequences {
            1 => format!("decode of {} tokens", pace.tokens),
            several => format!("decode of {} tokens, {several} sequences", pace.tokens),
        };
        rows.push(vec![
            name,
            format!("{:.1} tokens/s", pace.tokens_per_second.median),
        ]);
    }
    rows.push(vec![
        "load".to_owned(),
        format!("{:.0} ms", engine.load_ms.median),
    ]);
    for (name, resident) in [
        ("memory, loaded", engine.resident_loaded_bytes),
        ("memory, after the work", engine.resident_worked_bytes),
    ] {
        if let Some(resident) = resident {
            let ratio = resident as f64 / engine.file_bytes.max(1) as f64;
            rows.push(vec![
                name.to_owned(),
                format!("{} ({ratio:.2} of the file)", output::bytes(resident)),
            ]);
        }
    }
    if let Some(most) = engine.memory_bytes_per_second {
        let single = engine.decode.iter().find(|pace| pace.sequences == 1);
        let used = single.map_or_else(String::new, |pace| {
            let share = weights_read(engine.file_bytes, pace.tokens_per_second.median) / most;
            format!("; decoding one sequence reads {:.0} % of that", share * 100.0)
        });
        rows.push(vec![
            "memory is read with".to_owned(),
            format!("{:.1} GB/s{used}", most / 1e9),
        ]);
    }
    rows
}

fn http_rows(http: &HttpFigures) -> Vec<Vec<String>> {
    let header = ["CHATS", "TOKENS/S", "FIRST TOKEN P50", "P95", "ANSWERS"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for chats in &http.chats {
        rows.push(vec![
            chats.concurrent.to_string(),
            format!("{:.1}", chats.tokens_per_second),
            format!("{:.0} ms", chats.first_token_p50_ms),
            format!("{:.0} ms", chats.first_token_p95_ms),
            chats.answers.to_string(),
        ]);
    }
    rows
}
