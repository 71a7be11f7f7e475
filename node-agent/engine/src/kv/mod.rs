//! The KV cache: fixed blocks of tokens, handed out, shared and taken back.
//!
//! A sequence holds a table of blocks and not one buffer, so a batch may hold sequences of any lengths,
//! memory is taken as answers grow, and what one frees another uses. Blocks whose tokens are known
//! ([`prefix`]) are shared by sequences that begin alike, and kept for a while after their last user left.
//! A block's memory is taken when it is first needed and given back to the machine when the engine rests.

mod blocks;
mod prefix;

use std::ops::Range;

use crate::inspect::KvType;
use crate::kernels::Pool;
use crate::kernels::attention::{BLOCK_TOKENS, Cache, Numbers};
pub(crate) use blocks::KvShape;
use blocks::{Block, Side};
use prefix::Prefixes;
pub(crate) use prefix::common_prefix;

/// The blocks of all sequences.
pub(crate) struct KvCache {
    shape: KvShape,
    /// None: the numbers lie on a device, and only who has which block is kept here.
    kv_type: Option<KvType>,
    blocks: Vec<Option<Block>>,
    /// Sequences that use each block.
    users: Vec<u32>,
    /// Blocks that hold nothing of worth.
    free: Vec<u32>,
    prefixes: Prefixes,
    /// Blocks of known prefixes that nobody uses.
    kept: usize,
    /// Most of those.
    keep_blocks: usize,
}

/// The blocks of one sequence, in order.
#[derive(Debug, Default)]
pub(crate) struct BlockTable {
    blocks: Vec<u32>,
    /// Whose prefixes it may share.
    scope: u64,
    /// Tokens whose place in the tree of prefixes is known.
    published: usize,
}

impl BlockTable {
    /// An empty table that shares prefixes within `scope`.
    pub(crate) fn new(scope: u64) -> Self {
        Self {
            scope,
            ..Self::default()
        }
    }

    /// Where the token at a position lies: its block's number, and the token in it.
    pub(crate) fn place(&self, position: usize) -> u32 {
        let (block, token) = (position / BLOCK_TOKENS, position % BLOCK_TOKENS);
        self.blocks[block] * BLOCK_TOKENS as u32 + token as u32
    }

    pub(crate) fn scope(&self) -> u64 {
        self.scope
    }

    /// Tokens that others know of.
    pub(crate) fn published(&self) -> usize {
        self.published
    }
}

/// Blocks that hold this many tokens.
pub(crate) fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

impl KvCache {
    /// `keep_blocks`: most blocks of known prefixes that stay in memory without a user.
    pub(crate) fn new(shape: KvShape, kv_type: KvType, capacity_blocks: usize, keep_blocks: usize) -> Self {
        Self {
            shape,
            kv_type: Some(kv_type),
            blocks: (0..capacity_blocks).map(|_| None).collect(),
            users: vec![0; capacity_blocks],
            // Low numbers first, so that the blocks that have memory are used again first.
            free: (0..capacity_blocks as u32).rev().collect(),
            prefixes: Prefixes::default(),
            kept: 0,
            keep_blocks,
        }
    }

    /// A cache whose numbers lie on a device. Whole blocks are shared as ever; the beginning of a block is not.
    pub(crate) fn of_blocks_elsewhere(capacity_blocks: usize, keep_blocks: usize) -> Self {
        let shape = KvShape {
            layers: 0,
            kv_heads: 0,
            head_dim: 0,
        };
        Self {
            kv_type: None,
            ..Self::new(shape, KvType::F16, capacity_blocks, keep_blocks)
        }
    }

    /// Blocks that a sequence could have.
    pub(crate) fn available_blocks(&self) -> usize {
        self.free.len() + self.kept
    }

    /// Blocks that sequences use.
    pub(crate) fn used_blocks(&self) -> usize {
        self.blocks.len() - self.available_blocks()
    }

    /// Forgets the prefix that was used longest ago. False when there is none.
    fn evict(&mut self) -> bool {
        let users = &self.users;
        let Some(block) = self.prefixes.oldest_leaf(|block| users[block as usize] == 0) else {
            return false;
        };
        self.prefixes.remove(block);
        self.kept -= 1;
        self.free.push(block);
        true
    }

    /// A block for one user.
    fn take(&mut self) -> Option<u32> {
        if self.free.is_empty() && !self.evict() {
            return None;
        }
        let block = self.free.pop()?;
        let place = &mut self.blocks[block as usize];
        if let (None, Some(kv_type)) = (&place, self.kv_type) {
            *place = Some(Block::new(&self.shape, kv_type));
        }
        self.users[block as usize] = 1;
        Some(block)
    }

    /// Makes room for `tokens` tokens. False, changing nothing, when there are too few blocks.
    #[must_use]
    pub(crate) fn reserve(&mut self, table: &mut BlockTable, tokens: usize) -> bool {
        let missing = blocks_for(tokens).saturating_sub(table.blocks.len());
        if missing > self.available_blocks() {
            return false;
        }
        for _ in 0..missing {
            let Some(block) = self.take() else { return false };
            table.blocks.push(block);
        }
        true
    }

    /// Tokens at the beginning of `tokens` that need not be computed, the last one always excepted: its
    /// logits are wanted.
    pub(crate) fn known_prefix(&self, scope: u64, tokens: &[u32]) -> usize {
        let useful = tokens.len().saturating_sub(1);
        self.prefixes.longest(scope, &tokens[..useful]).tokens()
    }

    /// Blocks that must be had to hold `tokens` tokens that begin with these: those of their known beginning that somebody uses
    /// already cost nothing.
    pub(crate) fn blocks_wanted(&self, scope: u64, beginning: &[u32], tokens: usize) -> usize {
        let useful = beginning.len().saturating_sub(1);
        let found = self.prefixes.longest(scope, &beginning[..useful]);
        let in_use = found
            .blocks
            .iter()
            .filter(|&&block| self.users[block as usize] > 0);
        blocks_for(tokens + 1).saturating_sub(in_use.count())
    }

    /// Gives an empty table the blocks of the longest known beginning of `tokens`, and says how many tokens
    /// need not be computed.
    pub(crate) fn attach(&mut self, table: &mut BlockTable, tokens: &[u32]) -> usize {
        debug_assert!(table.blocks.is_empty());
        let useful = tokens.len().saturating_sub(1);
        let found = self.prefixes.longest(table.scope, &tokens[..useful]);
        for &block in &found.blocks {
            let users = &mut self.users[block as usize];
            self.kept -= usize::from(*users == 0);
            *users += 1;
            table.blocks.push(block);
        }
        self.prefixes.touch(&found.blocks);
        table.published = found.blocks.len() * BLOCK_TOKENS;
        let Some((source, same)) = found.partial else {
            return table.published;
        };
        // Copied before another is asked for: taking a block may be what forgets the source.
        let Some(numbers) = self.blocks[source as usize].clone() else {
            return table.published;
        };
        let Some(copy) = self.take() else {
            return table.published;
        };
        self.blocks[copy as usize] = Some(numbers);
        table.blocks.push(copy);
        table.published + same
    }

    /// Says which tokens a sequence's blocks hold, from its first one on, so that others may use them.
    pub(crate) fn publish(&mut self, table: &mut BlockTable, tokens: &[u32]) {
        while table.published < tokens.len() {
            let index = table.published / BLOCK_TOKENS;
            let start = index * BLOCK_TOKENS;
            let end = tokens.len().min(start + BLOCK_TOKENS);
            let Some(&block) = table.blocks.get(index) else {
                return;
            };
            let before = index.checked_sub(1).map(|index| table.blocks[index]);
            let twin = self
                .prefixes
                .insert(table.scope, before, block, &tokens[start..end]);
            if let Some(twin) = twin {
                // The same numbers to the bit: the kernels do not depend on who computes beside whom.
                let users = &mut self.users[twin as usize];
                self.kept -= usize::from(*users == 0);
                *users += 1;
                table.blocks[index] = twin;
                self.prefixes.remove(block);
                self.users[block as usize] = 0;
                self.free.push(block);
            }
            table.published = end;
        }
    }

    /// Takes the blocks of a sequence back. Those whose tokens are known stay, as long as there is room.
    pub(crate) fn release(&mut self, table: &mut BlockTable) {
        for block in table.blocks.drain(..).rev() {
            let users = &mut self.users[block as usize];
            *users -= 1;
            if *users > 0 {
                continue;
            }
            if self.prefixes.contains(block) {
                self.kept += 1;
            } else {
                self.free.push(block);
            }
        }
        table.published = 0;
        while self.kept > self.keep_blocks && self.evict() {}
    }

    /// Gives the memory of blocks that hold nothing back to the machine.
    pub(crate) fn trim(&mut self) {
        for &block in &self.free {
            self.blocks[block as usize] = None;
        }
    }

    /// Writes keys and values, `[rows, kv_heads, head_dim]` each, of tokens at these places, those of a sequence one after
    /// the other, positions rising by one. No two rows are for one place, and no block that others use is written. `prepare`
    /// is given the number of each row and its key before that is written.
    ///
    /// # Panics
    /// When there are fewer numbers than the rows have.
    pub(crate) fn write<'a>(
        &mut self,
        pool: &Pool,
        layer: usize,
        places: impl Iterator<Item = (&'a BlockTable, usize)>,
        (keys, values): (&mut [f32], &[f32]),
        prepare: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let shape = self.shape;
        let mut lent = Lent {
            blocks: &mut self.blocks,
            parts: Vec::new(),
        };
        for (row, (table, position)) in places.enumerate() {
            let (block, token) = (table.blocks[position / BLOCK_TOKENS], position % BLOCK_TOKENS);
            debug_assert_eq!(self.users[block as usize], 1, "a shared block is never written");
            lent.add(row, block, token);
        }
        let width = shape.kv_heads * shape.head_dim;
        let mut behind = keys;
        for part in &mut lent.parts {
            (part.keys, behind) = behind.split_at_mut(part.rows.len() * width);
        }
        pool.for_each_chunk(&mut lent.parts, 1, |_, parts| {
            for part in parts {
                let Some(block) = &mut part.block else {
                    unreachable!("two runs of one step are written to one block")
                };
                for (index, (row, key)) in part
                    .rows
                    .clone()
                    .zip(part.keys.chunks_exact_mut(width))
                    .enumerate()
                {
                    let token = part.first_token + index;
                    prepare(row, key);
                    block.write(&shape, layer, Side::Keys, token, key);
                    block.write(
                        &shape,
                        layer,
                        Side::Values,
                        token,
                        &values[row * width..(row + 1) * width],
                    );
                }
            }
        });
    }
}

/// Blocks taken out of the cache, so that each thread writes to some of its own. They go back at the end, whatever happens.
struct Lent<'a> {
    blocks: &'a mut [Option<Block>],
    parts: Vec<Part<'a>>,
}

/// What a step writes to one block.
struct Part<'a> {
    number: u32,
    block: Option<Block>,
    /// The first row's place in it; the others follow.
    first_token: usize,
    rows: Range<usize>,
    /// The rows' keys.
    keys: &'a mut [f32],
}

impl Lent<'_> {
    /// One row more, which is written to a token of a block.
    fn add(&mut self, row: usize, number: u32, token: usize) {
        match self.parts.last_mut() {
            Some(part) if part.number == number => {
                debug_assert_eq!(token, part.first_token + part.rows.len());
                part.rows.end += 1;
            }
            _ => self.parts.push(Part {
                number,
                block: self.blocks[number as usize].take(),
                first_token: token,
                rows: row..row + 1,
                keys: &mut [],
            }),
        }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        for part in self.parts.drain(..).filter(|part| part.block.is_some()) {
            self.blocks[part.number as usize] = part.block;
        }
    }
}

/// The cache of one layer, for the sequences of a step.
pub(crate) struct LayerCache<'a> {
    pub(crate) cache: &'a KvCache,
    pub(crate) tables: &'a [&'a BlockTable],
    pub(crate) layer: usize,
}

impl Cache for LayerCache<'_> {
    fn block(&self, sequence: usize, block: usize, kv_head: usize) -> (Numbers<'_>, Numbers<'_>) {
        let shape = &self.cache.shape;
        match &self.cache.blocks[self.tables[sequence].blocks[block] as usize] {
            Some(block) => (
                block.numbers(shape, self.layer, Side::Keys, kv_head),
                block.numbers(shape, self.layer, Side::Values, kv_head),
            ),
            // Blocks in a table have memory.
            None => (Numbers::F32(&[]), Numbers::F32(&[])),
        }
    }
}

#[cfg(test)]
mod tests;
