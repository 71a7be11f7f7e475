//! Where a decoder computes: this engine's own kernels on the CPU, or candle's on a GPU.
//!
//! ```text
//! begin ─▶ open the device that is asked for ─▶ weights, cache, one real step ─▶ Runner
//!             └── it cannot be had, or has no room: the CPU, and a reason for the status
//! ```
//! The scheduler sees a [`Runner`] and a [`KvCache`] that counts blocks. With a GPU the cache counts only: the
//! numbers lie on the device, in the same blocks ([`decoder`]).

mod decoder;
mod step;

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::Device;
use tracing::{info, warn};

use crate::LoadModel;
use crate::engine::{DeviceChoice, EngineOptions, LoadProgress, Precision};
use crate::error::quote;
use crate::gguf::GgufFile;
use crate::inspect::KvType;
use crate::kernels::{Compute, Dispatch, Rounding, WeightPrecision, available_threads};
use crate::kv::{BlockTable, KvCache};
use crate::model::{Decoder, DecoderConfig, Row};
use decoder::DeviceDecoder;

/// What the decoder for devices was held to the CPU's answers with.
const ARCHITECTURES: &[&str] = &["llama", "qwen2", "qwen3", "gemma3"];

/// A decoder, wherever it computes.
pub(crate) enum Runner {
    Cpu(Box<Decoder>),
    Device(Box<DeviceDecoder>),
}

/// A decoder that has computed its first step.
pub(crate) struct Begun {
    pub(crate) runner: Runner,
    pub(crate) cache: KvCache,
    pub(crate) device: DeviceChoice,
    /// Why that is not the device that was asked for.
    pub(crate) reason: Option<String>,
}

/// What a decoder begins with.
pub(crate) struct Beginning<'a> {
    pub(crate) file: &'a GgufFile,
    pub(crate) config: DecoderConfig,
    pub(crate) options: &'a EngineOptions,
    /// Blocks of the KV cache, and how many of them stay without a user.
    pub(crate) blocks: (usize, usize),
    /// The token of the first step.
    pub(crate) token: u32,
    /// The threads of a model that takes turns with this one.
    pub(crate) compute: Option<Compute>,
}

impl Runner {
    pub(crate) fn config(&self) -> &DecoderConfig {
        match self {
            Self::Cpu(decoder) => decoder.config(),
            Self::Device(decoder) => decoder.config(),
        }
    }

    /// The threads that it computes with.
    pub(crate) fn compute(&self) -> Option<&Compute> {
        match self {
            Self::Cpu(decoder) => Some(decoder.compute()),
            Self::Device(_) => None,
        }
    }

    /// One step; see [`Decoder::forward`].
    pub(crate) fn forward(
        &mut self,
        rows: &[Row],
        tables: &[&BlockTable],
        cache: &mut KvCache,
    ) -> candle_core::Result<()> {
        match self {
            Self::Cpu(decoder) => {
                decoder.forward(rows, tables, cache);
                Ok(())
            }
            Self::Device(decoder) => decoder.forward(rows, tables),
        }
    }

    /// What the latest step gave.
    pub(crate) fn logits(&mut self) -> &mut [f32] {
        match self {
            Self::Cpu(decoder) => decoder.logits(),
            Self::Device(decoder) => decoder.logits(),
        }
    }
}

/// Loads a decoder on the device that is asked for, or on the CPU where that cannot be.
pub(crate) fn begin(
    beginning: &Beginning<'_>,
    mut progress: impl FnMut(LoadProgress),
) -> Result<Begun, LoadModel> {
    let options = beginning.options;
    let asked = options.device;
    let begun = |(runner, cache), device, reason| Begun {
        runner,
        cache,
        device,
        reason,
    };
    let reason = match open(options, &beginning.config.architecture) {
        Opened::Cpu(reason) => reason,
        Opened::Device(kind, device) => match on_device(beginning, &device, &mut progress) {
            Ok(ready) => {
                info!(device = ?kind, "Computes on a device through candle");
                return Ok(begun(ready, kind, None));
            }
            // A model that is unsound is so on the CPU too, and is told there.
            Err(error) => {
                let reason = format!(
                    "{kind:?} did not take the model ({}); it runs on the CPU",
                    causes(&error)
                );
                warn!(reason, "Falls back to the CPU");
                Some(reason)
            }
        },
    };
    let ready = on_cpu(beginning, &mut progress)?;
    // Who asked for nothing in particular gets what there is; a device that failed is news all the same.
    let tried = matches!(asked, DeviceChoice::Cuda | DeviceChoice::Metal) || reason.is_some();
    Ok(begun(ready, DeviceChoice::Cpu, reason.filter(|_| tried)))
}

/// An embedding model computes on the CPU, whatever is asked for.
pub(crate) fn encoder_reason(asked: DeviceChoice) -> Option<String> {
    match asked {
        DeviceChoice::Auto | DeviceChoice::Cpu => None,
        other => Some(format!(
            "{other:?} was asked for; embedding models compute on the CPU in this version"
        )),
    }
}

enum Opened {
    Device(DeviceChoice, Device),
    /// Why not the device that was asked for.
    Cpu(Option<String>),
}

/// Opens the device that is asked for.
fn open(options: &EngineOptions, architecture: &str) -> Opened {
    let asked = options.device;
    if options.through_candle {
        return Opened::Device(DeviceChoice::Cpu, Device::Cpu);
    }
    let wanted: &[DeviceChoice] = match asked {
        DeviceChoice::Cpu => return Opened::Cpu(None),
        DeviceChoice::Auto => &[DeviceChoice::Cuda, DeviceChoice::Metal],
        DeviceChoice::Cuda => &[DeviceChoice::Cuda],
        DeviceChoice::Metal => &[DeviceChoice::Metal],
    };
    let mut missing = None;
    for &kind in wanted {
        match open_one(kind) {
            Ok(device) => match unfit(options, architecture) {
                None => return Opened::Device(kind, device),
                Some(why) => return Opened::Cpu(Some(format!("{why}; it runs on the CPU"))),
            },
            Err(why) => missing = Some(why),
        }
    }
    // Nothing in particular was asked for, and there is nothing: that is no news.
    let missing = missing.filter(|_| asked != DeviceChoice::Auto);
    Opened::Cpu(missing.map(|why| format!("{asked:?} was asked for; {why}; it runs on the CPU")))
}

/// Why a model cannot run on a device, though there is one.
fn unfit(options: &EngineOptions, architecture: &str) -> Option<String> {
    if options.kv_type == KvType::Q8 {
        return Some("a KV cache of 8 bits is kept on the CPU only".to_owned());
    }
    if options.precision == Precision::High {
        return Some("precision High is computed on the CPU only".to_owned());
    }
    (!ARCHITECTURES.contains(&architecture)).then(|| {
        let known = ARCHITECTURES.join(", ");
        format!("on devices this version computes {known}, and this model is {architecture}")
    })
}

fn open_one(kind: DeviceChoice) -> Result<Device, String> {
    let (built, feature) = match kind {
        DeviceChoice::Auto | DeviceChoice::Cpu => return Ok(Device::Cpu),
        DeviceChoice::Cuda => (cfg!(feature = "cuda"), "cuda"),
        DeviceChoice::Metal => (cfg!(feature = "metal"), "metal"),
    };
    if !built {
        return Err(format!(
            "this build computes on the CPU only (built without --features {feature})"
        ));
    }
    // A driver that is missing or too old makes its bindings panic.
    let opened = catch_unwind(AssertUnwindSafe(|| match kind {
        DeviceChoice::Cuda => Device::new_cuda(0),
        _ => Device::new_metal(0),
    }));
    match opened {
        Ok(Ok(device)) => Ok(device),
        Ok(Err(error)) => Err(format!("no {kind:?} device answers ({error})")),
        Err(_) => Err(format!("the driver for {kind:?} is missing or does not fit")),
    }
}

fn causes(error: &LoadModel) -> String {
    let source = std::error::Error::source(error);
    source.map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

/// The sets of vector instructions that this processor has and that there are kernels for, the best first: what
/// [`EngineOptions::instructions`] may name.
pub fn instructions() -> Vec<String> {
    Dispatch::available().map(Dispatch::option).collect()
}

/// The CPU's threads and instructions, as the options ask for them. Who has loaded a model says what it computes with
/// ([`report`]).
pub(crate) fn compute(options: &EngineOptions) -> Result<Compute, LoadModel> {
    let threads = options
        .threads
        .map_or_else(available_threads, |n| n.max(1) as usize);
    let dispatch = match &options.instructions {
        None => Dispatch::best(),
        Some(name) => Dispatch::named(name).ok_or_else(|| LoadModel::InvalidOption {
            field: "instructions",
            found: quote(name),
            allowed: format!("this processor has {}", instructions().join(", ")),
        })?,
    };
    Compute::new(threads, dispatch).map_err(LoadModel::StartThread)
}

/// Logs what a model is computed with.
pub(crate) fn report(compute: &Compute) {
    let (threads, kernels) = (compute.pool.threads(), compute.dispatch.name());
    info!(threads, kernels, "Computes on the CPU");
}

fn on_cpu(
    beginning: &Beginning<'_>,
    progress: &mut impl FnMut(LoadProgress),
) -> Result<(Runner, KvCache), LoadModel> {
    let Beginning {
        file,
        config,
        options,
        blocks: (capacity, keep),
        token,
        compute,
    } = beginning;
    let compute = match compute {
        Some(shared) => shared.clone(),
        None => self::compute(options)?,
    };
    let (weights, rounding) = match options.precision {
        Precision::Standard => (WeightPrecision::Native, Rounding::Once),
        Precision::High => (WeightPrecision::Native, Rounding::Twice),
        Precision::Float => (WeightPrecision::Float, Rounding::Once),
    };
    let decoder = Decoder::load(
        file,
        config.clone(),
        compute.with_rounding(rounding),
        weights,
        |layers_done, layers_total| {
            progress(LoadProgress {
                layers_done,
                layers_total,
            });
        },
    )?;
    report(decoder.compute());
    let cache = KvCache::new(decoder.kv_shape(), options.kv_type, *capacity, *keep);
    first_pass(Runner::Cpu(Box::new(decoder)), cache, *token)
}

fn on_device(
    beginning: &Beginning<'_>,
    device: &Device,
    progress: &mut impl FnMut(LoadProgress),
) -> Result<(Runner, KvCache), LoadModel> {
    let (capacity, keep) = beginning.blocks;
    let decoder = DeviceDecoder::load(beginning, device, |layers_done, layers_total| {
        progress(LoadProgress {
            layers_done,
            layers_total,
        });
    })?;
    let cache = KvCache::of_blocks_elsewhere(capacity, keep);
    first_pass(Runner::Device(Box::new(decoder)), cache, beginning.token)
}

/// One real step: a model that cannot answer is found out before it takes requests.
fn first_pass(mut runner: Runner, mut cache: KvCache, token: u32) -> Result<(Runner, KvCache), LoadModel> {
    let mut table = BlockTable::default();
    let token = token.min(runner.config().vocab_size as u32 - 1);
    if !cache.reserve(&mut table, 1) {
        return Err(LoadModel::InvalidOption {
            field: "context_length",
            found: "without room for one token".to_owned(),
            allowed: "more".to_owned(),
        });
    }
    let row = Row {
        token,
        position: 0,
        sequence: 0,
        wants_logits: true,
        of_prompt: true,
    };
    runner.forward(&[row], &[&table], &mut cache)?;
    cache.release(&mut table);
    let finite = runner.logits().iter().all(|x| x.is_finite());
    finite.then_some((runner, cache)).ok_or(LoadModel::NotANumber)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(device: DeviceChoice) -> EngineOptions {
        EngineOptions {
            device,
            ..EngineOptions::default()
        }
    }

    fn reason(opened: Opened) -> Option<String> {
        match opened {
            Opened::Cpu(reason) => reason,
            Opened::Device(..) => panic!("a device was opened"),
        }
    }

    #[test]
    fn a_device_that_cannot_be_had_is_told_with_the_reason() {
        for kind in [DeviceChoice::Cuda, DeviceChoice::Metal] {
            let built = match kind {
                DeviceChoice::Cuda => cfg!(feature = "cuda"),
                _ => cfg!(feature = "metal"),
            };
            if built {
                continue;
            }
            let why = reason(open(&options(kind), "llama")).expect("a reason");
            assert!(why.contains(&format!("{kind:?} was asked for")), "{why}");
            assert!(why.contains("--features") && why.contains("on the CPU"), "{why}");
        }
        assert_eq!(reason(open(&options(DeviceChoice::Cpu), "llama")), None);
    }

    #[test]
    fn instructions_that_the_processor_lacks_are_told_with_those_it_has() {
        let with = |name: &str| EngineOptions {
            instructions: Some(name.to_owned()),
            threads: Some(1),
            ..EngineOptions::default()
        };
        let all = instructions();
        assert_eq!(all.last().map(String::as_str), Some("portable"));
        for name in &all {
            assert_eq!(&compute(&with(name)).unwrap().dispatch.option(), name);
        }
        let Err(error) = compute(&with("sse9")) else {
            panic!("there is no SSE9");
        };
        assert_eq!(
            error.to_string(),
            format!("instructions is sse9; this processor has {}", all.join(", "))
        );
    }

    #[test]
    fn what_devices_do_not_compute_is_named() {
        let why = unfit(&options(DeviceChoice::Cuda), "phi3").expect("unfit");
        assert!(why.contains("phi3") && why.contains("gemma3"), "{why}");
        let options = EngineOptions {
            kv_type: KvType::Q8,
            ..EngineOptions::default()
        };
        assert!(unfit(&options, "llama").expect("unfit").contains("8 bits"));
        let options = EngineOptions {
            precision: Precision::High,
            ..EngineOptions::default()
        };
        assert!(unfit(&options, "llama").expect("unfit").contains("High"));
        assert_eq!(unfit(&EngineOptions::default(), "qwen3"), None);
    }
}
