//! Whether guessing pays, and how far ahead.
//!
//! A guess is only ever checked: the rows of guessed tokens go through the model beside the real one, and
//! each is kept as long as the sampler, asked in its usual order, chooses the same token. What is written
//! is therefore what would have been written, for greedy and for drawn answers alike. Guessing stops where
//! it does not pay: a row costs about an eighth of a step, so a guess must come true more often than that,
//! and more often still when many answers share the step, or when the guess itself costs time.
//! Source: Leviathan et al. 2023.

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
/// Hits in a row after which a pause begins short again.
const GOOD: usize = 3;

/// How good one sequence's guesses have been.
#[derive(Clone, Debug)]
pub(super) struct Success {
    /// Share of guessed tokens that came true.
    rate: f32,
    /// What a guessed token cost in the latest guess, in steps; see [`Self::next`].
    cost: f32,
    /// Tokens until the next guess, which is a try.
    pause: u32,
    next_pause: u32,
    tries: bool,
}

impl Default for Success {
    fn default() -> Self {
        Self {
            rate: 0.6,
            cost: 0.0,
            pause: 0,
            next_pause: FIRST_PAUSE,
            tries: false,
        }
    }
}

impl Success {
    /// Tokens to guess next, beside `rows` rows without a guess. `cost` is the time that guessing a token
    /// takes, as a share of the step that checks it.
    pub(super) fn next(&mut self, rows: usize, cost: f32) -> usize {
        self.cost = cost;
        if self.pause > 0 {
            self.pause -= 1;
            return 0;
        }
        if std::mem::take(&mut self.tries) {
            return 1;
        }
        let count = worthwhile(self.rate, rows, cost);
        if count == 0 && worthwhile(self.rate, 1, cost) == 0 {
            self.rest();
        }
        count
    }

    /// Tokens to guess that are all but certain, and cost nothing.
    pub(super) fn sure(rows: usize) -> usize {
        worthwhile(0.9, rows, 0.0)
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
        if worthwhile(self.rate, 1, self.cost) == 0 {
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
        self.rate = 0.3 + self.cost.min(0.6);
    }
}

/// Tokens to guess: as long as the next one is likelier to come true than it costs.
fn worthwhile(rate: f32, rows: usize, cost: f32) -> usize {
    let rows = rows.max(1) as f32;
    let least = rows / (rows + STEP_ROWS) + 0.05 + cost;
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
    fn guesses_grow_with_success_and_end_with_failure() {
        let mut success = Success::default();
        let first = success.next(1, 0.0);
        for _ in 0..10 {
            success.came_true(4, 4);
        }
        assert!(success.next(1, 0.0) > first);
        let mut calls = 0;
        while success.pause == 0 {
            success.came_true(1, 0);
            calls += 1;
        }
        assert!((2..20).contains(&calls), "{calls}");
        assert_eq!(success.next(1, 0.0), 0);
    }

    #[test]
    fn a_full_batch_and_a_dear_guess_need_surer_guesses() {
        assert!(worthwhile(0.6, 1, 0.0) > 1);
        assert!(worthwhile(0.6, 16, 0.0) == 0);
        assert!(worthwhile(0.95, 16, 0.0) > 0);
        assert!(worthwhile(0.6, 1, 0.5) == 0);
        assert!(worthwhile(0.9, 1, 0.5) > 1);
    }

    #[test]
    fn after_a_rest_there_is_a_try_also_where_guesses_are_dear() {
        for cost in [0.0, 0.5, 2.0] {
            let mut success = Success::default();
            success.next(1, cost);
            while success.pause == 0 {
                success.came_true(1, 0);
            }
            while success.pause > 0 {
                success.next(1, cost);
            }
            assert!(success.next(1, cost) > 0, "{cost}");
        }
    }
}
