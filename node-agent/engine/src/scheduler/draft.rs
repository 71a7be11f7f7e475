//! Guessing what comes next from what was written before: lossless speculation without a second model.
//!
//! A guess is only ever checked: the rows of guessed tokens go through the model beside the real one, and
//! each is kept as long as the sampler, asked in its usual order, chooses the same token. What is written
//! is therefore what would have been written, for greedy and for drawn answers alike. Guessing stops where
//! it does not pay: a row costs about an eighth of a step, so a guess must come true more often than that,
//! and more often still when many answers share the step.
//! Source: Saxena 2023 (prompt lookup decoding); Leviathan et al. 2023.

use std::collections::HashMap;

/// Tokens that must have stood together before, for what followed to be a guess.
const PATTERN: usize = 3;
/// Most tokens guessed at once.
const MOST: usize = 12;
/// Rows that cost as much as the rest of a step: measured at 6 to 10 for small models on 2 cores, more for
/// large ones, where a step is mostly reading weights.
const STEP_ROWS: f32 = 7.0;
/// Weight of the newest guess in the hit rate.
const NEWEST: f32 = 0.15;
/// Tokens without a guess after guessing did not pay; doubled each time it does not pay again.
const FIRST_PAUSE: u32 = 16;
const LONGEST_PAUSE: u32 = 512;

/// What was written so far, and how good guesses have been.
#[derive(Debug)]
pub(super) struct Lookup {
    /// Where each pattern stood last: the index after it.
    last: HashMap<[u32; PATTERN], usize>,
    /// Tokens whose patterns are known.
    indexed: usize,
    /// Share of guessed tokens that came true.
    rate: f32,
    /// Tokens until the next guess.
    pause: u32,
    next_pause: u32,
}

impl Default for Lookup {
    fn default() -> Self {
        Self {
            last: HashMap::new(),
            indexed: 0,
            rate: 0.6,
            pause: 0,
            next_pause: FIRST_PAUSE,
        }
    }
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
        if self.pause > 0 {
            self.pause -= 1;
            return Vec::new();
        }
        let most = most.min(worthwhile(self.rate, rows));
        let Some(pattern) = tokens.last_chunk::<PATTERN>() else {
            return Vec::new();
        };
        let Some(&start) = self.last.get(pattern) else {
            return Vec::new();
        };
        // What goes round in a circle goes on so.
        tokens[start..].iter().copied().cycle().take(most).collect()
    }

    /// Tokens to guess that are all but certain.
    pub(super) fn sure(rows: usize) -> usize {
        worthwhile(0.9, rows)
    }

    /// Takes note of how many of the guessed tokens came true.
    pub(super) fn came_true(&mut self, guessed: usize, hits: usize) {
        if guessed == 0 {
            return;
        }
        // Only the first miss says anything; what was guessed after it was never a guess at that place.
        let tried = guessed.min(hits + 1);
        for index in 0..tried {
            let hit = if index < hits { 1.0 } else { 0.0 };
            self.rate += NEWEST * (hit - self.rate);
        }
        if worthwhile(self.rate, 1) == 0 {
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(LONGEST_PAUSE);
            // The next guess is a try: it gets a length again.
            self.rate = 0.3;
        } else if hits == guessed && hits >= PATTERN {
            self.next_pause = FIRST_PAUSE;
        }
    }
}

/// Tokens to guess: as long as the next one is likelier to come true than it costs.
fn worthwhile(rate: f32, rows: usize) -> usize {
    let rows = rows.max(1) as f32;
    let least = rows / (rows + STEP_ROWS) + 0.05;
    let mut likely = rate;
    let mut count = 0;
    while likely > least && count < MOST {
        count += 1;
        likely *= rate;
    }
    count
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

    #[test]
    fn guesses_grow_with_success_and_end_with_failure() {
        let tokens: Vec<u32> = (0..40).chain(0..10).collect();
        let mut lookup = Lookup::default();
        let first = lookup.guess(&tokens, 1, 20).len();
        for _ in 0..10 {
            lookup.came_true(4, 4);
        }
        assert!(lookup.guess(&tokens, 1, 20).len() > first);
        let mut calls = 0;
        while lookup.pause == 0 {
            lookup.came_true(1, 0);
            calls += 1;
        }
        assert!((2..20).contains(&calls), "{calls}");
        assert_eq!(lookup.guess(&tokens, 1, 20), [0_u32; 0]);
    }

    #[test]
    fn a_full_batch_needs_surer_guesses() {
        assert!(worthwhile(0.6, 1) > 1);
        assert!(worthwhile(0.6, 16) == 0);
        assert!(worthwhile(0.95, 16) > 0);
    }
}
