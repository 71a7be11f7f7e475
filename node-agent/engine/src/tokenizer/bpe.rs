//! Byte-level byte pair encoding. Source: Sennrich et al. 2016; the byte alphabet is GPT-2's.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use crate::InvalidModel;
use crate::gguf::Strings;

use super::merge::merge;
use super::pretokenize::Pretokenizer;
use super::vocab::Vocab;

/// No token.
const ABSENT: u32 = u32::MAX;

/// Merges by rank.
pub(super) struct BytePairEncoding {
    words: Pretokenizer,
    /// Token of each byte; some vocabularies lack a few control bytes, which then cannot be said.
    bytes: Vec<u32>,
    /// Two tokens to their rank and what they become. What is hashed comes from the file alone.
    merges: HashMap<(u32, u32), (u32, u32), FixedState>,
    /// A word that is a token as it stands is not taken apart (Llama 3).
    whole_words: bool,
}

impl BytePairEncoding {
    pub(super) fn new(
        vocab: &Vocab,
        merges: &Strings,
        pre: &str,
        whole_words: bool,
    ) -> Result<Self, InvalidModel> {
        let bytes: Vec<u32> = (0..=255_u8)
            .map(|byte| {
                let mut buffer = [0; 4];
                vocab
                    .id(byte_to_char(byte).encode_utf8(&mut buffer).as_bytes())
                    .unwrap_or(ABSENT)
            })
            .collect();
        let mut table = HashMap::with_capacity_and_hasher(merges.len(), FixedState::default());
        let mut joined = Vec::new();
        for (rank, merge) in merges.iter().enumerate() {
            // The space stands between the two; the first byte may itself not be one.
            let at = merge.iter().skip(1).position(|&b| b == b' ').map(|at| at + 1);
            let (left, right) = at.map_or((merge, &[][..]), |at| (&merge[..at], &merge[at + 1..]));
            joined.clear();
            joined.extend_from_slice(left);
            joined.extend_from_slice(right);
            if let (Some(a), Some(b), Some(whole)) = (vocab.id(left), vocab.id(right), vocab.id(&joined)) {
                table.entry((a, b)).or_insert((rank as u32, whole));
            }
        }
        Ok(Self {
            words: Pretokenizer::new(pre)?,
            bytes,
            merges: table,
            whole_words,
        })
    }

    pub(super) fn encode(&self, vocab: &Vocab, text: &str, tokens: &mut Vec<u32>) {
        self.words.for_each(text, |word| {
            if self.whole_words {
                let spelled: String = word.bytes().map(byte_to_char).collect();
                if let Some(id) = vocab.id(spelled.as_bytes()).filter(|&id| vocab.is_ordinary(id)) {
                    tokens.push(id);
                    return;
                }
            }
            // Bytes that the vocabulary lacks fall out before merging, as in the reference.
            let known = word.bytes().filter_map(|byte| {
                self.bytes
                    .get(usize::from(byte))
                    .copied()
                    .filter(|&id| id != ABSENT)
            });
            let symbols = known.enumerate().map(|(at, id)| (at as u32, 1, id));
            let merged = merge(symbols, |a, b| {
                // Ranks stay far below 2^24, so a float holds them exactly.
                self.merges
                    .get(&(a.id, b.id))
                    .map(|&(rank, whole)| (rank as f32, whole))
            });
            tokens.extend(merged.iter().map(|symbol| symbol.id));
        });
    }
}

/// GPT-2's alphabet: printable bytes are themselves, the others are moved behind U+0100.
fn byte_to_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let moved = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + moved).unwrap_or(char::REPLACEMENT_CHARACTER)
}

fn char_to_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (33..=126 | 161..=172 | 174..=255) => u8::try_from(code).ok(),
        code @ 256..=323 => {
            let moved = (0..=255_u8).filter(|&b| !matches!(b, 33..=126 | 161..=172 | 174..=255));
            moved.into_iter().nth((code - 256) as usize)
        }
        _ => None,
    }
}

/// The bytes that a token's text stands for.
pub(super) fn decode(text: &[u8], out: &mut Vec<u8>) {
    for c in String::from_utf8_lossy(text).chars() {
        match char_to_byte(c) {
            Some(byte) => out.push(byte),
            None => {
                let mut buffer = [0; 4];
                out.extend_from_slice(c.encode_utf8(&mut buffer).as_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_gpt2s_and_reversible() {
        assert_eq!(
            [byte_to_char(b' '), byte_to_char(b'\n'), byte_to_char(b'a')],
            ['Ġ', 'Ċ', 'a']
        );
        for byte in 0..=255 {
            assert_eq!(char_to_byte(byte_to_char(byte)), Some(byte));
        }
    }
}
