//! How much of a step prompts may take: pure arithmetic over what steps have cost so far.
//!
//! Answers under way must keep at least half their pace while a prompt is read. So the prompt rows of a step
//! may cost as much time as the step costs without them, and no more. What they cost is measured, because
//! it depends on the model, the machine and what else runs on it.

use std::time::Duration;

/// Weight of the newest measurement.
const NEWEST: f64 = 0.3;
/// Prompt rows before anything has been measured.
const FIRST_ROWS: usize = 32;
/// Fewest prompt rows of a step: less would hardly be faster than one.
const LEAST_ROWS: usize = 8;
/// Most prompt rows of a step; what a kernel computes at once is well below.
const MOST_ROWS: usize = 512;
/// Longest step without an answer under way: a new request, or one that was cancelled, waits so long.
const ALONE_SECONDS: f64 = 0.25;
/// Part of a step's own time that prompts may add to it. Below 1: measurements lag behind.
const SHARE: f64 = 0.9;

/// What steps cost.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Seconds of a step that holds answers only, and how many rows it had.
    decode: Option<(f64, usize)>,
    /// Seconds of one prompt row.
    row_seconds: Option<f64>,
}

fn mix(before: Option<f64>, now: f64) -> f64 {
    before.map_or(now, |before| before + NEWEST * (now - before))
}

impl Pace {
    /// Takes note of a step.
    pub(super) fn took(&mut self, decode_rows: usize, prompt_rows: usize, time: Duration) {
        let seconds = time.as_secs_f64();
        if prompt_rows == 0 {
            let before = self.decode.map(|(seconds, _)| seconds);
            self.decode = Some((mix(before, seconds), decode_rows));
            return;
        }
        // The answers' part is what it cost without prompts, as far as that is known.
        let own = match self.decode {
            Some((before, _)) if decode_rows > 0 => before.min(seconds / 2.0),
            _ => 0.0,
        };
        let row = (seconds - own) / prompt_rows as f64;
        self.row_seconds = Some(mix(self.row_seconds, row));
    }

    /// Prompt rows that the next step may hold beside `decode_rows` rows of answers.
    pub(super) fn prompt_rows(&self, decode_rows: usize) -> usize {
        let Some(row_seconds) = self.row_seconds else {
            return if decode_rows == 0 {
                MOST_ROWS / 4
            } else {
                FIRST_ROWS
            };
        };
        let seconds = match self.decode {
            _ if decode_rows == 0 => ALONE_SECONDS,
            // More answers than were measured cost more; how much is not known, and so not counted.
            Some((seconds, rows)) => {
                SHARE * seconds * (decode_rows.min(rows) as f64 / rows.max(1) as f64).sqrt()
            }
            None => return FIRST_ROWS,
        };
        // Not a number, and below zero, become 0.
        let rows = (seconds / row_seconds.max(1e-9)) as usize;
        rows.clamp(LEAST_ROWS, MOST_ROWS)
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

    #[test]
    fn prompts_take_no_more_time_than_the_answers() {
        let mut pace = Pace::default();
        pace.took(0, 128, milliseconds(128));
        pace.took(4, 0, milliseconds(20));
        assert_eq!(pace.prompt_rows(4), 18);
        // A slower machine: rows cost more, and fewer are read.
        for _ in 0..50 {
            pace.took(4, 18, milliseconds(20 + 36));
        }
        assert_eq!(pace.prompt_rows(4), 9);
        // Nobody else waits.
        assert_eq!(pace.prompt_rows(0), 125);
    }

    #[test]
    fn rows_stay_within_bounds_before_and_after_odd_measurements() {
        let mut pace = Pace::default();
        assert_eq!(pace.prompt_rows(3), FIRST_ROWS);
        pace.took(3, 4, Duration::ZERO);
        pace.took(3, 0, Duration::ZERO);
        assert_eq!(pace.prompt_rows(3), LEAST_ROWS);
        pace.took(0, 1, Duration::from_secs(60));
        assert_eq!(pace.prompt_rows(0), LEAST_ROWS);
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
