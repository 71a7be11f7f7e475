//! Matrices of weights, repacked so that sixteen rows are multiplied at once.
//!
//! A tile holds 16 rows. Along the columns it goes in blocks of 32: the scales of some blocks, then the numbers of those, so
//! that a tile is read from its beginning to its end. In a block of nibbles, byte `4 * row + j`
//! of group `g` holds columns `8 g + j` (low) and `8 g + 4 + j` (high): a vector of 64 bytes meets four
//! columns of the activations. Numbers of 2 and 3 bits lie four in a byte in the same manner. Bits above
//! the second or fourth follow, of four or eight quads in a byte. So a tile is about as large as the file's rows.

use std::sync::OnceLock;

use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

use super::Compute;
use super::lines::LINE;
use super::memory::{Memory, Piece};
use super::pool::{SharedMut, share_start};
use super::rows::{BLOCK, Corrections};
use super::simd::LANES;
use super::unpack::{Unpacked, unpack};

/// Bytes of a file that are repacked before its pages are let go: between them, the file takes no more room
/// beside what was made of it.
const PACKED_AT_ONCE: usize = 8 << 20;

/// How far ahead weights are asked for at least: enough to bridge the time of memory. It is an eighth of what a thread
/// reads of the matrix, so that what is asked for beyond a thread's own end stays little, and at most what
/// [`super::Dispatch::reach`] says.
const LEAST_REACH: usize = 8 << 10;

/// How a matrix lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Q4_0.
    Nibbles,
    /// Q4_1.
    NibblesMinimum,
    /// Q4_K.
    NibblesFactors,
    /// Q5_0.
    Fives,
    /// Q5_1.
    FivesMinimum,
    /// Q5_K.
    FivesFactors,
    /// Q8_0.
    Bytes,
    /// Q6_K.
    SixesHalves,
    /// Q3_K.
    ThreesHalves,
    /// Q2_K.
    TwosHalvesMinimum,
    F16,
    Bf16,
    F32,
}

/// Words that hold the sixteen factors of six bits of a row.
pub(super) const SIX_BIT_WORDS: usize = 3;

/// What a product must know of a quantised format when it is compiled.
pub(super) trait Layout {
    /// Bits of a number in memory: 2, 3, 4, 5, 6 or 8.
    const BITS: usize;
    /// Bits of a number that lie together: 2, 4 or 8.
    const BASE: usize = match Self::BITS {
        2 | 3 => 2,
        8 => 8,
        _ => 4,
    };
    /// Scales of a block.
    const HALVES: usize;
    /// Whether a minimum is added.
    const MINIMUM: bool;
    /// Taken off every number; 0 where there are minimums.
    const OFFSET: u8;
    /// What products ask of quantised rows.
    const CORRECTION: Corrections = Corrections::of(Self::OFFSET, Self::HALVES);
    /// Bits above those: none, 1 or 2.
    const ABOVE: usize = Self::BITS - Self::BASE;
    /// Quads whose bits above lie together.
    const ABOVE_TOGETHER: usize = if Self::ABOVE == 2 { 4 } else { 8 };
    /// Bytes of a block's numbers before the bits above.
    const BASE_BYTES: usize = BLOCK * LANES * Self::BASE / 8;
    /// Bytes of a block's numbers.
    const NUMBER_BYTES: usize = BLOCK * LANES * Self::BITS / 8;
    /// Whether eight blocks share a scale and a minimum in half precision, and each has small factors.
    const FACTORS: bool;
    /// Blocks that share scales.
    const SHARED: usize = if Self::FACTORS { 8 } else { 1 };
    /// Vectors of a block's scales and minimums, or factors: `[scales, minimums] x halves`.
    const SCALE_VECTORS: usize = Self::HALVES * if Self::MINIMUM { 2 } else { 1 };
    /// Whether factors have six bits: scales and minimums of eight blocks, in turn, one after the other
    /// in three words of 32 bits a row.
    const SIX_BITS: bool = Self::FACTORS && Self::HALVES == 1;
    /// Bytes of those, for `SHARED` blocks: with factors, the shared scale and minimum come first.
    const SCALE_BYTES: usize = if Self::SIX_BITS {
        Self::HEAD_BYTES + SIX_BIT_WORDS * 4 * LANES
    } else if Self::FACTORS {
        Self::HEAD_BYTES + Self::SHARED * LANES * Self::SCALE_VECTORS
    } else {
        2 * LANES * Self::SCALE_VECTORS
    };
    /// Bytes of the shared scale and minimum.
    const HEAD_BYTES: usize = 2 * LANES * if Self::MINIMUM { 2 } else { 1 };
    /// Blocks whose scales lie together, before their numbers: those that share scales, or twice as many where their scales end
    /// in the middle of a line.
    const TOGETHER: usize = if Self::SCALE_BYTES.is_multiple_of(LINE) {
        Self::SHARED
    } else {
        2 * Self::SHARED
    };
    /// Bytes of those scales, so that numbers begin with a line.
    const SCALES_BYTES: usize = (Self::TOGETHER / Self::SHARED * Self::SCALE_BYTES).next_multiple_of(LINE);

    /// Where a block's numbers begin in a tile.
    #[inline(always)]
    fn numbers_at(block: usize) -> usize {
        (block / Self::TOGETHER + 1) * Self::SCALES_BYTES + block * Self::NUMBER_BYTES
    }

    /// Where the scales of a block, the first of those that share them, begin in a tile.
    #[inline(always)]
    fn scales_at(block: usize) -> usize {
        let (part, index) = (block / Self::TOGETHER, block % Self::TOGETHER);
        part * (Self::SCALES_BYTES + Self::TOGETHER * Self::NUMBER_BYTES)
            + index / Self::SHARED * Self::SCALE_BYTES
    }

    /// Bytes of so many blocks.
    fn tile_bytes(blocks: usize) -> usize {
        blocks.div_ceil(Self::TOGETHER) * Self::SCALES_BYTES + blocks * Self::NUMBER_BYTES
    }
}

macro_rules! layout {
    ($name:ident, $bits:literal, $halves:literal, $minimum:literal, $offset:literal, $factors:literal) => {
        pub(super) struct $name;
        impl Layout for $name {
            const BITS: usize = $bits;
            const HALVES: usize = $halves;
            const MINIMUM: bool = $minimum;
            const OFFSET: u8 = $offset;
            const FACTORS: bool = $factors;
        }
    };
}
layout!(Nibbles, 4, 1, false, 8, false);
layout!(NibblesMinimum, 4, 1, true, 0, false);
layout!(NibblesFactors, 4, 1, true, 0, true);
layout!(Fives, 5, 1, false, 16, false);
layout!(FivesMinimum, 5, 1, true, 0, false);
layout!(FivesFactors, 5, 1, true, 0, true);
layout!(Bytes, 8, 1, false, 128, false);
layout!(SixesHalves, 6, 2, false, 32, true);
layout!(ThreesHalves, 3, 2, false, 4, true);
layout!(TwosHalvesMinimum, 2, 2, true, 0, true);

/// Runs `$body` with `$layout` standing for the type of a quantised format; floats give `$otherwise`.
macro_rules! with_layout {
    ($format:expr, $layout:ident => $body:expr, _ => $otherwise:expr) => {{
        use $crate::kernels::weights as w;
        match $format {
            w::Format::Nibbles => with_layout!(@ w::Nibbles, $layout, $body),
            w::Format::NibblesMinimum => with_layout!(@ w::NibblesMinimum, $layout, $body),
            w::Format::NibblesFactors => with_layout!(@ w::NibblesFactors, $layout, $body),
            w::Format::Fives => with_layout!(@ w::Fives, $layout, $body),
            w::Format::FivesMinimum => with_layout!(@ w::FivesMinimum, $layout, $body),
            w::Format::FivesFactors => with_layout!(@ w::FivesFactors, $layout, $body),
            w::Format::Bytes => with_layout!(@ w::Bytes, $layout, $body),
            w::Format::SixesHalves => with_layout!(@ w::SixesHalves, $layout, $body),
            w::Format::ThreesHalves => with_layout!(@ w::ThreesHalves, $layout, $body),
            w::Format::TwosHalvesMinimum => with_layout!(@ w::TwosHalvesMinimum, $layout, $body),
            w::Format::F16 | w::Format::Bf16 | w::Format::F32 => $otherwise,
        }
    }};
    (@ $type:ty, $layout:ident, $body:expr) => {{
        type $layout = $type;
        $body
    }};
}
pub(super) use with_layout;

/// How exactly to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum WeightPrecision {
    /// As the file has it; activations are rounded to 8 bits before they meet quantised weights.
    #[default]
    Native,
    /// Everything as 32-bit floats: eight times the memory, slow, for checking.
    Float,
}

/// A matrix `[rows, columns]`, which rows of activations are multiplied with.
pub(crate) struct Matrix {
    rows: usize,
    columns: usize,
    format: Format,
    tile_bytes: usize,
    /// Bytes.
    ahead: usize,
    /// Whether a single row's products ask for nothing ahead.
    is_read_ahead: bool,
    data: Piece,
    next: OnceLock<Reading>,
}

/// The weights of one product, as threads share them.
#[derive(Debug)]
pub(super) struct Reading {
    /// One at least.
    matrices: Vec<Tiles>,
    /// Whether a tile of each of two is read in turn; otherwise one matrix is read after the other.
    in_turn: bool,
}

/// Tiles of a matrix: where they lie, the bytes of each, and how many there are.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    address: usize,
    bytes: usize,
    count: usize,
}

impl Reading {
    /// Addresses at which a thread begins to read, one or two, where few rows are multiplied: its share of the tiles is what
    /// [`Pool::run`](super::pool::Pool::run) gives it.
    pub(super) fn share(&self, thread: usize, threads: usize) -> [Option<usize>; 2] {
        if let (true, &[first, second]) = (self.in_turn, self.matrices.as_slice()) {
            return [first, second]
                .map(|tiles| Some(tiles.address + share_start(tiles.count, thread, threads) * tiles.bytes));
        }
        let all: usize = self.matrices.iter().map(|tiles| tiles.count).sum();
        let mut tile = share_start(all, thread, threads);
        for tiles in &self.matrices {
            if tile < tiles.count {
                return [Some(tiles.address + tile * tiles.bytes), None];
            }
            tile -= tiles.count;
        }
        [None; 2]
    }

    /// Bytes of all.
    pub(super) fn bytes(&self) -> usize {
        self.matrices.iter().map(|tiles| tiles.count * tiles.bytes).sum()
    }
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matrix")
            .field("rows", &self.rows)
            .field("columns", &self.columns)
            .field("format", &self.format)
            .finish_non_exhaustive()
    }
}

impl Format {
    fn of(dtype: GgmlDType, precision: WeightPrecision) -> Self {
        if precision == WeightPrecision::Float {
            return Self::F32;
        }
        match dtype {
            GgmlDType::Q4_0 => Self::Nibbles,
            GgmlDType::Q4_1 => Self::NibblesMinimum,
            GgmlDType::Q4K => Self::NibblesFactors,
            GgmlDType::Q5_0 => Self::Fives,
            GgmlDType::Q5_1 => Self::FivesMinimum,
            GgmlDType::Q5K => Self::FivesFactors,
            GgmlDType::Q8_0 => Self::Bytes,
            GgmlDType::Q6K => Self::SixesHalves,
            GgmlDType::Q3K => Self::ThreesHalves,
            GgmlDType::Q2K => Self::TwosHalvesMinimum,
            GgmlDType::F16 => Self::F16,
            GgmlDType::BF16 => Self::Bf16,
            // Q8_1 and Q8_K are no formats of files: the reader refuses them.
            GgmlDType::F32 | GgmlDType::Q8_1 | GgmlDType::Q8K => Self::F32,
        }
    }

    fn tile_bytes(self, columns: usize) -> usize {
        let blocks = columns.div_ceil(BLOCK);
        let bytes = with_layout!(self, L => L::tile_bytes(blocks), _ => {
            let number = if self == Self::F32 { 4 } else { 2 };
            columns * LANES * number
        });
        bytes.next_multiple_of(LINE)
    }
}

/// What a format takes off its numbers.
fn offset_of(dtype: GgmlDType) -> f32 {
    match dtype {
        GgmlDType::Q4_0 => 8.0,
        GgmlDType::Q5_0 => 16.0,
        GgmlDType::Q8_0 => 128.0,
        GgmlDType::Q6K => 32.0,
        GgmlDType::Q3K => 4.0,
        _ => 0.0,
    }
}

impl Matrix {
    /// Repacks a tensor of a file, into the next piece of `memory`. `read` is told each part of `bytes` that is not
    /// looked at again.
    ///
    /// # Errors
    /// When there is no memory for it.
    ///
    /// # Panics
    /// When `bytes` is not as long as the shape asks for; the reader of the file has checked that.
    pub(crate) fn pack(
        compute: &Compute,
        memory: &Memory,
        dtype: GgmlDType,
        bytes: &[u8],
        shape: [usize; 2],
        precision: WeightPrecision,
        read: impl Fn(&[u8]),
    ) -> std::io::Result<Self> {
        let [rows, columns] = shape;
        assert!(columns % dtype.block_size() == 0);
        let row_bytes = columns / dtype.block_size() * dtype.type_size();
        assert_eq!(bytes.len(), rows * row_bytes);
        let format = Format::of(dtype, precision);
        let tile_bytes = format.tile_bytes(columns);
        let tiles = rows.div_ceil(LANES);
        let mut data = memory.take(tiles * tile_bytes)?;
        let to = SharedMut::new(&mut data);
        let at_once = (PACKED_AT_ONCE / (LANES * row_bytes).max(1)).max(1);
        for first in (0..tiles).step_by(at_once) {
            let count = at_once.min(tiles - first);
            compute.pool.run(count, 1, &|tile| {
                let tile = first + tile;
                // SAFETY: tiles are disjoint, each number is handed out once, and the mapping has room for all.
                let tile_data = unsafe { to.slice(tile * tile_bytes..(tile + 1) * tile_bytes) };
                let end = rows.min((tile + 1) * LANES);
                for (lane, row) in (tile * LANES..end).enumerate() {
                    let row = &bytes[row * row_bytes..(row + 1) * row_bytes];
                    pack_row(format, dtype, row, lane, tile_data);
                }
            });
            let rows = (first * LANES)..rows.min((first + count) * LANES);
            read(&bytes[rows.start * row_bytes..rows.end * row_bytes]);
        }
        let share = data.len() / compute.pool.threads();
        Ok(Self {
            rows,
            columns,
            format,
            tile_bytes,
            // Measured on Zen 4: with factors (Q4_K) that is a tenth slower.
            is_read_ahead: compute.dispatch.reads_ahead()
                && with_layout!(format, L => !L::FACTORS, _ => false),
            ahead: (share / 8).clamp(LEAST_REACH, compute.dispatch.reach()),
            data,
            next: OnceLock::new(),
        })
    }

    /// Says what is multiplied next after a product with this matrix, for which it stands as the last: threads without work ask
    /// memory for it.
    ///
    /// # Panics
    /// When it was said before.
    pub(crate) fn is_followed_by(&self, matrices: &[&Self], in_turn: bool) {
        let tiles = |matrix: &&Self| Tiles {
            address: matrix.data.as_ptr().addr(),
            bytes: matrix.tile_bytes,
            count: matrix.tiles(),
        };
        let matrices = matrices.iter().map(tiles).collect();
        let first = self.next.set(Reading { matrices, in_turn });
        assert!(first.is_ok(), "a matrix is followed by two products");
    }

    pub(super) fn next(&self) -> Option<&Reading> {
        self.next.get()
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// What products with it ask of quantised rows.
    pub(super) fn correction(&self) -> Corrections {
        with_layout!(self.format, L => L::CORRECTION, _ => Corrections::default())
    }

    /// Whether it is multiplied with quantised rows.
    pub(crate) fn is_quantized(&self) -> bool {
        !matches!(self.format, Format::F16 | Format::Bf16 | Format::F32)
    }

    /// Bytes from what is multiplied to what memory is asked for meanwhile.
    pub(super) fn ahead(&self) -> usize {
        self.ahead
    }

    /// Whether the processor by itself reads fast enough ahead of a single row's products.
    pub(super) fn is_read_ahead(&self) -> bool {
        self.is_read_ahead
    }

    pub(super) fn tiles(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    pub(super) fn tile(&self, index: usize) -> &[u8] {
        &self.data[index * self.tile_bytes..(index + 1) * self.tile_bytes]
    }

    /// One row as floats, `[columns]`.
    ///
    /// # Panics
    /// When there is no such row, or `out` has another length.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.columns);
        let (tile, lane) = (self.tile(row / LANES), row % LANES);
        with_layout!(self.format, L => read_row::<L>(tile, lane, out), _ => {
            for (column, out) in out.iter_mut().enumerate() {
                let index = column * LANES + lane;
                *out = match self.format {
                    Format::F16 => f16::from_bits(half_at(tile, index)).to_f32(),
                    Format::Bf16 => bf16::from_bits(half_at(tile, index)).to_f32(),
                    _ => f32::from_le_bytes(std::array::from_fn(|i| tile[4 * index + i])),
                };
            }
        });
    }
}

fn half_at(bytes: &[u8], index: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]])
}

fn pack_row(format: Format, dtype: GgmlDType, row: &[u8], lane: usize, tile: &mut [u8]) {
    with_layout!(format, L => {
        let mut block = 0;
        for bytes in row.chunks_exact(dtype.type_size()) {
            unpack(dtype, bytes, |unpacked| {
                write_block::<L>(tile, block, lane, &unpacked);
                block += 1;
            });
        }
    }, _ => match (format, dtype) {
        (Format::F16 | Format::Bf16, _) => {
            for (column, bytes) in row.chunks_exact(2).enumerate() {
                tile[2 * (column * LANES + lane)..][..2].copy_from_slice(bytes);
            }
        }
        (_, dtype) => {
            let mut put = |column: usize, x: f32| {
                tile[4 * (column * LANES + lane)..][..4].copy_from_slice(&x.to_le_bytes());
            };
            match dtype {
                GgmlDType::F32 => row.chunks_exact(4).enumerate().for_each(|(i, bytes)| {
                    put(i, f32::from_le_bytes(std::array::from_fn(|j| bytes[j])));
                }),
                GgmlDType::F16 => row.chunks_exact(2).enumerate().for_each(|(i, bytes)| {
                    put(i, f16::from_le_bytes([bytes[0], bytes[1]]).to_f32());
                }),
                GgmlDType::BF16 => row.chunks_exact(2).enumerate().for_each(|(i, bytes)| {
                    put(i, bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32());
                }),
                quantized => {
                    let (mut column, offset) = (0, offset_of(quantized));
                    for bytes in row.chunks_exact(quantized.type_size()) {
                        unpack(quantized, bytes, |block| {
                            for (i, &q) in block.numbers.iter().enumerate() {
                                let half = i / (BLOCK / 2);
                                let x = block.scale_of(half) * (f32::from(q) - offset);
                                put(column, x + block.minimum_of(half));
                                column += 1;
                            }
                        });
                    }
                }
            }
        }
    });
}

/// Word and bit where factor `index` of six bits begins; it may reach into the next word.
pub(super) const fn six_bits_at(index: usize) -> (usize, u32) {
    (index * 6 / 32, (index * 6 % 32) as u32)
}

/// Puts 32 weights of one row into their places.
fn write_block<L: Layout>(tile: &mut [u8], block: usize, lane: usize, from: &Unpacked) {
    let numbers = &mut tile[L::numbers_at(block)..][..L::NUMBER_BYTES];
    // Four numbers at a time: loading a model is this function, some million times.
    let quads: [u32; BLOCK / 4] =
        std::array::from_fn(|quad| u32::from_le_bytes(std::array::from_fn(|j| from.numbers[4 * quad + j])));
    let (base, above) = numbers.split_at_mut(L::BASE_BYTES);
    let put = |to: &mut [u8], together: usize, width: usize, first: usize| {
        let bits = (0xff_u32 >> (8 - width)) * 0x0101_0101;
        for (place, quads) in to.chunks_exact_mut(64).zip(quads.chunks_exact(together)) {
            let quads = quads.iter().enumerate();
            let word = quads.fold(0, |word, (i, quad)| word | (quad >> first & bits) << (i * width));
            place[lane * 4..][..4].copy_from_slice(&word.to_le_bytes());
        }
    };
    put(base, 8 / L::BASE, L::BASE, 0);
    if L::ABOVE > 0 {
        put(above, L::ABOVE_TOGETHER, L::ABOVE, L::BASE);
    }
    let scales = &mut tile[L::scales_at(block / L::SHARED * L::SHARED)..][..L::SCALE_BYTES];
    let mut half_precision = |index: usize, x: f16| {
        scales[2 * (index * LANES + lane)..][..2].copy_from_slice(&x.to_le_bytes());
    };
    half_precision(0, from.scale);
    if L::MINIMUM {
        half_precision(1, from.minimum);
    }
    if L::SIX_BITS {
        let factors = [from.factors[0], from.minimum_factors[0]];
        for (i, factor) in factors.into_iter().enumerate() {
            let (word, shift) = six_bits_at(2 * (block % L::SHARED) + i);
            let wide = u64::from(factor.cast_unsigned() & 63) << shift;
            for (word, part) in [(word, wide as u32), (word + 1, (wide >> 32) as u32)] {
                if part != 0 {
                    let place = &mut scales[L::HEAD_BYTES + 4 * (word * LANES + lane)..][..4];
                    let old = u32::from_le_bytes([place[0], place[1], place[2], place[3]]);
                    place.copy_from_slice(&(old | part).to_le_bytes());
                }
            }
        }
    } else if L::FACTORS {
        let start = L::HEAD_BYTES + block % L::SHARED * LANES * L::SCALE_VECTORS;
        for half in 0..L::HALVES {
            scales[start + half * LANES + lane] = from.factors[half].cast_unsigned();
            if L::MINIMUM {
                scales[start + (L::HALVES + half) * LANES + lane] =
                    from.minimum_factors[half].cast_unsigned();
            }
        }
    }
}

fn read_row<L: Layout>(tile: &[u8], lane: usize, out: &mut [f32]) {
    for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
        let numbers = &tile[L::numbers_at(block)..][..L::NUMBER_BYTES];
        let scales = &tile[L::scales_at(block / L::SHARED * L::SHARED)..][..L::SCALE_BYTES];
        let shared = |index: usize| f16::from_bits(half_at(scales, index * LANES + lane)).to_f32();
        let factor = |index: usize| {
            if L::SIX_BITS {
                let word_at = |word: usize| {
                    let at = L::HEAD_BYTES + 4 * (word * LANES + lane);
                    u64::from(u32::from_le_bytes(std::array::from_fn(|i| scales[at + i])))
                };
                let (word, shift) = six_bits_at(2 * (block % L::SHARED) + index);
                let next = if shift > 26 { word_at(word + 1) } else { 0 };
                return ((word_at(word) | next << 32) >> shift & 63) as f32;
            }
            let start = L::HEAD_BYTES + block % L::SHARED * LANES * L::SCALE_VECTORS;
            if L::FACTORS {
                f32::from(scales[start + index * LANES + lane].cast_signed())
            } else {
                1.0
            }
        };
        for (column, out) in out.iter_mut().enumerate() {
            let (quad, j) = (column / 4, column % 4);
            let together = 8 / L::BASE;
            let byte = numbers[quad / together * 64 + lane * 4 + j];
            let mut number = byte >> (quad % together * L::BASE) & (0xff >> (8 - L::BASE));
            if L::ABOVE > 0 {
                let (vector, which) = (quad / L::ABOVE_TOGETHER, quad % L::ABOVE_TOGETHER);
                let above = numbers[L::BASE_BYTES + vector * 64 + lane * 4 + j];
                number |= (above >> (which * L::ABOVE) & (0xff >> (8 - L::ABOVE))) << L::BASE;
            }
            let half = column * L::HALVES / BLOCK;
            *out = shared(0) * factor(half) * (f32::from(number) - f32::from(L::OFFSET));
            if L::MINIMUM {
                *out += shared(1) * factor(L::HALVES + half);
            }
        }
    }
}
