//! What all layers of a step share, as tensors on the device: places in the cache, rotations, masks.

use candle_core::{Device, Result, Tensor};

use crate::kv::BlockTable;
use crate::model::{DecoderConfig, Rope, Rotations, Row};

/// Most rows of one sequence whose scores are in memory at once.
const PIECE_ROWS: usize = 128;
/// Most tokens whose keys are gathered at once for several sequences: padding them to one length is cheaper
/// than asking the device for each alone, up to a point.
const GATHERED_TOKENS: usize = 1 << 16;

/// Sines and cosines, `[rows, dimensions / 2]` each.
pub(super) struct Angles {
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
}

/// Neighbouring pieces of as many rows each, whose attention is computed together.
pub(super) struct Group {
    pub(super) first_row: usize,
    pub(super) pieces: usize,
    /// Rows of each.
    pub(super) rows: usize,
    /// Tokens of the longest.
    pub(super) context: usize,
    /// Their places in the cache, `[pieces * context]`; shorter ones are filled up with a place of their own.
    pub(super) places: Tensor,
    /// What is added to the scores, `[pieces, 1, rows, context]`; None where everything is seen.
    pub(super) mask: Option<Tensor>,
    /// The same for layers with a sliding window.
    pub(super) local_mask: Option<Tensor>,
}

/// What all layers of a step share.
pub(super) struct Step {
    pub(super) rows: usize,
    /// The place of each number of a row's key or value, `[rows, kv_heads * head_dim]`.
    pub(super) places: Tensor,
    pub(super) groups: Vec<Group>,
    pub(super) global: Angles,
    pub(super) local: Option<Angles>,
}

/// Some rows of one sequence.
#[derive(Clone, Copy)]
struct Piece {
    sequence: usize,
    first_row: usize,
    rows: usize,
    position: usize,
}

impl Piece {
    fn context(&self) -> usize {
        self.position + self.rows
    }
}

impl Step {
    pub(super) fn new(
        rows: &[Row],
        tables: &[&BlockTable],
        config: &DecoderConfig,
        (global, local): (&Rope, Option<&Rope>),
        device: &Device,
    ) -> Result<Self> {
        let places: Vec<u32> = rows
            .iter()
            .map(|row| tables[row.sequence].place(row.position))
            .collect();
        let width = config.kv_heads * config.head_dim;
        let places = Tensor::from_vec(places, (rows.len(), 1), device)?
            .broadcast_as((rows.len(), width))?
            .contiguous()?;
        let positions = || rows.iter().map(|row| row.position);
        let global = Rotations::new(positions(), global);
        let local = local.map(|rope| Rotations::new(positions(), rope));
        let groups = grouped(&pieces(rows))
            .into_iter()
            .map(|pieces| Group::new(pieces, tables, config.sliding_window, device))
            .collect::<Result<_>>()?;
        Ok(Self {
            rows: rows.len(),
            places,
            groups,
            global: Angles::new(global, rows.len(), device)?,
            local: local
                .map(|local| Angles::new(local, rows.len(), device))
                .transpose()?,
        })
    }
}

impl Angles {
    fn new(rotations: Rotations, rows: usize, device: &Device) -> Result<Self> {
        let half = rotations.cos.len() / rows;
        Ok(Self {
            cos: Tensor::from_vec(rotations.cos, (rows, half), device)?,
            sin: Tensor::from_vec(rotations.sin, (rows, half), device)?,
        })
    }
}

/// Rows of one sequence follow each other.
fn pieces(rows: &[Row]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        match pieces.last_mut() {
            Some(piece) if piece.sequence == row.sequence && piece.rows < PIECE_ROWS => piece.rows += 1,
            _ => pieces.push(Piece {
                sequence: row.sequence,
                first_row: index,
                rows: 1,
                position: row.position,
            }),
        }
    }
    pieces
}

fn grouped(pieces: &[Piece]) -> Vec<Vec<Piece>> {
    let mut groups: Vec<Vec<Piece>> = Vec::new();
    for piece in pieces {
        let fits = |group: &&mut Vec<Piece>| {
            let longest = group.iter().map(Piece::context).max().unwrap_or(0);
            let tokens = longest.max(piece.context()) * (group.len() + 1);
            group.first().is_some_and(|first| first.rows == piece.rows) && tokens <= GATHERED_TOKENS
        };
        match groups.last_mut().filter(fits) {
            Some(group) => group.push(*piece),
            None => groups.push(vec![*piece]),
        }
    }
    groups
}

impl Group {
    fn new(
        pieces: Vec<Piece>,
        tables: &[&BlockTable],
        window: Option<usize>,
        device: &Device,
    ) -> Result<Self> {
        let context = pieces.iter().map(Piece::context).max().unwrap_or(0);
        let (first_row, rows) = pieces
            .first()
            .map_or((0, 0), |piece| (piece.first_row, piece.rows));
        let mut places = Vec::with_capacity(pieces.len() * context);
        for piece in &pieces {
            let table = tables[piece.sequence];
            places.extend((0..piece.context()).map(|position| table.place(position)));
            // Never another's: a number that is none spreads even from where it does not count.
            places.resize(places.len() + context - piece.context(), table.place(0));
        }
        let mask = |window: Option<usize>| -> Result<Option<Tensor>> {
            let seen =
                |query: usize, key: usize| key <= query && window.is_none_or(|window| key + window > query);
            let numbers: Vec<f32> = pieces
                .iter()
                .flat_map(|piece| piece.position..piece.context())
                .flat_map(|query| (0..context).map(move |key| (query, key)))
                .map(|(query, key)| if seen(query, key) { 0.0 } else { f32::NEG_INFINITY })
                .collect();
            if numbers.iter().all(|&x| x == 0.0) {
                return Ok(None);
            }
            Tensor::from_vec(numbers, (pieces.len(), 1, rows, context), device).map(Some)
        };
        Ok(Self {
            first_row,
            pieces: pieces.len(),
            rows,
            context,
            places: Tensor::new(places, device)?,
            mask: mask(None)?,
            local_mask: window.map_or(Ok(None), |window| mask(Some(window)))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(runs: &[(usize, usize, usize)]) -> Vec<Row> {
        let row = |sequence, position| Row {
            token: 0,
            position,
            sequence,
            wants_logits: false,
            of_prompt: true,
        };
        let runs = runs.iter();
        runs.flat_map(|&(sequence, position, count)| {
            (position..position + count).map(move |position| row(sequence, position))
        })
        .collect()
    }

    #[test]
    fn answers_are_computed_together_and_long_prompts_in_pieces() {
        let rows = rows(&[(0, 9, 1), (1, 70, 1), (2, 0, 300), (3, 5, 1)]);
        let shape = |group: &Vec<Piece>| (group.len(), group[0].rows, group[0].first_row, group[0].position);
        let groups = grouped(&pieces(&rows));
        assert_eq!(
            groups.iter().map(shape).collect::<Vec<_>>(),
            [(2, 1, 0, 9), (2, 128, 2, 0), (1, 44, 258, 256), (1, 1, 302, 5)]
        );
    }
}
