//! Which blocks hold which tokens: a tree of prefixes, so that what was read once is not read again.
//!
//! A node is a block; its path from the root is the text before it. Full blocks are shared as they are, for
//! nobody writes to them again; a block that is the same only at its beginning is copied. Nodes of which no
//! sequence makes use stay until their memory is wanted, least recently used first, leaves before trunks.
//! Roots are kept apart by scope: what one caller sent must not answer another faster.
//! Source: Kwon et al. 2023 (paged attention); Zheng et al. 2024 (radix attention).

use std::collections::HashMap;

use crate::kernels::attention::BLOCK_TOKENS;

/// What lies before a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parent {
    Root(u64),
    Block(u32),
}

#[derive(Debug)]
struct Node {
    parent: Parent,
    /// Tokens whose keys and values the block holds, at most [`BLOCK_TOKENS`].
    tokens: Vec<u32>,
    children: Vec<u32>,
    used_at: u64,
}

/// The tree. Nodes have the numbers of their blocks.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    nodes: HashMap<u32, Node>,
    roots: HashMap<u64, Vec<u32>>,
    clock: u64,
}

/// What is known of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Match {
    /// Full blocks, in order.
    pub(super) blocks: Vec<u32>,
    /// A block that begins as the text goes on, and how many tokens of it are the same.
    pub(super) partial: Option<(u32, usize)>,
}

impl Match {
    pub(super) fn tokens(&self) -> usize {
        self.blocks.len() * BLOCK_TOKENS + self.partial.map_or(0, |(_, tokens)| tokens)
    }
}

/// Tokens at the beginning that are the same.
pub(crate) fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Prefixes {
    fn children(&self, parent: Parent) -> &[u32] {
        match parent {
            Parent::Root(scope) => self.roots.get(&scope).map_or(&[], Vec::as_slice),
            Parent::Block(block) => self
                .nodes
                .get(&block)
                .map_or(&[], |node| node.children.as_slice()),
        }
    }

    /// The longest known beginning of `tokens`.
    pub(super) fn longest(&self, scope: u64, tokens: &[u32]) -> Match {
        let mut found = Match::default();
        let (mut parent, mut rest) = (Parent::Root(scope), tokens);
        loop {
            let mut best = (None, 0);
            for &child in self.children(parent) {
                let Some(node) = self.nodes.get(&child) else {
                    continue;
                };
                let same = common_prefix(&node.tokens, rest);
                if same > best.1 {
                    best = (Some(child), same);
                }
            }
            match best {
                (Some(block), BLOCK_TOKENS) => {
                    found.blocks.push(block);
                    parent = Parent::Block(block);
                    rest = &rest[BLOCK_TOKENS..];
                }
                (Some(block), same) => {
                    found.partial = Some((block, same));
                    return found;
                }
                (None, _) => return found,
            }
        }
    }

    /// Says that `block`, after `before`, holds `tokens`. Gives the block that is known to hold the same,
    /// if there is another one: then that one should be used and this one given back.
    pub(super) fn insert(
        &mut self,
        scope: u64,
        before: Option<u32>,
        block: u32,
        tokens: &[u32],
    ) -> Option<u32> {
        self.clock += 1;
        if let Some(node) = self.nodes.get_mut(&block) {
            node.tokens.clear();
            node.tokens.extend_from_slice(tokens);
            node.used_at = self.clock;
            return self.twin(block);
        }
        let parent = before.map_or(Parent::Root(scope), Parent::Block);
        // What lies before must be known itself.
        if let Parent::Block(before) = parent
            && !self.nodes.contains_key(&before)
        {
            return None;
        }
        let node = Node {
            parent,
            tokens: tokens.to_vec(),
            children: Vec::new(),
            used_at: self.clock,
        };
        self.nodes.insert(block, node);
        match parent {
            Parent::Root(scope) => self.roots.entry(scope).or_default().push(block),
            Parent::Block(before) => {
                if let Some(node) = self.nodes.get_mut(&before) {
                    node.children.push(block);
                }
            }
        }
        self.twin(block)
    }

    /// Another full block in the same place with the same tokens.
    fn twin(&self, block: u32) -> Option<u32> {
        let node = self.nodes.get(&block)?;
        if node.tokens.len() < BLOCK_TOKENS {
            return None;
        }
        let same = |other: &u32| {
            *other != block
                && self
                    .nodes
                    .get(other)
                    .is_some_and(|other| other.tokens == node.tokens)
        };
        self.children(node.parent).iter().copied().find(same)
    }

    /// Marks blocks as used now.
    pub(super) fn touch(&mut self, blocks: &[u32]) {
        self.clock += 1;
        for block in blocks {
            if let Some(node) = self.nodes.get_mut(block) {
                node.used_at = self.clock;
            }
        }
    }

    pub(super) fn contains(&self, block: u32) -> bool {
        self.nodes.contains_key(&block)
    }

    /// Forgets a leaf.
    pub(super) fn remove(&mut self, block: u32) {
        let Some(node) = self.nodes.remove(&block) else {
            return;
        };
        match node.parent {
            Parent::Root(scope) => {
                if let Some(children) = self.roots.get_mut(&scope) {
                    children.retain(|&child| child != block);
                    if children.is_empty() {
                        self.roots.remove(&scope);
                    }
                }
            }
            Parent::Block(before) => {
                if let Some(before) = self.nodes.get_mut(&before) {
                    before.children.retain(|&child| child != block);
                }
            }
        }
    }

    /// The leaf that was used longest ago, among those that `unused` allows.
    pub(super) fn oldest_leaf(&self, unused: impl Fn(u32) -> bool) -> Option<u32> {
        self.nodes
            .iter()
            .filter(|(block, node)| node.children.is_empty() && unused(**block))
            .min_by_key(|(block, node)| (node.used_at, **block))
            .map(|(&block, _)| block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(from: u32, count: usize) -> Vec<u32> {
        (from..).take(count).collect()
    }

    #[test]
    fn full_blocks_are_found_whole_and_others_by_their_beginning() {
        let mut prefixes = Prefixes::default();
        let tokens = text(0, 70);
        assert_eq!(prefixes.insert(0, None, 5, &tokens[..32]), None);
        assert_eq!(prefixes.insert(0, Some(5), 3, &tokens[32..64]), None);
        assert_eq!(prefixes.insert(0, Some(3), 9, &tokens[64..]), None);
        let found = prefixes.longest(0, &tokens);
        assert_eq!(
            (found.blocks.as_slice(), found.partial),
            (&[5, 3][..], Some((9, 6)))
        );
        assert_eq!(found.tokens(), 70);
        let mut other = tokens.clone();
        other[40] = 1000;
        let found = prefixes.longest(0, &other);
        assert_eq!((found.blocks.as_slice(), found.partial), (&[5][..], Some((3, 8))));
        assert_eq!(prefixes.longest(1, &tokens), Match::default());
    }

    #[test]
    fn the_same_text_computed_twice_is_told() {
        let mut prefixes = Prefixes::default();
        let tokens = text(0, 32);
        assert_eq!(prefixes.insert(0, None, 1, &tokens), None);
        assert_eq!(prefixes.insert(0, None, 2, &tokens), Some(1));
        // A block that grew until it was the same.
        assert_eq!(prefixes.insert(0, None, 3, &tokens[..10]), None);
        assert!(prefixes.insert(0, None, 3, &tokens).is_some());
    }

    #[test]
    fn the_oldest_leaf_goes_first_and_trunks_wait_for_their_branches() {
        let mut prefixes = Prefixes::default();
        let tokens = text(0, 96);
        prefixes.insert(0, None, 0, &tokens[..32]);
        prefixes.insert(0, Some(0), 1, &tokens[32..64]);
        prefixes.insert(0, Some(0), 2, &tokens[64..]);
        prefixes.touch(&[0, 1]);
        assert_eq!(prefixes.oldest_leaf(|_| true), Some(2));
        prefixes.remove(2);
        assert_eq!(prefixes.oldest_leaf(|_| true), Some(1));
        assert_eq!(prefixes.oldest_leaf(|block| block != 1), None);
        prefixes.remove(1);
        assert_eq!(prefixes.oldest_leaf(|_| true), Some(0));
    }
}
