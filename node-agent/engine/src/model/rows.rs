//! The rows of a step, and which of them belong together.

use std::borrow::Cow;

use crate::kernels::attention::Run;

/// One row of a batch. Rows of one sequence follow each other, positions rising by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) token: u32,
    pub(crate) position: usize,
    /// Index into the tables.
    pub(crate) sequence: usize,
    /// Whether the logits after this row are wanted.
    pub(crate) wants_logits: bool,
    /// Whether it was sent, and not written: matrix units, where there are any, compute the rows of prompts, and no others.
    /// Where there are any, rows of both kinds of one sequence are not in one step.
    pub(crate) of_prompt: bool,
}

/// The rows in their order, but if matrix units read prompts those of prompts behind all others; and how many those are.
pub(super) fn ordered(rows: &[Row], units: bool) -> (Cow<'_, [Row]>, usize) {
    if !units {
        return (Cow::Borrowed(rows), 0);
    }
    let (last, mut ordered): (Vec<Row>, Vec<Row>) = rows.iter().partition(|row| row.of_prompt);
    ordered.extend_from_slice(&last);
    (Cow::Owned(ordered), last.len())
}

/// Rows of one sequence, together.
pub(super) fn runs(rows: &[Row]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if run.sequence == row.sequence && run.of_prompt == row.of_prompt => run.rows += 1,
            _ => runs.push(Run {
                sequence: row.sequence,
                first_row: index,
                rows: 1,
                position: row.position,
                of_prompt: row.of_prompt,
            }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(sequence: usize, position: usize, of_prompt: bool) -> Row {
        Row {
            token: 0,
            position,
            sequence,
            wants_logits: true,
            of_prompt,
        }
    }

    #[test]
    fn rows_of_prompts_come_last_where_units_read_them_and_each_kind_keeps_its_order() {
        let rows = [
            row(0, 7, false),
            row(1, 0, true),
            row(1, 1, true),
            row(2, 3, false),
            row(3, 5, true),
        ];
        let (same, none) = ordered(&rows, false);
        assert_eq!((&*same, none), (&rows[..], 0));
        let (apart, of_prompts) = ordered(&rows, true);
        assert_eq!(&*apart, [rows[0], rows[3], rows[1], rows[2], rows[4]]);
        assert_eq!(of_prompts, 3);
        assert_eq!(ordered(&[], true).1, 0);
    }

    #[test]
    fn a_run_is_of_one_sequence_and_one_kind() {
        let rows = [
            row(0, 7, false),
            row(0, 8, false),
            row(1, 4, false),
            row(1, 5, true),
            row(1, 6, true),
            row(2, 0, true),
        ];
        let runs = runs(&rows);
        let found: Vec<_> = runs
            .iter()
            .map(|run| (run.sequence, run.first_row, run.rows, run.position, run.of_prompt))
            .collect();
        let expected = [
            (0, 0, 2, 7, false),
            (1, 2, 1, 4, false),
            (1, 3, 2, 5, true),
            (2, 5, 1, 0, true),
        ];
        assert_eq!(found, expected);
    }
}
