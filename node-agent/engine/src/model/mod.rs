//! The models, over this engine's kernels: decoders (llama and kin), and the BERT-type encoder.

mod bert;
mod config;
mod decoder;
mod encoder;
mod layers;
mod rope;

pub(crate) use bert::{EncoderConfig, TOKENIZER, read_bounded};
pub(crate) use config::{Activation, DecoderConfig, RopePairs};
pub(crate) use decoder::{Decoder, Row};
pub(crate) use encoder::Encoder;
pub(crate) use rope::{Rope, Rotations};
