//! The models: decoders (llama, gemma3) and the BERT-type encoder, over candle's quantised matrices.

mod attention;
mod bert;
mod config;
mod decoder;
mod layers;

pub(crate) use bert::{Encoder, EncoderConfig, TOKENIZER, read_bounded};
pub(crate) use config::DecoderConfig;
pub(crate) use decoder::{Decoder, Row};
