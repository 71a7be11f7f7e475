//! How much prompts may read beside answers: pure arithmetic over what steps have cost so far.
//!
//! Answers under way must keep at least half their pace while a prompt is read. So every step of theirs earns
//! the prompts a share of the time it took, and prompts spend it in chunks: many rows at once cost far less
//! each than a few in every step. What rows cost is measured, because it depends on the model, the machine
//! and what else runs on it.

use std::time::Duration;

/// Weight of the newest measurement.
const NEWEST: f64 = 0.3;
/// Prompt rows before anything has been measured.
const FIRST_ROWS: usize = 32;
/// Fewest rows of a chunk: less would hardly be faster than one.
const LEAST_ROWS: usize = 8;
/// The same where the weights are read once more for prompts, which takes about as long as those rows: fewer are not worth it,
/// and tell nothing of what a row costs.
const LEAST_ROWS_APART: usize = 32;
/// Most rows of a chunk beside answers: more hardly cost less each.
const CHUNK_ROWS: usize = 64;
/// Most prompt rows of a step; what a kernel computes at once is well below.
const MOST_ROWS: usize = 512;
/// Longest step without an answer under way: a new request, or one that was cancelled, waits so long.
const ALONE_SECONDS: f64 = 0.25;
/// What a chunk may add to a step of answers, unless the fewest rows take longer: readers see a pause.
const PAUSE_SECONDS: f64 = 0.04;
/// What a step of answers earns for the prompts, of its own time. By itself it leaves answers two thirds of their pace; beside chunks
/// of prompts their own steps take longer too, and that is not told apart. With 0.6 a stream kept 0.49 to 0.53 of its pace
/// on Zen 4, with 0.7 0.496 where matrix units read the prompt.
const SHARE: f64 = 0.5;

/// What steps cost, and what prompts have earned.
#[derive(Debug)]
pub(super) struct Pace {
    /// Fewest rows of a chunk.
    least_rows: usize,
    /// Fewest rows that a chunk is counted as.
    counted_rows: usize,
    /// Seconds of a step that holds answers only, and how many rows it had.
    decode: Option<(f64, usize)>,
    /// Seconds of one prompt row.
    row_seconds: Option<f64>,
    /// Seconds that prompts may take; below zero after a chunk that cost more than was thought.
    earned: f64,
}

fn mix(before: Option<f64>, now: f64) -> f64 {
    before.map_or(now, |before| before + NEWEST * (now - before))
}

impl Pace {
    /// `apart`: whether prompts are computed by other means than answers, which read the weights once more.
    pub(super) fn new(apart: bool) -> Self {
        let (least_rows, counted_rows) = if apart {
            (LEAST_ROWS_APART, LEAST_ROWS_APART)
        } else {
            (LEAST_ROWS, 1)
        };
        Self {
            least_rows,
            counted_rows,
            decode: None,
            row_seconds: None,
            earned: 0.0,
        }
    }

    /// Takes note of a step.
    pub(super) fn took(&mut self, decode_rows: usize, prompt_rows: usize, time: Duration) {
        let seconds = time.as_secs_f64();
        if prompt_rows == 0 {
            let before = self.decode.map(|(seconds, _)| seconds);
            self.decode = Some((mix(before, seconds), decode_rows));
            self.earn(SHARE * seconds);
            return;
        }
        // The answers' part is what it cost without prompts, as far as that is known.
        let own = match self.decode {
            Some((before, _)) if decode_rows > 0 => before.min(seconds / 2.0),
            _ => 0.0,
        };
        let row = (seconds - own) / prompt_rows.max(self.counted_rows) as f64;
        self.row_seconds = Some(mix(self.row_seconds, row));
        if decode_rows > 0 {
            self.earn(SHARE * own - (seconds - own));
        }
    }

    /// One chunk can be saved up for, and no more: then answers would stand still for long.
    fn earn(&mut self, seconds: f64) {
        let most = self.row_seconds.map_or(PAUSE_SECONDS, |row| {
            PAUSE_SECONDS.max(row * self.least_rows as f64)
        });
        self.earned = (self.earned + seconds).min(most);
    }

    /// Prompt rows that the next step may hold beside `decode_rows` rows of answers, where `remaining` wait
    /// to be read.
    pub(super) fn prompt_rows(&self, decode_rows: usize, remaining: usize) -> usize {
        let Some(row_seconds) = self.row_seconds else {
            return if decode_rows == 0 {
                MOST_ROWS / 4
            } else {
                FIRST_ROWS
            };
        };
        // Not a number, and below zero, become 0.
        let rows = |seconds: f64| (seconds / row_seconds.max(1e-9)) as usize;
        if decode_rows == 0 {
            return rows(ALONE_SECONDS).clamp(self.least_rows, MOST_ROWS);
        }
        let chunk = rows(PAUSE_SECONDS)
            .clamp(self.least_rows, CHUNK_ROWS)
            .min(remaining);
        if chunk as f64 * row_seconds <= self.earned + 1e-9 {
            chunk
        } else {
            0
        }
    }
}

/// Divides `budget` rows among prompts of which `remaining` rows are to be read, in order of arrival.
///
/// Half goes to the one that came first, so that the longest is read in the end; half to the shortest, so
/// that a question does not wait behind a book. What they leave goes to the others in order of arrival.
pub(super) fn shares(remaining: &[usize], budget: usize) -> Vec<usize> {
    let mut shares = vec![0; remaining.len()];
    let mut left = budget;
    let give = |shares: &mut Vec<usize>, left: &mut usize, index: usize, most: usize| {
        let rows = most.min(*left).min(remaining[index] - shares[index]);
        shares[index] += rows;
        *left -= rows;
    };
    let shortest = (0..remaining.len()).min_by_key(|&index| remaining[index]);
    if let Some(shortest) = shortest {
        give(&mut shares, &mut left, shortest, budget.div_ceil(2));
    }
    for index in 0..remaining.len() {
        give(&mut shares, &mut left, index, budget);
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn milliseconds(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Steps of four answers, 5 ms each, beside a prompt without end whose rows cost `row` ms: the chunks,
    /// and the share of the time that the answers had.
    fn beside_a_prompt(row: f64) -> (Vec<usize>, f64) {
        let mut pace = Pace::new(false);
        pace.took(0, 100, Duration::from_secs_f64(row / 10.0));
        let (mut chunks, mut all) = (Vec::new(), 0.0);
        for _ in 0..400 {
            let rows = pace.prompt_rows(4, 10_000);
            let took = 0.005 + rows as f64 * row / 1000.0;
            pace.took(4, rows, Duration::from_secs_f64(took));
            all += took;
            if rows > 0 {
                chunks.push(rows);
            }
        }
        (chunks, 400.0 * 0.005 / all)
    }

    #[test]
    fn answers_keep_half_their_pace_and_prompts_come_in_chunks() {
        for (row, chunk) in [(0.05, 64), (0.5, 64), (2.0, 20), (20.0, 8)] {
            let (chunks, share) = beside_a_prompt(row);
            // A chunk of 3.2 ms takes two steps to earn, at 2.5 ms each: 10 of 13.2 where none is saved for the next.
            assert!((0.5..0.76).contains(&share), "{row} ms a row: {share}");
            assert!(
                chunks.iter().all(|&rows| rows == chunk),
                "{row} ms a row: {chunks:?}"
            );
        }
    }

    /// Weights are read once more for prompts: a few rows cost as much as many.
    #[test]
    fn where_a_chunk_costs_much_in_itself_it_is_not_cut_small() {
        let mut pace = Pace::new(true);
        // The end of a prompt, and a whole chunk.
        pace.took(0, 1, milliseconds(80));
        assert_eq!(pace.prompt_rows(0, 1000), 100);
        pace.took(0, 100, milliseconds(250));
        assert_eq!(pace.prompt_rows(0, 1000), 100);
        for _ in 0..100 {
            pace.took(4, 0, milliseconds(20));
        }
        assert_eq!(pace.prompt_rows(4, 1000), LEAST_ROWS_APART);
        assert_eq!(pace.prompt_rows(4, 12), 12);
    }

    #[test]
    fn what_nobody_waits_beside_is_read_at_once() {
        let mut pace = Pace::new(false);
        assert_eq!(pace.prompt_rows(0, 1000), 128);
        pace.took(0, 128, milliseconds(128));
        assert_eq!(pace.prompt_rows(0, 1000), 250);
        // A short question beside answers that have earned its time.
        for _ in 0..10 {
            pace.took(4, 0, milliseconds(5));
        }
        assert_eq!(pace.prompt_rows(4, 12), 12);
    }

    #[test]
    fn rows_stay_within_bounds_before_and_after_odd_measurements() {
        let mut pace = Pace::new(false);
        assert_eq!(pace.prompt_rows(3, 1000), FIRST_ROWS);
        pace.took(3, 4, Duration::ZERO);
        pace.took(3, 0, Duration::ZERO);
        assert_eq!(pace.prompt_rows(3, 1000), CHUNK_ROWS);
        pace.took(0, 1, Duration::from_secs(60));
        assert_eq!(pace.prompt_rows(0, 1000), LEAST_ROWS);
        // The slowest machine reads a prompt in the end.
        for _ in 0..20_000 {
            pace.took(3, 0, milliseconds(50));
        }
        assert_eq!(pace.prompt_rows(3, 1000), LEAST_ROWS);
    }

    #[test]
    fn the_first_and_the_shortest_are_read_first() {
        assert_eq!(shares(&[1000, 500, 10], 100), [90, 0, 10]);
        assert_eq!(shares(&[1000, 40, 500], 64), [32, 32, 0]);
        assert_eq!(shares(&[5, 3, 900], 100), [5, 3, 92]);
        assert_eq!(shares(&[], 100), Vec::<usize>::new());
        assert_eq!(shares(&[7], 100), [7]);
    }
}
