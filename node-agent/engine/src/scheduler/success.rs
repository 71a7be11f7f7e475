//! Whether guessing pays, and how far ahead.
//!
//! A guess is only ever checked: the rows of guessed tokens go through the model beside the real one, and
//! each is kept as long as the sampler, asked in its usual order, chooses the same token. What is written
//! is therefore what would have been written, for greedy and for drawn answers alike. Guessing stops where
//! it does not pay: a row costs a part of a step ([`super::cost`]), so a guess must come true more often than
//! that, and more often still when many answers share the step, or when the guess itself costs time.
//! Source: Leviathan et al. 2023.

use super::cost::FIRST_ROWS;

/// Most tokens guessed at once.
const MOST: usize = 12;
/// Weight of the newest guess in the hit rate.
const NEWEST: f32 = 0.1;
/// Chances to guess that pass after guessing did not pay; doubled each time it does not pay again.
const FIRST_PAUSE: u32 = 16;
const LONGEST_PAUSE: u32 = 512;
/// Hits in a row after which a pause begins short again.
const GOOD: usize = 3;

/// How good one sequence's guesses have been.
#[derive(Clone, Debug)]
pub(super) struct Success {
    /// Share of guessed tokens that came true.
    rate: f32,
    /// How dear the latest guess was.
    price: Price,
    /// Chances to guess that pass before the next guess, which is a try.
    pause: u32,
    next_pause: u32,
    tries: bool,
}

impl Default for Success {
    fn default() -> Self {
        Self::expected(0.6)
    }
}

impl Success {
    /// Begins with a share that is thought to come true.
    pub(super) fn expected(rate: f32) -> Self {
        Self {
            rate,
            price: Price::default(),
            pause: 0,
            next_pause: FIRST_PAUSE,
            tries: false,
        }
    }

    /// Tokens to guess next, in a step of this price.
    pub(super) fn next(&mut self, price: Price) -> usize {
        self.price = price;
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        if self.tries {
            return 1;
        }
        let count = worthwhile(self.rate, price);
        if count == 0 && worthwhile(self.rate, price.alone()) == 0 {
            self.rest();
        }
        count
    }

    /// Takes note of how many of the guessed tokens came true.
    pub(super) fn came_true(&mut self, guessed: usize, hits: usize) {
        if guessed == 0 {
            return;
        }
        self.tries = false;
        // Only the first miss says anything; what was guessed after it was never a guess at that place.
        let tried = guessed.min(hits + 1);
        for index in 0..tried {
            let hit = if index < hits { 1.0 } else { 0.0 };
            self.rate += NEWEST * (hit - self.rate);
        }
        if worthwhile(self.rate, self.price.alone()) == 0 {
            self.rest();
        } else if hits == guessed && hits >= GOOD {
            self.next_pause = FIRST_PAUSE;
        }
    }

    /// Goes without guesses for a while, each time for longer.
    fn rest(&mut self) {
        self.pause = self.next_pause;
        self.next_pause = (self.next_pause * 2).min(LONGEST_PAUSE);
        self.tries = true;
        // A hit or two bring the guesses back.
        self.rate = (self.price.alone().least() + 0.1).min(0.9);
    }
}

/// What guessing costs in a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Price {
    /// Rows of the step without guesses.
    pub(super) rows: usize,
    /// Rows that cost as much as the rest of a step.
    pub(super) fixed_rows: f32,
    /// Time that it takes to guess a token, as a share of the step that checks it.
    pub(super) guess: f32,
}

impl Default for Price {
    fn default() -> Self {
        Self {
            rows: 1,
            fixed_rows: FIRST_ROWS,
            guess: 0.0,
        }
    }
}

impl Price {
    /// The same in a step that holds one answer.
    fn alone(self) -> Self {
        Self { rows: 1, ..self }
    }

    /// How likely a token must come true, at least.
    fn least(self) -> f32 {
        let rows = self.rows.max(1) as f32;
        rows / (rows + self.fixed_rows) + 0.05 + self.guess
    }
}

/// Tokens to guess: as long as the next one is likelier to come true than it costs.
fn worthwhile(rate: f32, price: Price) -> usize {
    let least = price.least();
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

    fn price(rows: usize, guess: f32) -> Price {
        Price {
            rows,
            guess,
            fixed_rows: 7.0,
        }
    }

    #[test]
    fn guesses_grow_with_success_and_end_with_failure() {
        let mut success = Success::default();
        let first = success.next(price(1, 0.0));
        for _ in 0..10 {
            success.came_true(4, 4);
        }
        assert!(success.next(price(1, 0.0)) > first);
        let mut calls = 0;
        while success.pause == 0 {
            success.came_true(1, 0);
            calls += 1;
        }
        assert!((2..20).contains(&calls), "{calls}");
        assert_eq!(success.next(price(1, 0.0)), 0);
    }

    #[test]
    fn a_full_batch_and_a_dear_guess_need_surer_guesses() {
        assert!(worthwhile(0.6, price(1, 0.0)) > 1);
        assert!(worthwhile(0.6, price(16, 0.0)) == 0);
        assert!(worthwhile(0.95, price(16, 0.0)) > 0);
        assert!(worthwhile(0.6, price(1, 0.5)) == 0);
        assert!(worthwhile(0.9, price(1, 0.5)) > 1);
    }

    #[test]
    fn after_a_rest_there_is_a_try_also_where_guesses_are_dear() {
        for cost in [0.0, 0.5, 2.0] {
            let mut success = Success::default();
            success.next(price(1, cost));
            while success.pause == 0 {
                success.came_true(1, 0);
            }
            while success.pause > 0 {
                success.next(price(1, cost));
            }
            assert!(success.next(price(1, cost)) > 0, "{cost}");
        }
    }
}
