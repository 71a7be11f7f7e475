//! The KV cache: fixed blocks of tokens, handed out and taken back.
//!
//! A sequence holds a table of blocks and not one buffer, so a batch may hold sequences of any lengths,
//! memory is taken as answers grow, and what one frees another uses. A block is allocated when it is
//! first needed and kept for the next user. How numbers lie in a block is the attention kernel's choice:
//! keys transposed, `[head_dim, tokens]`, values `[tokens, padded head_dim]`.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::inspect::KvType;
use crate::kernels::attention::{BLOCK_TOKENS, Cache, Numbers, padded};

/// Shape of the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvShape {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl KvShape {
    /// Numbers of one head in one block, keys or values.
    fn head_numbers(&self) -> usize {
        BLOCK_TOKENS * padded(self.head_dim)
    }

    /// Numbers in a block: `[layers, keys and values, kv_heads, numbers of a head]`.
    fn block_numbers(&self) -> usize {
        self.layers * 2 * self.kv_heads * self.head_numbers()
    }
}

enum Block {
    F16(Box<[f16]>),
    F32(Box<[f32]>),
}

/// The blocks of all sequences.
pub(crate) struct KvCache {
    shape: KvShape,
    kv_type: KvType,
    blocks: Vec<Option<Block>>,
    free: Vec<u32>,
}

/// The blocks of one sequence, in order.
#[derive(Debug, Default)]
pub(crate) struct BlockTable {
    blocks: Vec<u32>,
}

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Keys = 0,
    Values = 1,
}

/// Blocks that hold this many tokens.
pub(crate) fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

impl KvCache {
    pub(crate) fn new(shape: KvShape, kv_type: KvType, capacity_blocks: usize) -> Self {
        let blocks = (0..capacity_blocks).map(|_| None).collect();
        // Low numbers first, so that the blocks that are allocated are used again first.
        let free = (0..capacity_blocks as u32).rev().collect();
        Self {
            shape,
            kv_type,
            blocks,
            free,
        }
    }

    pub(crate) fn free_blocks(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn capacity_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Makes room for `tokens` tokens. False, changing nothing, when there are too few free blocks.
    #[must_use]
    pub(crate) fn reserve(&mut self, table: &mut BlockTable, tokens: usize) -> bool {
        let missing = blocks_for(tokens).saturating_sub(table.blocks.len());
        if missing > self.free.len() {
            return false;
        }
        for _ in 0..missing {
            let Some(block) = self.free.pop() else {
                return false;
            };
            let numbers = self.shape.block_numbers();
            let place = &mut self.blocks[block as usize];
            if place.is_none() {
                *place = Some(match self.kv_type {
                    KvType::F16 => Block::F16(vec![f16::ZERO; numbers].into_boxed_slice()),
                    KvType::F32 => Block::F32(vec![0.0; numbers].into_boxed_slice()),
                });
            }
            table.blocks.push(block);
        }
        true
    }

    /// Takes the blocks of a sequence back.
    pub(crate) fn release(&mut self, table: &mut BlockTable) {
        self.free.extend(table.blocks.drain(..).rev());
    }

    fn head_start(&self, layer: usize, side: Side, head: usize) -> usize {
        ((layer * 2 + side as usize) * self.shape.kv_heads + head) * self.shape.head_numbers()
    }

    /// Writes one token's key or value, `[kv_heads, head_dim]`.
    pub(crate) fn write(
        &mut self,
        table: &BlockTable,
        layer: usize,
        side: Side,
        position: usize,
        row: &[f32],
    ) {
        let dim = self.shape.head_dim;
        let block = table.blocks[position / BLOCK_TOKENS] as usize;
        let token = position % BLOCK_TOKENS;
        for (head, numbers) in row.chunks_exact(dim).enumerate() {
            let start = self.head_start(layer, side, head);
            match (&mut self.blocks[block], side) {
                (Some(Block::F16(data)), Side::Keys) => {
                    let places = data[start + token..].iter_mut().step_by(BLOCK_TOKENS);
                    for (place, x) in places.zip(numbers) {
                        *place = f16::from_f32(*x);
                    }
                }
                (Some(Block::F32(data)), Side::Keys) => {
                    let places = data[start + token..].iter_mut().step_by(BLOCK_TOKENS);
                    for (place, x) in places.zip(numbers) {
                        *place = *x;
                    }
                }
                (Some(Block::F16(data)), Side::Values) => {
                    let start = start + token * padded(dim);
                    data[start..start + dim].convert_from_f32_slice(numbers);
                }
                (Some(Block::F32(data)), Side::Values) => {
                    let start = start + token * padded(dim);
                    data[start..start + dim].copy_from_slice(numbers);
                }
                (None, _) => {}
            }
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
        let cache = self.cache;
        let numbers = cache.shape.head_numbers();
        let [keys, values] = [Side::Keys, Side::Values].map(|side| {
            let start = cache.head_start(self.layer, side, kv_head);
            start..start + numbers
        });
        match &cache.blocks[self.tables[sequence].blocks[block] as usize] {
            Some(Block::F16(data)) => (Numbers::F16(&data[keys]), Numbers::F16(&data[values])),
            Some(Block::F32(data)) => (Numbers::F32(&data[keys]), Numbers::F32(&data[values])),
            // Blocks in a table have been reserved, and so allocated.
            None => (Numbers::F32(&[]), Numbers::F32(&[])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape {
        layers: 2,
        kv_heads: 2,
        head_dim: 4,
    };

    #[test]
    fn what_is_written_is_read_at_its_place() {
        for kv_type in [KvType::F16, KvType::F32] {
            let mut cache = KvCache::new(SHAPE, kv_type, 4);
            let mut table = BlockTable::default();
            assert!(cache.reserve(&mut table, 40));
            for position in 0..40 {
                let row: Vec<f32> = (0..8).map(|i| (position * 8 + i) as f32).collect();
                cache.write(&table, 1, Side::Values, position, &row);
                cache.write(&table, 1, Side::Keys, position, &row);
            }
            let numbers = |layer: usize, block: usize, head: usize| {
                let tables = [&table];
                let layer = LayerCache {
                    cache: &cache,
                    tables: &tables,
                    layer,
                };
                let (keys, values) = layer.block(0, block, head);
                [keys, values].map(|numbers| match numbers {
                    Numbers::F16(x) => x.iter().map(|x| x.to_f32()).collect::<Vec<_>>(),
                    Numbers::F32(x) => x.to_vec(),
                })
            };
            let [keys, values] = numbers(1, 1, 1);
            assert_eq!(values[..4], [260.0, 261.0, 262.0, 263.0]);
            assert_eq!(values[padded(4)..][..4], [268.0, 269.0, 270.0, 271.0]);
            assert_eq!(keys[..2], [260.0, 268.0]);
            assert_eq!(keys[BLOCK_TOKENS..][..2], [261.0, 269.0]);
            assert_eq!(numbers(0, 1, 1)[1][..4], [0.0; 4]);
        }
    }

    #[test]
    fn a_full_cache_gives_nothing_and_gets_everything_back() {
        let mut cache = KvCache::new(SHAPE, KvType::F16, 3);
        let (mut a, mut b) = (BlockTable::default(), BlockTable::default());
        assert!(cache.reserve(&mut a, 64));
        assert!(!cache.reserve(&mut b, 33));
        assert_eq!(cache.free_blocks(), 1);
        cache.release(&mut a);
        assert_eq!(cache.free_blocks(), 3);
        assert!(cache.reserve(&mut b, 96));
    }
}
