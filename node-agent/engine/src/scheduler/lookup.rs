//! Guessing what comes next from what was written before: lossless speculation without a second model.
//! Source: Saxena 2023 (prompt lookup decoding).

use std::collections::HashMap;

use super::success::{Price, Success};

/// Tokens that must have stood together before, for what followed to be a guess.
const PATTERN: usize = 3;
/// The longer the text goes along with an earlier place, the surer it goes on so: from how many tokens on, and what
/// share of guesses is expected to come true before any was seen. Each such class has a rate of its own.
const CLASSES: [(usize, f32); 3] = [(PATTERN, 0.5), (4, 0.7), (8, 0.85)];

/// Where a pattern stood last.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The index after it.
    after: usize,
    /// Whether something else followed it than the time before: a number that counts up, a name that is changed.
    varies: bool,
}

/// What was written so far, and how good guesses have been.
#[derive(Debug)]
pub(super) struct Lookup {
    places: HashMap<[u32; PATTERN], Place>,
    /// Tokens whose patterns are known.
    indexed: usize,
    successes: [Success; CLASSES.len()],
    /// The class of the latest guess.
    class: usize,
}

impl Default for Lookup {
    fn default() -> Self {
        Self {
            places: HashMap::new(),
            indexed: 0,
            successes: CLASSES.map(|(_, rate)| Success::expected(rate)),
            class: 0,
        }
    }
}

impl Lookup {
    /// Guesses what follows `tokens`, at most `most`, in a step of this price.
    pub(super) fn guess(&mut self, tokens: &[u32], price: Price, most: usize) -> Vec<u32> {
        self.index(tokens);
        let place = tokens.last_chunk().and_then(|pattern| self.steady(pattern));
        let Some(start) = place else {
            return Vec::new();
        };
        let along = tokens[..start].iter().rev().zip(tokens.iter().rev());
        let (longest, _) = CLASSES[CLASSES.len() - 1];
        let along = along.take(longest).take_while(|(then, now)| then == now).count();
        self.class = CLASSES
            .iter()
            .rposition(|(least, _)| along >= *least)
            .unwrap_or(0);
        let most = most.min(self.successes[self.class].next(price));
        // What goes round in a circle goes on so.
        let guess = tokens[start..].iter().copied().cycle().take(most);
        let mut text = tokens[tokens.len() - PATTERN..].to_vec();
        for token in guess {
            if text.last_chunk().is_some_and(|pattern| self.varies(pattern)) {
                break;
            }
            text.push(token);
        }
        text.split_off(PATTERN)
    }

    /// Takes note of what follows each pattern; one is known only once something does.
    fn index(&mut self, tokens: &[u32]) {
        while self.indexed + PATTERN < tokens.len() {
            let after = self.indexed + PATTERN;
            if let Some(pattern) = tokens[self.indexed..].first_chunk::<PATTERN>() {
                let before = self.places.get(pattern);
                let varies = before.is_some_and(|before| tokens[before.after] != tokens[after]);
                self.places.insert(*pattern, Place { after, varies });
            }
            self.indexed += 1;
        }
    }

    fn varies(&self, pattern: &[u32; PATTERN]) -> bool {
        self.places.get(pattern).is_some_and(|place| place.varies)
    }

    /// The index after the last place of a pattern that is followed by the same each time.
    fn steady(&self, pattern: &[u32; PATTERN]) -> Option<usize> {
        let place = self.places.get(pattern).filter(|place| !place.varies);
        place.map(|place| place.after)
    }

    /// Takes note of how many of the guessed tokens came true.
    pub(super) fn came_true(&mut self, guessed: usize, hits: usize) {
        self.successes[self.class].came_true(guessed, hits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRICE: Price = Price {
        rows: 1,
        fixed_rows: 7.0,
        guess: 0.0,
    };

    #[test]
    fn what_followed_the_same_words_is_guessed() {
        let mut lookup = Lookup::default();
        let tokens = [9, 1, 2, 3, 4, 5, 6, 1, 2, 3];
        let guess = lookup.guess(&tokens, PRICE, 8);
        assert_eq!(guess, [4, 5]);
        assert_eq!(lookup.guess(&[7, 7, 7], PRICE, 8), [0_u32; 0]);
    }

    #[test]
    fn a_run_of_one_token_goes_on() {
        let mut lookup = Lookup::default();
        assert_eq!(lookup.guess(&[8; 6], PRICE, 2), [8, 8]);
    }

    #[test]
    fn a_guess_ends_before_what_was_not_the_same_each_time() {
        // id 1 name a | id 2 name a | id: the number differs, and then all goes on as before.
        let rows = [50, 51, 52, 1, 60, 61, 62, 63, 50, 51, 52, 2, 60, 61, 62, 63];
        let next = [50, 51, 52];
        let mut lookup = Lookup::default();
        let guess = lookup.guess(&rows, PRICE, 12);
        assert_eq!(guess, [50, 51, 52]);
        let text = [&rows[..], &next].concat();
        assert_eq!(lookup.guess(&text, PRICE, 12), [0_u32; 0]);
        let text = [&text[..], &[3, 60, 61, 62]].concat();
        assert_eq!(lookup.guess(&text, PRICE, 12)[0], 63);
    }

    #[test]
    fn short_likenesses_that_fail_do_not_end_guesses_from_long_ones() {
        let mut lookup = Lookup::default();
        let passage: Vec<u32> = (100..140).collect();
        for _ in 0..20 {
            lookup.class = 0;
            lookup.came_true(1, 0);
        }
        let short = [&passage[..], &[7, 100, 101, 102]].concat();
        assert_eq!(lookup.guess(&short, PRICE, 4), [0_u32; 0]);
        let long = [&passage[..], &[7], &passage[..10]].concat();
        assert_eq!(lookup.guess(&long, PRICE, 4), [110, 111, 112, 113]);
    }
}
