//! Whose request comes next: callers take turns, so that one who asks for much does not keep the others waiting.

use std::collections::HashMap;

/// Callers that are remembered; those of a bus of one household or firm are fewer.
const CALLERS: usize = 4096;

/// When each caller had its last turn.
#[derive(Default)]
pub(super) struct Turns {
    last: HashMap<u64, u64>,
    count: u64,
}

impl Turns {
    /// Who waits longest for a turn has the smallest; 0 for who had none.
    pub(super) fn last(&self, owner: u64) -> u64 {
        self.last.get(&owner).copied().unwrap_or(0)
    }

    pub(super) fn took(&mut self, owner: u64) {
        self.count += 1;
        // To forget everybody is to begin a round anew.
        if self.last.len() >= CALLERS {
            self.last.clear();
        }
        self.last.insert(owner, self.count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_had_no_turn_comes_before_who_had_one_long_ago() {
        let mut turns = Turns::default();
        turns.took(1);
        turns.took(2);
        turns.took(1);
        let mut callers = [1, 2, 3];
        callers.sort_by_key(|&owner| turns.last(owner));
        assert_eq!(callers, [3, 2, 1]);
    }

    #[test]
    fn no_number_of_callers_fills_the_memory() {
        let mut turns = Turns::default();
        (0..3 * CALLERS as u64).for_each(|owner| turns.took(owner));
        assert!(turns.last.len() <= CALLERS);
    }
}
