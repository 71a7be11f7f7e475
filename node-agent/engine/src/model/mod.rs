//! The models: decoders (llama, gemma3) over this engine's kernels; the BERT-type encoder over candle's tensors.

mod bert;
mod config;
mod decoder;
mod layers;

pub(crate) use bert::{Encoder, EncoderConfig, TOKENIZER, read_bounded};
pub(crate) use config::{Activation, DecoderConfig, RopePairs};
pub(crate) use decoder::{Decoder, Row};
pub(crate) use layers::Rotations;
