//! Guessing what comes next from what was written before: lossless speculation without a second model.
//! Source: Saxena 2023 (prompt lookup decoding).

use std::collections::HashMap;

use super::success::Success;

/// Tokens that must have stood together before, for what followed to be a guess.
const PATTERN: usize = 3;

/// What was written so far, and how good guesses have been.
#[derive(Debug, Default)]
pub(super) struct Lookup {
    /// Where each pattern stood last: the index after it.
    last: HashMap<[u32; PATTERN], usize>,
    /// Tokens whose patterns are known.
    indexed: usize,
    success: Success,
}

impl Lookup {
    /// Guesses what follows `tokens`, at most `most`. `rows` is how many rows the step holds without it.
    pub(super) fn guess(&mut self, tokens: &[u32], rows: usize, most: usize) -> Vec<u32> {
        // A pattern is known only once something follows it.
        while self.indexed + PATTERN < tokens.len() {
            if let Some(pattern) = tokens[self.indexed..].first_chunk::<PATTERN>() {
                self.last.insert(*pattern, self.indexed + PATTERN);
            }
            self.indexed += 1;
        }
        let most = most.min(self.success.next(rows, 0.0));
        let Some(pattern) = tokens.last_chunk::<PATTERN>() else {
            return Vec::new();
        };
        let Some(&start) = self.last.get(pattern) else {
            return Vec::new();
        };
        // What goes round in a circle goes on so.
        tokens[start..].iter().copied().cycle().take(most).collect()
    }

    /// Takes note of how many of the guessed tokens came true.
    pub(super) fn came_true(&mut self, guessed: usize, hits: usize) {
        self.success.came_true(guessed, hits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_same_words_is_guessed() {
        let mut lookup = Lookup::default();
        let tokens = [9, 1, 2, 3, 4, 5, 6, 1, 2, 3];
        let guess = lookup.guess(&tokens, 1, 8);
        assert_eq!(guess, [4, 5, 6]);
        assert_eq!(lookup.guess(&[7, 7, 7], 1, 8), [0_u32; 0]);
    }

    #[test]
    fn the_latest_place_counts_and_a_run_of_one_token_goes_on() {
        let mut lookup = Lookup::default();
        assert_eq!(lookup.guess(&[1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1, 1), [5]);
        let mut lookup = Lookup::default();
        assert_eq!(lookup.guess(&[8; 6], 1, 2), [8, 8]);
    }
}
