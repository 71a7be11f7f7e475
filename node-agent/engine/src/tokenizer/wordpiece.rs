//! WordPiece, as BERT has it: cleaned, lower-cased words, cut greedily into the longest known pieces.
//! Source: Devlin et al. 2018; the cleaning follows their tokenization.py.

use std::sync::LazyLock;

use fancy_regex::Regex;
use serde_json::Value;
use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

use crate::InvalidModel;
use crate::gguf::Strings;

use super::vocab::Vocab;

/// Longest word in characters; a longer one is unknown as a whole.
const MAX_WORD_CHARS: usize = 100;

/// Settings of a WordPiece tokenizer.
pub(super) struct WordPiece {
    unknown: u32,
    lowercase: bool,
    strip_accents: bool,
}

impl WordPiece {
    /// Reads a `tokenizer.json`.
    pub(super) fn from_tokenizer_json(bytes: &[u8]) -> Result<(Vocab, Self), InvalidModel> {
        let json: Value = serde_json::from_slice(bytes)
            .map_err(|error| InvalidModel::inconsistent("tokenizer.json", error, "JSON"))?;
        let kind = json.pointer("/model/type").and_then(Value::as_str);
        // Older files do not name the kind; a prefix for continuations tells it.
        let is_wordpiece = kind == Some("WordPiece")
            || (kind.is_none() && json.pointer("/model/continuing_subword_prefix").is_some());
        if !is_wordpiece {
            return Err(InvalidModel::unsupported(
                "the model of tokenizer.json",
                kind.unwrap_or("not named"),
                "WordPiece",
            ));
        }
        let entries = json
            .pointer("/model/vocab")
            .and_then(Value::as_object)
            .ok_or_else(|| InvalidModel::missing("model.vocab in tokenizer.json"))?;
        let mut texts: Vec<&str> = vec![""; entries.len()];
        for (text, id) in entries {
            let place = id
                .as_u64()
                .and_then(|id| texts.get_mut(usize::try_from(id).ok()?));
            *place.ok_or_else(|| {
                InvalidModel::inconsistent(
                    "model.vocab in tokenizer.json",
                    format!("{text:?} with number {id}"),
                    format!("numbers below {}", entries.len()),
                )
            })? = text;
        }
        let mut arena = Strings::default();
        let mut kinds = Vec::with_capacity(texts.len());
        for text in &texts {
            if !arena.push(text.as_bytes()) {
                return Err(InvalidModel::inconsistent(
                    "tokenizer.json",
                    "more than 4 GiB of text",
                    "less",
                ));
            }
            let control = matches!(*text, "[PAD]" | "[UNK]" | "[CLS]" | "[SEP]" | "[MASK]");
            kinds.push(if control { 3 } else { 1 });
        }
        let vocab = Vocab::new(arena, &kinds)?;
        let unknown_text = json
            .pointer("/model/unk_token")
            .and_then(Value::as_str)
            .unwrap_or("[UNK]");
        let unknown = vocab
            .id(unknown_text.as_bytes())
            .ok_or_else(|| InvalidModel::missing(format!("{unknown_text} in tokenizer.json")))?;
        let lowercase = json
            .pointer("/normalizer/lowercase")
            .and_then(Value::as_bool)
            .unwrap_or(true);
        let strip_accents = json
            .pointer("/normalizer/strip_accents")
            .and_then(Value::as_bool)
            .unwrap_or(lowercase);
        Ok((
            vocab,
            Self {
                unknown,
                lowercase,
                strip_accents,
            },
        ))
    }

    pub(super) fn encode(&self, vocab: &Vocab, text: &str, tokens: &mut Vec<u32>) {
        let mut word = String::new();
        let mut flush = |word: &mut String| {
            if !word.is_empty() {
                self.word(vocab, word, tokens);
                word.clear();
            }
        };
        for c in self.normalise(text).chars() {
            if c.is_whitespace() {
                flush(&mut word);
            } else if is_punctuation(c) || is_cjk(c) {
                flush(&mut word);
                word.push(c);
                flush(&mut word);
            } else {
                word.push(c);
            }
        }
        flush(&mut word);
    }

    fn normalise(&self, text: &str) -> String {
        let cleaned = text
            .chars()
            .filter(|&c| !(c == '\0' || c == '\u{fffd}' || is_control(c)));
        let cleaned: String = cleaned.map(|c| if c.is_whitespace() { ' ' } else { c }).collect();
        let stripped: String = if self.strip_accents {
            cleaned.nfd().filter(|&c| !is_mark(c)).collect()
        } else {
            cleaned
        };
        if self.lowercase {
            stripped.to_lowercase()
        } else {
            stripped
        }
    }

    fn word(&self, vocab: &Vocab, word: &str, tokens: &mut Vec<u32>) {
        if word.chars().count() > MAX_WORD_CHARS {
            tokens.push(self.unknown);
            return;
        }
        let (mut start, mark) = (0, tokens.len());
        let mut piece = Vec::new();
        while start < word.len() {
            let ends = word
                .char_indices()
                .map(|(at, c)| at + c.len_utf8())
                .filter(|&end| end > start);
            let found = ends.collect::<Vec<_>>().into_iter().rev().find_map(|end| {
                piece.clear();
                if start > 0 {
                    piece.extend_from_slice(b"##");
                }
                piece.extend_from_slice(word.get(start..end)?.as_bytes());
                vocab
                    .id(&piece)
                    .filter(|&id| !vocab.is_control(id))
                    .map(|id| (id, end))
            });
            let Some((id, end)) = found else {
                tokens.truncate(mark);
                tokens.push(self.unknown);
                return;
            };
            tokens.push(id);
            start = end;
        }
    }
}

/// A token's text with a space before it, unless it goes on a word.
pub(super) fn decode(text: &[u8], out: &mut Vec<u8>) {
    match text.strip_prefix(b"##") {
        Some(rest) => out.extend_from_slice(rest),
        None => {
            if !out.is_empty() {
                out.push(b' ');
            }
            out.extend_from_slice(text);
        }
    }
}

/// Control and format characters, but not the white ones.
fn is_control(c: char) -> bool {
    if matches!(c, '\t' | '\n' | '\r') {
        return false;
    }
    let format = matches!(u32::from(c), 0xAD | 0x600..=0x605 | 0x61C | 0x6DD | 0x70F | 0x890..=0x891 | 0x8E2 | 0x180E | 0x200B..=0x200F | 0x202A..=0x202E | 0x2060..=0x2064 | 0x2066..=0x206F | 0xFEFF | 0xFFF9..=0xFFFB | 0x110BD | 0x110CD | 0x13430..=0x1343F | 0x1BCA0..=0x1BCA3 | 0x1D173..=0x1D17A | 0xE0001 | 0xE0020..=0xE007F);
    let private = matches!(u32::from(c), 0xE000..=0xF8FF | 0xF_0000..=0xF_FFFD | 0x10_0000..=0x10_FFFD);
    c.is_control() || format || private
}

/// Marks that stand above or below a letter (category Mn); enclosing and spacing ones stay.
fn is_mark(c: char) -> bool {
    static MARK: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^\p{Mn}$").ok());
    is_combining_mark(c) && fits(&MARK, c)
}

fn is_punctuation(c: char) -> bool {
    static PUNCTUATION: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^\p{P}$").ok());
    if c.is_ascii() {
        c.is_ascii_punctuation()
    } else {
        !c.is_alphanumeric() && fits(&PUNCTUATION, c)
    }
}

fn fits(category: &LazyLock<Option<Regex>>, c: char) -> bool {
    let mut buffer = [0; 4];
    category
        .as_ref()
        .is_some_and(|regex| regex.is_match(c.encode_utf8(&mut buffer)).unwrap_or(false))
}

/// Chinese characters, each a word of its own. Ranges from BERT's tokenization.py.
fn is_cjk(c: char) -> bool {
    matches!(u32::from(c), 0x4E00..=0x9FFF | 0x3400..=0x4DBF | 0x2_0000..=0x2_A6DF | 0x2_A700..=0x2_B73F | 0x2_B740..=0x2_B81F | 0x2_B820..=0x2_CEAF | 0xF900..=0xFAFF | 0x2_F800..=0x2_FA1F)
}
