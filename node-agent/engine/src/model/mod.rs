//! The models, over this engine's kernels: decoders (llama and kin), and the BERT-type encoder.

mod bert;
mod config;
mod decoder;
mod encoder;
mod layers;
mod rope;
mod rows;

pub(crate) use bert::{EncoderConfig, TOKENIZER, read_bounded};
pub(crate) use config::{Activation, DecoderConfig, RopePairs};
pub(crate) use decoder::Decoder;
pub(crate) use encoder::Encoder;
pub(crate) use rope::{Rope, Rotations};
pub(crate) use rows::Row;
