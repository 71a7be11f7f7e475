//! Tokenizers from the model's own vocabulary: byte-level BPE, SentencePiece, WordPiece.
//!
//! The vocabulary is one arena of bytes with an index of 4 bytes a slot, so that 262 144 tokens take a
//! few MiB and not a hundred. Start reading at [`Tokenizer::encode`].

mod bpe;
mod merge;
mod pretokenize;
mod special;
mod spm;
mod vocab;
mod wordpiece;

use std::borrow::Cow;

use crate::InvalidModel;
use crate::gguf::{GgufFile, Value};

use bpe::BytePairEncoding;
use special::SpecialTokens;
use spm::SentencePiece;
use vocab::Vocab;
use wordpiece::WordPiece;

/// What `encode` does beyond the text itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Special {
    /// Add the tokens that the model wants at the beginning (and end).
    pub add: bool,
    /// Read control tokens such as `<|im_start|>` in the text as what they are. Never for text that a
    /// user wrote: only for what a chat template rendered.
    pub parse: bool,
}

/// Marks what reads like a control token in a user's text. The last private-use character of the basic
/// plane; in a user's own text it is dropped.
const GUARD: char = '\u{f8ff}';

enum Algorithm {
    BytePair(BytePairEncoding),
    SentencePiece(SentencePiece),
    WordPiece(WordPiece),
}

/// A model's tokenizer.
pub struct Tokenizer {
    vocab: Vocab,
    algorithm: Algorithm,
    special: SpecialTokens,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    /// Tokens that end an answer.
    ends: Vec<u32>,
}

/// Where a file names the token that texts begin with.
pub(crate) const BOS: &str = "tokenizer.ggml.bos_token_id";

/// Texts of tokens that end an answer, whatever the metadata says of them.
const END_TEXTS: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|end|>",
    "<eos>",
    "</s>",
];

impl Tokenizer {
    /// The tokenizer of a GGUF file.
    ///
    /// # Errors
    /// When the vocabulary is incomplete or of a kind that this version does not know.
    pub fn from_gguf(file: &GgufFile) -> Result<Self, InvalidModel> {
        let model = file
            .value("tokenizer.ggml.model")?
            .to_str("tokenizer.ggml.model")?;
        let tokens = file
            .value("tokenizer.ggml.tokens")?
            .to_strings("tokenizer.ggml.tokens")?;
        let kinds = file
            .optional("tokenizer.ggml.token_type", Value::to_ints)?
            .unwrap_or_default();
        if !kinds.is_empty() && kinds.len() != tokens.len() {
            return Err(InvalidModel::inconsistent(
                "tokenizer.ggml.token_type",
                format!("{} long", kinds.len()),
                format!("{} entries, one a token", tokens.len()),
            ));
        }
        let vocab = Vocab::new(tokens.clone(), kinds)?;
        let size = vocab.len();
        let (algorithm, add_bos) = match model {
            "gpt2" => {
                let merges = file
                    .value("tokenizer.ggml.merges")?
                    .to_strings("tokenizer.ggml.merges")?;
                let pre = file
                    .optional("tokenizer.ggml.pre", Value::to_str)?
                    .unwrap_or("default");
                let family = pretokenize::family(pre)?;
                let bpe = BytePairEncoding::new(&vocab, merges, pre, family.whole_words)?;
                (Algorithm::BytePair(bpe), family.begins)
            }
            "llama" => {
                let scores = file
                    .value("tokenizer.ggml.scores")?
                    .to_floats("tokenizer.ggml.scores")?;
                let space_prefix = file
                    .optional("tokenizer.ggml.add_space_prefix", Value::to_bool)?
                    .unwrap_or(true);
                (
                    Algorithm::SentencePiece(SentencePiece::new(&vocab, scores, space_prefix)?),
                    true,
                )
            }
            other => {
                return Err(InvalidModel::unsupported(
                    "tokenizer.ggml.model",
                    other,
                    "gpt2 (byte-level BPE) and llama (SentencePiece)",
                ));
            }
        };
        let id = |key: &str| -> Result<Option<u32>, InvalidModel> {
            let id = file.optional(key, Value::to_u32)?;
            match id {
                Some(id) if id as usize >= size => Err(InvalidModel::inconsistent(
                    key,
                    id,
                    format!("a token below {size}"),
                )),
                id => Ok(id),
            }
        };
        let (bos, eos, eot) = (
            id(BOS)?,
            id("tokenizer.ggml.eos_token_id")?,
            id("tokenizer.ggml.eot_token_id")?,
        );
        let add_bos = file
            .optional("tokenizer.ggml.add_bos_token", Value::to_bool)?
            .unwrap_or(add_bos);
        let add_eos = file
            .optional("tokenizer.ggml.add_eos_token", Value::to_bool)?
            .unwrap_or(false);
        let mut ends: Vec<u32> = eos.into_iter().chain(eot).collect();
        ends.extend(
            END_TEXTS
                .iter()
                .filter_map(|text| vocab.id(text.as_bytes()))
                .filter(|&id| vocab.is_control(id)),
        );
        ends.sort_unstable();
        ends.dedup();
        let special = SpecialTokens::new(&vocab);
        Ok(Self {
            vocab,
            algorithm,
            special,
            bos,
            eos,
            add_bos,
            add_eos,
            ends,
        })
    }

    /// The WordPiece tokenizer of a `tokenizer.json`.
    ///
    /// # Errors
    /// When the file holds another kind of tokenizer, or is incomplete.
    pub fn from_tokenizer_json(bytes: &[u8]) -> Result<Self, InvalidModel> {
        let (vocab, algorithm) = WordPiece::from_tokenizer_json(bytes)?;
        let (bos, eos) = (vocab.id(b"[CLS]"), vocab.id(b"[SEP]"));
        if bos.is_none() || eos.is_none() {
            return Err(InvalidModel::missing("[CLS] or [SEP] in tokenizer.json"));
        }
        let special = SpecialTokens::new(&vocab);
        Ok(Self {
            vocab,
            algorithm: Algorithm::WordPiece(algorithm),
            special,
            bos,
            eos,
            add_bos: true,
            add_eos: true,
            ends: Vec::new(),
        })
    }

    /// Text to tokens.
    #[must_use]
    pub fn encode(&self, text: &str, special: Special) -> Vec<u32> {
        let mut tokens = Vec::new();
        if special.add && self.add_bos {
            tokens.extend(self.bos);
        }
        let mut first = true;
        // SentencePiece knows no difference between a space and U+2581, so neither do the pieces below.
        let spaced = if matches!(self.algorithm, Algorithm::SentencePiece(_)) {
            Cow::Owned(text.replace('\u{2581}', " "))
        } else {
            Cow::Borrowed(text)
        };
        for (piece, token) in self.special.split(&spaced, special.parse) {
            if !piece.is_empty() {
                match &self.algorithm {
                    Algorithm::BytePair(bpe) => bpe.encode(&self.vocab, piece, &mut tokens),
                    Algorithm::SentencePiece(spm) => spm.encode(&self.vocab, piece, first, &mut tokens),
                    Algorithm::WordPiece(wordpiece) => wordpiece.encode(&self.vocab, piece, &mut tokens),
                }
            }
            tokens.extend(token);
            first = false;
        }
        if special.add && self.add_eos {
            tokens.extend(self.eos);
        }
        tokens
    }

    /// Text that somebody wrote, made safe to stand in a chat template's rendering: what reads like a
    /// control token in it is marked, and [`Self::encode_guarded`] takes it as plain text.
    #[must_use]
    pub fn guard(&self, text: &str) -> String {
        let mut guarded = String::with_capacity(text.len());
        for (piece, token) in self.special.split(&text.replace(GUARD, ""), true) {
            guarded.push_str(piece);
            if let Some(token) = token {
                if self.vocab.is_control(token) {
                    guarded.push(GUARD);
                }
                guarded.push_str(&self.token_text(token).replace('\u{2581}', " "));
            }
        }
        guarded
    }

    /// Encodes a rendering: control tokens of the template are read as such, guarded ones as text.
    #[must_use]
    pub fn encode_guarded(&self, text: &str, add: bool) -> Vec<u32> {
        let mut parts = text.split(GUARD);
        let mut tokens = self.encode(parts.next().unwrap_or_default(), Special { add, parse: true });
        for part in parts {
            // Cut after its first character, the text of the control token is no longer whole.
            let cut = part.chars().next().map_or(0, char::len_utf8);
            let (head, rest) = part.split_at(cut);
            tokens.extend(self.encode(head, Special::default()));
            tokens.extend(self.encode(
                rest,
                Special {
                    add: false,
                    parse: true,
                },
            ));
        }
        tokens
    }

    /// The bytes that a token stands for; none for control tokens.
    pub fn append_bytes(&self, token: u32, out: &mut Vec<u8>) {
        if self.vocab.is_control(token) {
            return;
        }
        let text = self.vocab.text(token);
        match &self.algorithm {
            Algorithm::BytePair(_) if self.vocab.is_user_defined(token) => out.extend_from_slice(text),
            Algorithm::BytePair(_) => bpe::decode(text, out),
            Algorithm::SentencePiece(_) => spm::decode(&self.vocab, token, out),
            Algorithm::WordPiece(_) => wordpiece::decode(text, out),
        }
    }

    /// Tokens to text; bytes that are no UTF-8 are replaced.
    #[must_use]
    pub fn decode(&self, tokens: &[u32]) -> String {
        let mut bytes = Vec::new();
        tokens
            .iter()
            .for_each(|&token| self.append_bytes(token, &mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The text of a token as it stands in the vocabulary, for people.
    #[must_use]
    pub fn token_text(&self, token: u32) -> String {
        String::from_utf8_lossy(self.vocab.text(token)).into_owned()
    }

    /// Number of tokens.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// The token that begins a text, as text (for chat templates).
    #[must_use]
    pub fn bos_text(&self) -> String {
        self.bos.map(|id| self.token_text(id)).unwrap_or_default()
    }

    /// The token that ends a text, as text.
    #[must_use]
    pub fn eos_text(&self) -> String {
        self.eos.map(|id| self.token_text(id)).unwrap_or_default()
    }

    /// The token that begins a text.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end an answer, in order.
    pub(crate) fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// Whether a token ends an answer.
    #[must_use]
    pub fn is_end_of_generation(&self, token: u32) -> bool {
        self.ends.binary_search(&token).is_ok()
    }
}
