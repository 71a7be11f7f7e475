//! Merging neighbours, best first: the core of BPE and of SentencePiece.
//!
//! A heap of candidate pairs over a linked list of symbols, so a word of n symbols takes n log n steps
//! however it is made: a hostile run of one letter costs what any text costs.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// One symbol in the list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Symbol {
    /// First byte in the word.
    pub(super) start: u32,
    /// Bytes; 0 once it was merged into the one before.
    pub(super) length: u32,
    /// What the caller knows it by.
    pub(super) id: u32,
    before: u32,
    after: u32,
}

const NONE: u32 = u32::MAX;

/// A pair that could be merged. `rank` is better when lower.
#[derive(PartialEq)]
struct Candidate {
    rank: f32,
    left: u32,
    right: u32,
    length: u32,
    id: u32,
}

impl Eq for Candidate {}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives the greatest: lowest rank, then leftmost.
        other.rank.total_cmp(&self.rank).then(other.left.cmp(&self.left))
    }
}

/// Merges `symbols` (start, length, id) as long as `pair` knows a merge: it gets two neighbours and gives
/// the rank and the id of what they become.
pub(super) fn merge(
    symbols: impl Iterator<Item = (u32, u32, u32)>,
    pair: impl Fn(&Symbol, &Symbol) -> Option<(f32, u32)>,
) -> Vec<Symbol> {
    let mut list: Vec<Symbol> = Vec::new();
    for (start, length, id) in symbols {
        let at = list.len() as u32;
        let before = at.checked_sub(1).unwrap_or(NONE);
        if let Some(last) = list.last_mut() {
            last.after = at;
        }
        list.push(Symbol {
            start,
            length,
            id,
            before,
            after: NONE,
        });
    }
    let mut heap = BinaryHeap::new();
    let propose = |list: &[Symbol], heap: &mut BinaryHeap<Candidate>, left: u32, right: u32| {
        let (Some(a), Some(b)) = (list.get(left as usize), list.get(right as usize)) else {
            return;
        };
        if let Some((rank, id)) = pair(a, b) {
            heap.push(Candidate {
                rank,
                left,
                right,
                length: a.length + b.length,
                id,
            });
        }
    };
    for right in 1..list.len() as u32 {
        propose(&list, &mut heap, right - 1, right);
    }
    while let Some(candidate) = heap.pop() {
        let (Some(&left), Some(&right)) = (
            list.get(candidate.left as usize),
            list.get(candidate.right as usize),
        ) else {
            continue;
        };
        // Out of date: one of the two was merged with somebody else.
        let stale = left.length == 0
            || right.length == 0
            || left.after != candidate.right
            || left.length + right.length != candidate.length;
        if stale {
            continue;
        }
        if let Some(left) = list.get_mut(candidate.left as usize) {
            (left.length, left.id, left.after) = (candidate.length, candidate.id, right.after);
        }
        if let Some(gone) = list.get_mut(candidate.right as usize) {
            gone.length = 0;
        }
        if let Some(next) = list.get_mut(right.after as usize) {
            next.before = candidate.left;
        }
        propose(&list, &mut heap, left.before, candidate.left);
        propose(&list, &mut heap, candidate.left, right.after);
    }
    list.retain(|symbol| symbol.length > 0);
    list
}
