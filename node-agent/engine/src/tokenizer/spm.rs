//! SentencePiece's BPE: merges by score, with bytes for what the vocabulary lacks.
//! Source: Kudo & Richardson 2018.

use crate::InvalidModel;

use super::merge::merge;
use super::vocab::Vocab;

/// U+2581, which stands for a space in the vocabulary.
const SPACE: &str = "\u{2581}";

/// Merges by score.
pub(super) struct SentencePiece {
    scores: Vec<f32>,
    /// Token of each byte.
    bytes: Vec<Option<u32>>,
    unknown: u32,
    space_prefix: bool,
}

impl SentencePiece {
    pub(super) fn new(vocab: &Vocab, scores: &[f32], space_prefix: bool) -> Result<Self, InvalidModel> {
        if scores.len() != vocab.len() {
            return Err(InvalidModel::inconsistent(
                "tokenizer.ggml.scores",
                format!("{} long", scores.len()),
                format!("{} entries, one a token", vocab.len()),
            ));
        }
        let bytes = (0..=255_u8).map(|byte| vocab.id(format!("<0x{byte:02X}>").as_bytes()));
        let unknown = vocab.id(b"<unk>").unwrap_or(0);
        Ok(Self {
            scores: scores.to_vec(),
            bytes: bytes.collect(),
            unknown,
            space_prefix,
        })
    }

    pub(super) fn encode(&self, vocab: &Vocab, text: &str, first: bool, tokens: &mut Vec<u32>) {
        let mut spelled = text.replace(' ', SPACE);
        if self.space_prefix && first {
            spelled.insert_str(0, SPACE);
        }
        let symbols = spelled.char_indices().map(|(at, c)| {
            let length = c.len_utf8();
            let id = spelled
                .get(at..at + length)
                .and_then(|text| vocab.id(text.as_bytes()))
                .unwrap_or(u32::MAX);
            (at as u32, length as u32, id)
        });
        let bytes = spelled.as_bytes();
        let merged = merge(symbols, |a, b| {
            let whole = bytes.get(a.start as usize..(b.start + b.length) as usize)?;
            let id = vocab.id(whole).filter(|&id| vocab.is_ordinary(id))?;
            Some((-self.scores.get(id as usize).copied()?, id))
        });
        for symbol in merged {
            if symbol.id != u32::MAX && vocab.is_ordinary(symbol.id) {
                tokens.push(symbol.id);
                continue;
            }
            let range = symbol.start as usize..(symbol.start + symbol.length) as usize;
            for &byte in bytes.get(range).unwrap_or_default() {
                tokens.push(
                    self.bytes
                        .get(usize::from(byte))
                        .copied()
                        .flatten()
                        .unwrap_or(self.unknown),
                );
            }
        }
    }
}

/// The bytes that a token stands for.
pub(super) fn decode(vocab: &Vocab, token: u32, out: &mut Vec<u8>) {
    let text = vocab.text(token);
    if vocab.is_byte(token) {
        let digits = text.strip_prefix(b"<0x").and_then(|rest| rest.strip_suffix(b">"));
        let byte = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        out.extend(byte);
        return;
    }
    out.extend_from_slice(String::from_utf8_lossy(text).replace(SPACE, " ").as_bytes());
}
