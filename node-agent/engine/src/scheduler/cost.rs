//! What one more row costs a step of answers: measured, for it depends on the model, the machine and what else runs there.

use std::time::Duration;

/// What a step remembers of those before it: about the last hundred count.
const KEPT: f64 = 0.99;
/// Rows that cost as much as the rest of a step, before anything was measured: 3 and 7 were seen for small models, more for
/// large ones. Who begins too low guesses a little less until it is measured.
pub(super) const FIRST_ROWS: f32 = 3.0;
/// What is believed at least and at most, whatever a machine that does other things meanwhile lets one measure: below, nothing
/// would be guessed any more and so nothing measured; above, a row costs next to nothing in any case.
const LEAST_ROWS: f32 = 1.5;
const MOST_ROWS: f32 = 40.0;
/// A step that takes this many times what steps take was held up by something else.
const HELD_UP: f64 = 4.0;
/// Spread of row counts below which steps say nothing about one more row.
const LEAST_SPREAD: f64 = 0.1;

/// A line through the steps so far: seconds over rows.
#[derive(Debug, Default)]
pub(super) struct StepCost {
    weight: f64,
    rows: f64,
    seconds: f64,
    rows_squared: f64,
    rows_seconds: f64,
}

impl StepCost {
    /// Takes note of a step in which no prompt was read.
    pub(super) fn took(&mut self, rows: usize, time: Duration) {
        let (rows, mut seconds) = (rows as f64, time.as_secs_f64());
        if self.weight > 1.0 {
            seconds = seconds.min(HELD_UP * self.seconds / self.weight);
        }
        for (sum, now) in [
            (&mut self.weight, 1.0),
            (&mut self.rows, rows),
            (&mut self.seconds, seconds),
            (&mut self.rows_squared, rows * rows),
            (&mut self.rows_seconds, rows * seconds),
        ] {
            *sum = *sum * KEPT + now;
        }
    }

    /// Rows that cost as much as a step costs without any.
    pub(super) fn fixed_rows(&self) -> f32 {
        let weight = self.weight.max(1e-9);
        let (rows, seconds) = (self.rows / weight, self.seconds / weight);
        let spread = self.rows_squared / weight - rows * rows;
        if spread < LEAST_SPREAD {
            return FIRST_ROWS;
        }
        let row = (self.rows_seconds / weight - rows * seconds) / spread;
        if row <= 0.0 {
            return MOST_ROWS;
        }
        let fixed = (seconds - row * rows) / row;
        (fixed as f32).clamp(LEAST_ROWS, MOST_ROWS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(steps: &[(usize, f64)]) -> StepCost {
        let mut cost = StepCost::default();
        for &(rows, seconds) in steps {
            cost.took(rows, Duration::from_secs_f64(seconds));
        }
        cost
    }

    #[test]
    fn what_rows_cost_is_read_from_steps_of_different_sizes() {
        let steps: Vec<_> = (0..50)
            .map(|step| {
                let rows = 1 + step % 5;
                (rows, 0.003 + 0.001 * rows as f64)
            })
            .collect();
        assert!((cost(&steps).fixed_rows() - 3.0).abs() < 0.01);
    }

    #[test]
    fn steps_of_one_size_say_nothing() {
        for steps in [vec![], vec![(1, 0.003); 50], vec![(8, 0.009); 50]] {
            assert_eq!(cost(&steps).fixed_rows(), FIRST_ROWS);
        }
    }

    #[test]
    fn a_machine_that_becomes_another_is_measured_anew() {
        let mut steps: Vec<_> = (0..200)
            .map(|step| (1 + step % 2, 0.001 * (1 + step % 2) as f64))
            .collect();
        steps.extend((0..600).map(|step| (1 + step % 2, 0.009 + 0.001 * (1 + step % 2) as f64)));
        let found = cost(&steps).fixed_rows();
        assert!((8.0..10.0).contains(&found), "{found}");
        // Nonsense is bounded.
        let falling: Vec<_> = (0..50)
            .map(|step| (1 + step % 5, 0.01 - 0.001 * (step % 5) as f64))
            .collect();
        assert_eq!(cost(&falling).fixed_rows(), MOST_ROWS);
    }
}
