//! Finding tokens that stand for themselves: control tokens (if asked for) and user-defined ones (always).

use aho_corasick::{AhoCorasick, MatchKind};

use super::vocab::Vocab;

/// Searchers over the texts of such tokens.
pub(super) struct SpecialTokens {
    always: Searcher,
    with_control: Searcher,
}

struct Searcher {
    automaton: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl Searcher {
    fn new(vocab: &Vocab, ids: Vec<u32>) -> Self {
        // SentencePiece writes a space as U+2581 in its vocabulary; in text it is a space.
        let texts: Vec<Vec<u8>> = ids
            .iter()
            .map(|&id| {
                String::from_utf8_lossy(vocab.text(id))
                    .replace('\u{2581}', " ")
                    .into_bytes()
            })
            .collect();
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(&texts)
            .ok();
        Self {
            automaton: automaton.filter(|_| !ids.is_empty()),
            ids,
        }
    }
}

impl SpecialTokens {
    pub(super) fn new(vocab: &Vocab) -> Self {
        let wanted = |control: bool| {
            let ids = vocab.ids().filter(|&id| !vocab.text(id).is_empty());
            ids.filter(|&id| vocab.is_user_defined(id) || (control && vocab.is_control(id)))
                .collect::<Vec<_>>()
        };
        let (always, with_control) = (wanted(false), wanted(true));
        Self {
            always: Searcher::new(vocab, always),
            with_control: Searcher::new(vocab, with_control),
        }
    }

    /// The text in pieces, each with the token that follows it.
    pub(super) fn split<'t>(&self, text: &'t str, control: bool) -> Vec<(&'t str, Option<u32>)> {
        let searcher = if control { &self.with_control } else { &self.always };
        let Some(automaton) = &searcher.automaton else {
            return vec![(text, None)];
        };
        let mut pieces = Vec::new();
        let mut start = 0;
        for found in automaton.find_iter(text) {
            let id = searcher.ids.get(found.pattern().as_usize()).copied();
            pieces.push((text.get(start..found.start()).unwrap_or_default(), id));
            start = found.end();
        }
        pieces.push((text.get(start..).unwrap_or_default(), None));
        pieces
    }
}
