//! The worker: one process, one model, one Unix socket.
//!
//! The agent starts it (`worker --socket … --model …`), reads what it says of itself on stdout, and
//! closes its stdin to end it. The gateway and the probes call it over the socket with the types of
//! [`freehold_gateway::worker`]. Start reading at [`run`].

mod beat;
mod convert;
mod serve;

use std::ffi::OsString;
use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, ValueEnum};
use freehold_crds::Device;
use freehold_crds::conditions::reason;
use freehold_engine::{DeviceChoice, Engine, EngineOptions, InvalidModel, KvType, LoadModel, Precision};
use freehold_gateway::worker::{WorkerFailed, WorkerLine, WorkerLoading, WorkerReady};
use sha2::Digest;
use tokio::net::UnixListener;
use tracing::{error, info};

use crate::store::facts::describe;
use crate::store::hash_reader;

/// Exit code of a worker whose next try would end the same way.
pub(crate) const EXIT_PERMANENT: u8 = 3;
/// The kernel takes a worker before the agent and before the machine's own services.
const OOM_SCORE: &str = "500";

/// Arguments of a worker. They are the agent's business, not a person's.
#[derive(Args, Clone, Debug)]
pub struct WorkerArgs {
    /// Unix socket to serve on
    #[arg(long)]
    pub socket: PathBuf,
    /// GGUF file, or folder with safetensors
    #[arg(long)]
    pub model: PathBuf,
    /// Longest context in tokens
    #[arg(long)]
    pub context: u32,
    /// Requests decoded at once
    #[arg(long, default_value_t = 4)]
    pub concurrency: u32,
    /// Requests that may wait
    #[arg(long, default_value_t = 32)]
    pub queue: u32,
    /// Device to use
    #[arg(long, value_enum, default_value_t = DeviceArg::Auto)]
    pub device: DeviceArg,
    /// Number format of the KV cache
    #[arg(long, value_enum, default_value_t = KvArg::F16)]
    pub kv: KvArg,
    /// How finely activations are rounded
    #[arg(long, value_enum, default_value_t = PrecisionArg::Standard)]
    pub precision: PrecisionArg,
    /// Tokens that the KV cache holds for all requests [default: the full context of each]
    #[arg(long)]
    pub kv_tokens: Option<u32>,
    /// Tokens kept for prompts that begin alike; 0: nothing is shared [default: one full context]
    #[arg(long)]
    pub prefix_tokens: Option<u32>,
    /// Guess the next tokens from the text so far, and check them
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub speculate: bool,
    /// GGUF file of a smaller model with the same vocabulary, which guesses where the text gives no guess
    #[arg(long)]
    pub draft: Option<PathBuf>,
    /// What the draft model's SHA-256 must be
    #[arg(long, requires = "draft")]
    pub draft_sha256: Option<String>,
    /// Threads that compute [default: as many as this process may keep busy]
    #[arg(long)]
    pub threads: Option<u32>,
}

/// A device on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DeviceArg {
    /// The best one.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An Apple GPU.
    Metal,
}

/// A KV cache format on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum KvArg {
    /// 16-bit floats.
    F16,
    /// 32-bit floats.
    F32,
    /// 8-bit integers with scales.
    Q8,
}

/// How finely activations are rounded, on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PrecisionArg {
    /// To 8 bits.
    Standard,
    /// To 16 bits: answers as with 32-bit floats, more to compute.
    High,
}

impl From<PrecisionArg> for Precision {
    fn from(argument: PrecisionArg) -> Self {
        match argument {
            PrecisionArg::Standard => Self::Standard,
            PrecisionArg::High => Self::High,
        }
    }
}

/// Loads the model and serves it until stdin closes. Does not return before the process should end.
#[must_use]
pub fn run(args: &WorkerArgs) -> ExitCode {
    lower_privileges();
    // Without its agent a worker has no purpose: it ends at once, whatever it is doing. Not a word is
    // said first: stderr may be gone too, and writing there would then panic.
    std::thread::spawn(|| {
        let mut byte = [0_u8; 1];
        while matches!(std::io::stdin().read(&mut byte), Ok(1)) {}
        std::process::exit(0);
    });
    match load(args) {
        Ok((engine, ready)) => serve_until_closed(args, engine, ready),
        Err(problem) => {
            let (reason, permanent) = classify(&problem);
            let message = explain(&problem);
            error!(reason, message, "Failed to load model");
            beat::say(&WorkerLine::Failed(WorkerFailed {
                reason: reason.to_owned(),
                message,
            }));
            ExitCode::from(if permanent { EXIT_PERMANENT } else { 1 })
        }
    }
}

fn load(args: &WorkerArgs) -> Result<(Engine, WorkerReady), LoadModel> {
    let started = Instant::now();
    beat::say(&WorkerLine::Loading(WorkerLoading {
        stage: "reading the model".to_owned(),
        fraction: 0.0,
    }));
    check_draft(args)?;
    let options = EngineOptions {
        draft: args.draft.clone(),
        device: match args.device {
            DeviceArg::Auto => DeviceChoice::Auto,
            DeviceArg::Cpu => DeviceChoice::Cpu,
            DeviceArg::Cuda => DeviceChoice::Cuda,
            DeviceArg::Metal => DeviceChoice::Metal,
        },
        context_length: Some(args.context),
        max_sequences: args.concurrency,
        max_queued: args.queue,
        threads: args.threads,
        kv_tokens: args.kv_tokens,
        prefix_tokens: args.prefix_tokens,
        speculate: args.speculate,
        precision: args.precision.into(),
        kv_type: match args.kv {
            KvArg::F16 => KvType::F16,
            KvArg::F32 => KvType::F32,
            KvArg::Q8 => KvType::Q8,
        },
        ..EngineOptions::default()
    };
    let engine = Engine::load(&args.model, &options, |_| ())?;
    let load_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let ready = WorkerReady {
        facts: describe(engine.facts(), None, false),
        context_length: u32::try_from(engine.context_length()).unwrap_or(u32::MAX),
        load_ms,
        device: match engine.device() {
            DeviceChoice::Auto | DeviceChoice::Cpu => Device::Cpu,
            DeviceChoice::Cuda => Device::Cuda,
            DeviceChoice::Metal => Device::Metal,
        },
        device_reason: engine.device_reason().map(str::to_owned),
    };
    info!(load_ms, model = %engine.facts().summary(), "Loaded model");
    Ok((engine, ready))
}

/// Checks the draft model's bytes. Those of the model itself the agent has checked.
fn check_draft(args: &WorkerArgs) -> Result<(), LoadModel> {
    let (Some(path), Some(expected)) = (&args.draft, &args.draft_sha256) else {
        return Ok(());
    };
    let refuse = |problem: InvalidModel| LoadModel::Draft {
        path: path.clone(),
        source: Box::new(problem.into()),
    };
    let hashed = std::fs::File::open(path).and_then(|file| hash_reader(file, |_| ()));
    let found = hashed.map_err(|source| {
        refuse(InvalidModel::OpenFile {
            path: path.clone(),
            source,
        })
    })?;
    let found = hex::encode(found.finalize());
    if found == *expected {
        return Ok(());
    }
    Err(refuse(InvalidModel::Inconsistent {
        what: "its sha256".to_owned(),
        found,
        allowed: format!("{expected}, as spec.engine.draft.sha256 says"),
    }))
}

/// The reason for the status, and whether a retry would end the same way.
fn classify(problem: &LoadModel) -> (&'static str, bool) {
    match problem {
        LoadModel::Draft { source, .. } => classify(source),
        LoadModel::Invalid(_) | LoadModel::NotANumber => (reason::INVALID_MODEL, true),
        LoadModel::InvalidOption { .. } => (reason::INVALID_SPEC, true),
        LoadModel::Compute(_) | LoadModel::Allocate(_) | LoadModel::StartThread(_) => {
            (reason::CRASHED, false)
        }
    }
}

/// The error with its causes.
fn explain(problem: &dyn std::error::Error) -> String {
    let mut text = problem.to_string();
    let mut source = problem.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn serve_until_closed(args: &WorkerArgs, engine: Engine, ready: WorkerReady) -> ExitCode {
    // One thread is enough: it moves small events. The engine computes on its own threads.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime.and_then(|runtime| {
        runtime.block_on(async {
            let listener = UnixListener::bind(&args.socket)?;
            let embedding = serve::Embedding::new(args.queue);
            beat::start(engine.clone(), embedding.clone())?;
            beat::say(&WorkerLine::Ready(Box::new(ready.clone())));
            axum::serve(listener, serve::router(engine, embedding, ready)).await
        })
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            let message = format!("failed to serve on {:?}: {problem}", args.socket);
            error!(message, "Failed to serve");
            beat::say(&WorkerLine::Failed(WorkerFailed {
                reason: reason::CRASHED.to_owned(),
                message,
            }));
            ExitCode::FAILURE
        }
    }
}

/// A worker reads files that strangers made. What it does not need is taken from it where that is cheap.
fn lower_privileges() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    // No core dump holds a prompt; memory that runs out costs the worker, not the machine.
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    if let Err(error) = setrlimit(Resource::Core, none) {
        info!(%error, "Core dumps stay as they are");
    }
    // Only Linux has it, and raising one's own score needs no right.
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
}

/// Environment that a worker needs beyond its arguments: candle's own threads, where it has work for
/// them, take their number from there.
pub(crate) fn environment(threads: Option<u32>) -> Option<(OsString, OsString)> {
    threads.map(|threads| ("RAYON_NUM_THREADS".into(), threads.to_string().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draft_model_with_other_bytes_is_not_loaded() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            worker: WorkerArgs,
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, b"abc").unwrap();
        let check = |sha256: &str| {
            let path = file.path().to_str().unwrap();
            let line = [
                "w",
                "--socket",
                "/s",
                "--model",
                "/m",
                "--context",
                "64",
                "--draft",
                path,
                "--draft-sha256",
                sha256,
            ];
            check_draft(&<Line as clap::Parser>::parse_from(line).worker)
        };
        let right = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert!(check(right).is_ok());
        let refused = check(&"0".repeat(64)).unwrap_err();
        assert_eq!(classify(&refused), (reason::INVALID_MODEL, true));
        let told = explain(&refused);
        assert!(
            told.contains(right) && told.contains("spec.engine.draft.sha256"),
            "{told}"
        );
    }
}
