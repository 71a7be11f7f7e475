//! The vocabulary: texts in one arena, found by a compact hash index.

use std::hash::BuildHasher;

use foldhash::fast::FixedState;

use crate::InvalidModel;
use crate::gguf::Strings;

/// Kinds of tokens, as GGUF numbers them.
const UNKNOWN: u8 = 2;
const CONTROL: u8 = 3;
const USER_DEFINED: u8 = 4;
const UNUSED: u8 = 5;
const BYTE: u8 = 6;

/// No token in this slot.
const EMPTY: u32 = u32::MAX;

/// Texts and kinds of all tokens.
pub(crate) struct Vocab {
    texts: Strings,
    kinds: Vec<u8>,
    /// Open addressing, a power of two at least twice the number of tokens.
    slots: Vec<u32>,
}

impl Vocab {
    pub(crate) fn new(texts: Strings, kinds: &[i64]) -> Result<Self, InvalidModel> {
        if texts.is_empty() || texts.len() > 1 << 24 {
            return Err(InvalidModel::inconsistent(
                "the vocabulary",
                format!("of {} tokens", texts.len()),
                "1 to 16777216 tokens",
            ));
        }
        let kinds: Vec<u8> = if kinds.is_empty() {
            vec![1; texts.len()]
        } else {
            kinds
                .iter()
                .map(|&kind| u8::try_from(kind).unwrap_or(1))
                .collect()
        };
        let mut vocab = Self {
            slots: vec![EMPTY; (texts.len() * 2).next_power_of_two()],
            texts,
            kinds,
        };
        for id in 0..vocab.texts.len() {
            let text = vocab.texts.get(id).unwrap_or_default();
            let mut slot = vocab.first_slot(text);
            // The first of equal texts keeps the place.
            loop {
                match vocab.slots.get(slot) {
                    Some(&EMPTY) => break,
                    Some(&other) if vocab.text(other) == text => break,
                    _ => slot = (slot + 1) & (vocab.slots.len() - 1),
                }
            }
            if let Some(place) = vocab.slots.get_mut(slot).filter(|place| **place == EMPTY) {
                *place = id as u32;
            }
        }
        Ok(vocab)
    }

    fn first_slot(&self, text: &[u8]) -> usize {
        // Keyed hashing is not needed: the table's size is fixed and a bad vocabulary only harms itself.
        FixedState::default().hash_one(text) as usize & (self.slots.len() - 1)
    }

    /// The token with this text.
    pub(crate) fn id(&self, text: &[u8]) -> Option<u32> {
        let mut slot = self.first_slot(text);
        loop {
            match *self.slots.get(slot)? {
                EMPTY => return None,
                id if self.text(id) == text => return Some(id),
                _ => slot = (slot + 1) & (self.slots.len() - 1),
            }
        }
    }

    pub(crate) fn text(&self, id: u32) -> &[u8] {
        self.texts.get(id as usize).unwrap_or_default()
    }

    pub(crate) fn len(&self) -> usize {
        self.texts.len()
    }

    fn kind(&self, id: u32) -> u8 {
        self.kinds.get(id as usize).copied().unwrap_or(UNKNOWN)
    }

    /// Shown to nobody: control tokens, and what stands for the unknown.
    pub(crate) fn is_control(&self, id: u32) -> bool {
        matches!(self.kind(id), CONTROL | UNKNOWN)
    }

    pub(crate) fn is_user_defined(&self, id: u32) -> bool {
        self.kind(id) == USER_DEFINED
    }

    pub(crate) fn is_byte(&self, id: u32) -> bool {
        self.kind(id) == BYTE
    }

    /// Whether ordinary text may become this token.
    pub(crate) fn is_ordinary(&self, id: u32) -> bool {
        !matches!(self.kind(id), CONTROL | UNKNOWN | UNUSED | BYTE)
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = u32> + use<> {
        0..self.texts.len() as u32
    }
}
