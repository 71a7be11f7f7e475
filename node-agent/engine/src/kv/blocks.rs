//! The numbers of a block: `[layers, keys and values, kv_heads, numbers of a head]`.
//!
//! How numbers lie in a head is the attention kernel's choice: keys transposed, `[head_dim, tokens]`, values
//! `[tokens, padded head_dim]`. In 8 bits each token's key and value of a head has a scale for every
//! [`SCALE_DIMS`] dimensions, as in llama.cpp's q8_0.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::inspect::KvType;
use crate::kernels::attention::{BLOCK_TOKENS, Numbers, SCALE_DIMS, padded};

/// Numbers of a key that are converted before they are spread.
const SIDE_BY_SIDE: usize = 32;

/// Shape of the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvShape {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Keys = 0,
    Values = 1,
}

impl KvShape {
    /// Numbers of one head in one block, keys or values.
    fn head_numbers(&self) -> usize {
        BLOCK_TOKENS * padded(self.head_dim)
    }

    /// Scales of one head in one block.
    fn head_scales(&self) -> usize {
        BLOCK_TOKENS * self.head_dim.div_ceil(SCALE_DIMS)
    }

    /// Heads of all layers, keys and values.
    fn heads(&self) -> usize {
        self.layers * 2 * self.kv_heads
    }

    fn head(&self, layer: usize, side: Side, head: usize) -> usize {
        (layer * 2 + side as usize) * self.kv_heads + head
    }
}

/// Storage of one block.
#[derive(Clone)]
pub(super) enum Block {
    F16(Box<[f16]>),
    F32(Box<[f32]>),
    Q8 {
        numbers: Box<[i8]>,
        /// `[heads, groups of dimensions, tokens]`.
        scales: Box<[f32]>,
    },
}

fn zeros<T: Copy + Default>(count: usize) -> Box<[T]> {
    vec![T::default(); count].into_boxed_slice()
}

impl Block {
    pub(super) fn new(shape: &KvShape, kv_type: KvType) -> Self {
        let numbers = shape.heads() * shape.head_numbers();
        match kv_type {
            KvType::F16 => Self::F16(zeros(numbers)),
            KvType::F32 => Self::F32(zeros(numbers)),
            KvType::Q8 => Self::Q8 {
                numbers: zeros(numbers),
                scales: zeros(shape.heads() * shape.head_scales()),
            },
        }
    }

    /// Writes one token's key or value, `[kv_heads, head_dim]`.
    pub(super) fn write(&mut self, shape: &KvShape, layer: usize, side: Side, token: usize, row: &[f32]) {
        let dim = shape.head_dim;
        for (head, from) in row.chunks_exact(dim).enumerate() {
            let head = shape.head(layer, side, head);
            let start = head * shape.head_numbers();
            // Keys: a column; values: a row.
            let (start, step) = match side {
                Side::Keys => (start + token, BLOCK_TOKENS),
                Side::Values => (start + token * padded(dim), 1),
            };
            match self {
                Self::F16(data) if side == Side::Values => {
                    data[start..start + dim].convert_from_f32_slice(from);
                }
                Self::F16(data) => {
                    // Converted side by side, then spread.
                    let mut half = [f16::ZERO; SIDE_BY_SIDE];
                    for (group, from) in from.chunks(SIDE_BY_SIDE).enumerate() {
                        let half = &mut half[..from.len()];
                        half.convert_from_f32_slice(from);
                        scatter(data, start + group * SIDE_BY_SIDE * step, step, half, |x| x);
                    }
                }
                Self::F32(data) => scatter(data, start, step, from, |x| x),
                Self::Q8 { numbers, scales } => {
                    let scales = &mut scales[head * shape.head_scales()..];
                    for (group, from) in from.chunks(SCALE_DIMS).enumerate() {
                        let most = from.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                        let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
                        scales[group * BLOCK_TOKENS + token] = most / 127.0;
                        scatter(numbers, start + group * SCALE_DIMS * step, step, from, |x| {
                            (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8
                        });
                    }
                }
            }
        }
    }

    /// Keys or values of a head.
    pub(super) fn numbers(&self, shape: &KvShape, layer: usize, side: Side, head: usize) -> Numbers<'_> {
        let head = shape.head(layer, side, head);
        let range = head * shape.head_numbers()..(head + 1) * shape.head_numbers();
        match self {
            Self::F16(data) => Numbers::F16(&data[range]),
            Self::F32(data) => Numbers::F32(&data[range]),
            Self::Q8 { numbers, scales } => {
                let scales = &scales[head * shape.head_scales()..(head + 1) * shape.head_scales()];
                Numbers::Q8(&numbers[range], scales)
            }
        }
    }
}

fn scatter<T, F: Copy>(to: &mut [T], start: usize, step: usize, from: &[F], convert: impl Fn(F) -> T) {
    let places = to[start..].iter_mut().step_by(step);
    for (place, x) in places.zip(from) {
        *place = convert(*x);
    }
}
