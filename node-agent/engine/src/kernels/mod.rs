//! The compute kernels: where the engine's time goes, and where its unsafe code is (the mapping of files, in
//! `mmap.rs`, is all that there is elsewhere).
//!
//! ```text
//! weights.rs   GGUF blocks repacked into tiles of 16 rows (unpack.rs knows the formats)
//! memory.rs    where they lie
//! rows.rs      activations as 8-bit integers with scales; split.rs: in two parts
//! product.rs   tiles x rows, ragged batches of any height   ┐
//! tile.rs      one tile x some rows: the innermost loops    │
//! floats.rs    the same for weights that are not quantised  │
//! panel.rs     a few blocks, taken apart for many rows      │
//! attention.rs softmax(q k) v over the paged cache          ├─ written once over simd.rs
//! block.rs     one block of the cache x some queries        │
//! encode.rs    what an encoder needs beside products        │
//! vector.rs    norms, gates, additions                      ┘
//! simd.rs      the 16 lanes, in plain Rust; x86.rs: AVX-512 VNNI, AVX-VNNI, AVX2; arm.rs: NEON
//! amx.rs       matrix units; bf16.rs: rows of prompts as they take them, and their products; attention/units.rs
//! lines.rs     floats that begin with a line of the cache
//! pool.rs      the threads; cores.rs: how many
//! ```
//! Three things make the unsafe code sound, and each is checked where a buffer comes in: lengths are
//! asserted before pointers are made; threads write to disjoint places ([`pool::SharedMut`]); and a
//! backend's value exists only on a processor that has its instructions ([`Dispatch`]).
//!
//! Every row is computed alike, whatever else is in its batch: the same operations in the same order. A
//! row in a batch equals the row alone, bit for bit. (Where there are matrix units rows of prompts are computed by them, and
//! rows of answers are not: a row is of one kind from the beginning.)
#![allow(unsafe_code)]
// Loops over lanes, rows and vectors of registers are unrolled by their constant bounds; several arrays are
// walked by one index.
#![allow(clippy::needless_range_loop)]

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "aarch64")]
mod arm;
pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod block;
mod cores;
pub(crate) mod encode;
mod floats;
mod lines;
mod memory;
mod panel;
pub(crate) mod pool;
mod product;
mod rows;
mod simd;
mod split;
#[cfg(test)]
mod tests;
mod tile;
mod unpack;
pub(crate) mod vector;
mod weights;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use cores::available_threads;
pub(crate) use memory::Memory;
pub(crate) use pool::Pool;
pub(crate) use product::{Combine, Gate, Rows, Target};
pub(crate) use rows::QuantizedRows;
pub(crate) use split::Rounding;
pub(crate) use weights::{Matrix, WeightPrecision};

use simd::{Portable, Simd};

/// Instructions that a processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// AMX with bfloat16 beside AVX-512: Intel's Xeons since Sapphire Rapids.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX-512 with VNNI: Intel since Ice Lake, AMD since Zen 4.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 with AVX-VNNI: Intel since Alder Lake.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX2, FMA and F16C: nearly everything since 2013.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// NEON with dot products of unsigned and signed bytes (i8mm): ARM since 2020, Apple since M2.
    #[cfg(target_arch = "aarch64")]
    NeonMixedDot,
    /// NEON with dot products (dotprod): ARM since 2018, Apple since M1, Raspberry Pi 5.
    #[cfg(target_arch = "aarch64")]
    NeonDot,
    /// NEON: every 64-bit ARM.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// Whatever the compiler makes of plain Rust.
    Portable,
}

impl Level {
    /// All of this architecture, the best first.
    const ALL: &[Self] = &[
        #[cfg(target_arch = "x86_64")]
        Self::Amx,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "x86_64")]
        Self::AvxVnni,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        #[cfg(target_arch = "aarch64")]
        Self::NeonMixedDot,
        #[cfg(target_arch = "aarch64")]
        Self::NeonDot,
        #[cfg(target_arch = "aarch64")]
        Self::Neon,
        Self::Portable,
    ];

    fn is_here(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512.is_here() && amx::Units::here().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                std::is_x86_feature_detected!("avx512f")
                    && std::is_x86_feature_detected!("avx512bw")
                    && std::is_x86_feature_detected!("avx512vl")
                    && std::is_x86_feature_detected!("avx512dq")
                    && std::is_x86_feature_detected!("avx512vnni")
                    && Self::Avx2.is_here()
            }
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => std::is_x86_feature_detected!("avxvnni") && Self::Avx2.is_here(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                std::is_x86_feature_detected!("avx2")
                    && std::is_x86_feature_detected!("fma")
                    && std::is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "aarch64")]
            Self::NeonMixedDot => std::arch::is_aarch64_feature_detected!("i8mm") && Self::NeonDot.is_here(),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => true,
            Self::Portable => true,
        }
    }
}

/// A level that this processor was found to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dispatch(Level);

/// Something to compute, written once over the lanes.
pub(crate) trait Operation {
    type Output;

    /// Computes it. Implementations are `#[inline(always)]`, so that they are compiled for each backend.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

impl Dispatch {
    /// The levels that this processor has, the best first.
    pub(crate) fn available() -> impl Iterator<Item = Self> {
        Level::ALL
            .iter()
            .copied()
            .filter(|level| level.is_here())
            .map(Self)
    }

    /// The best level that this processor has.
    pub(crate) fn best() -> Self {
        Self::available().next().unwrap_or(Self(Level::Portable))
    }

    /// The level of that name, as [`Self::option`] writes it, if this processor has it.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::available().find(|level| level.option() == name)
    }

    /// Its name as people write it in settings.
    pub(crate) fn option(self) -> String {
        self.name().to_lowercase().replace(' ', "-")
    }

    /// Its name, for logs and reports.
    pub(crate) fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Amx => "AMX",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "AVX-512 VNNI",
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => "AVX-VNNI",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "AVX2",
            #[cfg(target_arch = "aarch64")]
            Level::NeonMixedDot => "NEON i8mm",
            #[cfg(target_arch = "aarch64")]
            Level::NeonDot => "NEON dotprod",
            #[cfg(target_arch = "aarch64")]
            Level::Neon => "NEON",
            Level::Portable => "portable",
        }
    }

    /// How far ahead weights are asked for at most, in bytes. Measured, decoding one sequence: on Zen 4 (where such rows ask only
    /// for formats with factors, and for floats, by now), 64 KiB beside 4 gave a 1B model a tenth, while 128 KiB were worse; on
    /// Zen 3, whose second-level cache is half as large, 8 and 16 KiB read a tenth faster than 34 or 64.
    fn reach(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni | Level::Avx2 => 16 << 10,
            _ => 64 << 10,
        }
    }

    /// Whether a single row is multiplied faster where the processor alone reads ahead. Measured on Zen 4: a core that asks 4 KiB
    /// or more ahead reads 21 GB/s, and of its own accord up to 34 of what lies straight ahead. Two threads decode a small model
    /// of Q4_1, Q4_0 or Q8_0 a seventh to a quarter faster with this and the layout of tiles that it wants (Q5_0, Q5_1 and Zen 5
    /// follow, unmeasured); eight rows lose a tenth and more.
    fn reads_ahead(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Level::Avx512 && x86::is_of_amd();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Runs an operation with this level's instructions.
    #[inline]
    pub(crate) fn run<O: Operation>(self, operation: O) -> O::Output {
        // SAFETY: a `Dispatch` is made only after the processor was asked for the level's features.
        unsafe {
            match self.0 {
                #[cfg(target_arch = "x86_64")]
                Level::Amx | Level::Avx512 => avx512(operation),
                #[cfg(target_arch = "x86_64")]
                Level::AvxVnni => avx_vnni(operation),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => avx2(operation),
                // The instructions are written out, so nothing has to be compiled for them alone.
                #[cfg(target_arch = "aarch64")]
                Level::NeonMixedDot => operation.run(arm::Neon::<{ arm::MIXED_DOT }>::new()),
                #[cfg(target_arch = "aarch64")]
                Level::NeonDot => operation.run(arm::Neon::<{ arm::DOT }>::new()),
                #[cfg(target_arch = "aarch64")]
                Level::Neon => operation.run(arm::Neon::<{ arm::PLAIN }>::new()),
                Level::Portable => operation.run(Portable),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn avx512<O: Operation>(operation: O) -> O::Output {
    // SAFETY: the features of this very function.
    operation.run(unsafe { x86::Avx512::new() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avxvnni,avx2,fma,f16c")]
fn avx_vnni<O: Operation>(operation: O) -> O::Output {
    // SAFETY: the features of this very function.
    operation.run(unsafe { x86::Avx2::<true>::new() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<O: Operation>(operation: O) -> O::Output {
    // SAFETY: the features of this very function.
    operation.run(unsafe { x86::Avx2::<false>::new() })
}

/// Threads, instructions and rounding: what everything is computed with.
#[derive(Clone)]
pub(crate) struct Compute {
    pub(crate) pool: Pool,
    pub(crate) dispatch: Dispatch,
    pub(crate) rounding: Rounding,
}

impl Compute {
    /// Whether rows of prompts are computed by matrix units: what comes out differs from what vectors compute.
    pub(crate) fn units_read_prompts(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.dispatch.units().is_some();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// The same with this rounding.
    pub(crate) fn with_rounding(self, rounding: Rounding) -> Self {
        Self { rounding, ..self }
    }

    /// The same without matrix units.
    pub(crate) fn without_units(self) -> Self {
        #[cfg(target_arch = "x86_64")]
        if self.dispatch.0 == Level::Amx {
            let dispatch = Dispatch(Level::Avx512);
            return Self { dispatch, ..self };
        }
        self
    }

    /// On so many threads.
    ///
    /// # Errors
    /// When the system starts no thread.
    pub(crate) fn new(threads: usize, dispatch: Dispatch) -> std::io::Result<Self> {
        Ok(Self {
            pool: Pool::new(threads)?,
            dispatch,
            rounding: Rounding::Once,
        })
    }
}
