//! Cutting text into words before BPE, by the rules that each family of models was trained with.

use fancy_regex::Regex;

use crate::InvalidModel;

/// GPT-2: contractions, letters, digits, the rest, spaces. Source: openai/gpt-2 encoder.py.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3: up to three digits at a time. Source: its tokenizer.json.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2: digits one by one. Source: its tokenizer.json.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The rules of one family.
pub(super) struct Pretokenizer {
    words: Regex,
    /// Digits are cut off one by one first.
    single_digits: bool,
}

impl Pretokenizer {
    /// The rules with this name in `tokenizer.ggml.pre`.
    pub(super) fn new(name: &str) -> Result<Self, InvalidModel> {
        let (pattern, single_digits) = match name {
            "gpt-2" | "gpt2" | "default" => (GPT2, false),
            "smollm" | "starcoder" | "refact" | "command-r" => (GPT2, true),
            "llama-bpe" | "llama3" | "llama-v3" => (LLAMA3, false),
            "qwen2" | "deepseek-r1-qwen" => (QWEN2, false),
            other => {
                return Err(InvalidModel::unsupported(
                    "tokenizer.ggml.pre",
                    other,
                    "gpt-2, smollm, starcoder, refact, command-r, llama-bpe and qwen2",
                ));
            }
        };
        let words = Regex::new(pattern)
            .map_err(|error| InvalidModel::inconsistent("tokenizer.ggml.pre", error, "a known pattern"))?;
        Ok(Self { words, single_digits })
    }

    /// Calls `word` for each word of `text`; together they are the whole text.
    pub(super) fn for_each<'t>(&self, text: &'t str, mut word: impl FnMut(&'t str)) {
        if !self.single_digits {
            return self.words_of(text, &mut word);
        }
        let mut start = 0;
        for (at, c) in text.char_indices().filter(|(_, c)| c.is_numeric()) {
            self.words_of(text.get(start..at).unwrap_or_default(), &mut word);
            let end = at + c.len_utf8();
            word(text.get(at..end).unwrap_or_default());
            start = end;
        }
        self.words_of(text.get(start..).unwrap_or_default(), &mut word);
    }

    fn words_of<'t>(&self, text: &'t str, word: &mut impl FnMut(&'t str)) {
        let mut end = 0;
        for found in self.words.find_iter(text) {
            // An error is the regex engine's own limit: what is left is taken as one word.
            let Ok(found) = found else { break };
            if found.start() > end {
                word(text.get(end..found.start()).unwrap_or_default());
            }
            if !found.as_str().is_empty() {
                word(found.as_str());
            }
            end = found.end();
        }
        if end < text.len() {
            word(text.get(end..).unwrap_or_default());
        }
    }
}
