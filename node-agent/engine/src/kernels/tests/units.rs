//! Products of rows of prompts on matrix units. On processors without any there is nothing to compute, and nothing fails; blocks
//! of weights are taken apart wherever AVX-512 is.

use half::bf16;

use super::super::amx::{HalfTile, Units, Work, opened, power_of_two, unpack};
use super::super::rows::BLOCK;
use super::super::simd::LANES;
use super::super::weights::with_layout;
use super::super::x86::Avx512;
use super::*;

/// A compute context with matrix units, on one and on three threads.
fn with_units() -> impl Iterator<Item = Compute> {
    contexts().filter(Compute::units_read_prompts)
}

/// The product of rows of which the last `of_prompts` are of prompts.
fn mixed(
    compute: &Compute,
    matrix: &Matrix,
    x: &[f32],
    of_prompts: usize,
    out: &mut [f32],
    combine: Combine,
) {
    let mut quantized = QuantizedRows::default();
    quantized.set(compute, x, &[matrix], None, of_prompts);
    let rows = Rows {
        floats: x,
        quantized: &quantized,
    };
    compute.product(rows, &mut [Target { matrix, out }], combine);
}

/// Whether numbers are what rounding weights and activations to 8 significant bits may make of a product: a 512th of each factor
/// at most, a 1000th or so as a rule; and errors of terms come together as a walk at random does.
fn rounded_to_bf16(found: &[f32], x: &[f32], w: &[f32], k: usize, what: &str) {
    let of = |x: &[f32], f: fn(f32) -> f32| x.iter().map(|x| f(*x)).collect::<Vec<_>>();
    let expected = reference(x, w, k);
    let magnitudes = reference(&of(x, f32::abs), &of(w, f32::abs), k);
    let squares = reference(&of(x, |x| x * x), &of(w, |w| w * w), k);
    assert_eq!(found.len(), expected.len());
    let mut errors = 0.0;
    for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let error = f64::from(*found) - expected;
        assert!(
            error.abs() <= magnitudes[index] / 250.0 + 1e-6,
            "{what}: number {index} is {found} and should be {expected}"
        );
        errors += error * error;
    }
    let ratio = (errors / squares.iter().sum::<f64>()).sqrt();
    let most = if found.len() < 16 { 0.008 } else { 0.003 };
    assert!(ratio <= most, "{what}: {ratio}");
}

#[test]
fn products_of_prompts_equal_plain_arithmetic_in_every_format_and_shape() {
    let mut rng = StdRng::seed_from_u64(20);
    for compute in with_units() {
        for dtype in QUANTIZED {
            // One panel (256 and 576 columns), panels of sixteen and eight blocks (768), of sixteen (1024), of ten (640), and of
            // ten and nine (608). Tiles that are not full, and one that has no neighbour.
            for (rows, columns) in [
                (1, 256),
                (40, 256),
                (37, 768),
                (64, 1024),
                (33, 576),
                (48, 640),
                (40, 608),
                (16, 32),
            ] {
                if columns % dtype.block_size() != 0 {
                    continue;
                }
                let (bytes, values) = weights(&mut rng, dtype, rows, columns);
                let matrix = pack(&compute, dtype, &bytes, [rows, columns]);
                for (before, count) in [(0, 1), (0, 16), (3, 17), (0, 32), (9, 70), (1, 150)] {
                    let x = numbers(&mut rng, (before + count) * columns);
                    let what = format!("{dtype:?} {rows}x{columns} x {before} and {count}");
                    let mut out = vec![f32::NAN; (before + count) * rows];
                    mixed(&compute, &matrix, &x, count, &mut out, Combine::Store);
                    let mut first = vec![f32::NAN; before * rows];
                    product(
                        &compute,
                        &matrix,
                        &x[..before * columns],
                        &mut first,
                        Combine::Store,
                    );
                    assert!(first == out[..before * rows], "{what}");
                    let x = &x[before * columns..];
                    rounded_to_bf16(&out[before * rows..], x, &values, columns, &what);
                    let once = out[before * rows..].to_vec();
                    let mut sums = once.clone();
                    mixed(&compute, &matrix, x, count, &mut sums, Combine::Add);
                    assert!(
                        sums.iter().zip(&once).all(|(sum, once)| *sum == once + once),
                        "{what}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_prompts_row_equals_the_row_alone_to_the_bit() {
    let mut rng = StdRng::seed_from_u64(21);
    for compute in with_units() {
        for (dtype, columns) in [(GgmlDType::Q4_1, 576), (GgmlDType::Q6K, 768)] {
            let rows = 40;
            let (bytes, _) = weights(&mut rng, dtype, rows, columns);
            let matrix = pack(&compute, dtype, &bytes, [rows, columns]);
            let x = numbers(&mut rng, 170 * columns);
            let mut alone = vec![0.0; 170 * rows];
            for (x, alone) in x.chunks_exact(columns).zip(alone.chunks_exact_mut(rows)) {
                mixed(&compute, &matrix, x, 1, alone, Combine::Store);
            }
            for count in [16, 31, 48, 170] {
                let mut together = vec![0.0; count * rows];
                mixed(
                    &compute,
                    &matrix,
                    &x[..count * columns],
                    count,
                    &mut together,
                    Combine::Store,
                );
                assert!(together == alone[..count * rows], "{dtype:?}, {count} rows");
            }
        }
    }
}

/// Tiles of two matrices side by side, in formats whose blocks differ.
#[test]
fn matrices_that_are_multiplied_together_give_what_each_gives_alone() {
    let mut rng = StdRng::seed_from_u64(24);
    for compute in with_units() {
        let columns = 512;
        let all = [(GgmlDType::Q4K, 40), (GgmlDType::Q6K, 16), (GgmlDType::Q8_0, 33)];
        let matrices = all.map(|(dtype, rows)| {
            let (bytes, _) = weights(&mut rng, dtype, rows, columns);
            pack(&compute, dtype, &bytes, [rows, columns])
        });
        let x = numbers(&mut rng, 50 * columns);
        let mut quantized = QuantizedRows::default();
        quantized.set(&compute, &x, &matrices.each_ref(), None, 45);
        let mut together = matrices
            .each_ref()
            .map(|matrix| vec![f32::NAN; 50 * matrix.rows()]);
        let rows = Rows {
            floats: &x,
            quantized: &quantized,
        };
        let mut targets: Vec<Target<'_>> = matrices
            .iter()
            .zip(&mut together)
            .map(|(matrix, out)| Target { matrix, out })
            .collect();
        compute.product(rows, &mut targets, Combine::Store);
        for (matrix, together) in matrices.iter().zip(&together) {
            let mut alone = vec![f32::NAN; together.len()];
            mixed(&compute, matrix, &x, 45, &mut alone, Combine::Store);
            assert!(alone == *together);
        }
        assert!(!compute.without_units().units_read_prompts());
    }
}

#[test]
fn gates_and_norms_of_prompts_equal_plain_arithmetic() {
    let mut rng = StdRng::seed_from_u64(22);
    for compute in with_units() {
        let (rows, columns, count) = (64, 256, 35);
        let pairs = [GgmlDType::Q4K, GgmlDType::Q6K].map(|dtype| {
            let (bytes, values) = weights(&mut rng, dtype, rows, columns);
            (pack(&compute, dtype, &bytes, [rows, columns]), values)
        });
        let [(gate, gate_values), (up, up_values)] = &pairs;
        let (x, weight) = (numbers(&mut rng, count * columns), numbers(&mut rng, columns));
        let norm = Norm {
            weight: &weight,
            epsilon: 1e-5,
        };
        let mut normed = vec![0.0; x.len()];
        compute.normalize(norm, &x, &mut normed);
        let mut quantized = QuantizedRows::default();
        quantized.set(&compute, &x, &[gate, up], Some(norm), count);
        for kind in [Gate::Silu, Gate::Gelu] {
            let mut next = QuantizedRows::default();
            let from = Rows {
                floats: &x,
                quantized: &quantized,
            };
            compute.gated(from, (gate, kind), up, &mut vec![0.0; count * rows], &mut next);
            let out = next.as_bf16().to_floats();
            assert_eq!(out.len(), count * rows);
            let opened = reference(&normed, gate_values, columns);
            let passing = reference(&normed, up_values, columns);
            let (mut errors, mut squares) = (0.0, 0.0);
            for (index, found) in out.iter().enumerate() {
                let x = opened[index];
                let opened = match kind {
                    Gate::Silu => x / (1.0 + (-x).exp()),
                    Gate::Gelu => {
                        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
                        x / 2.0 * (1.0 + u.tanh())
                    }
                };
                let expected = opened * passing[index];
                errors += (f64::from(*found) - expected).powi(2);
                squares += expected.powi(2);
            }
            assert!(errors <= squares * 2e-5, "{kind:?}: {errors} of {squares}");
        }
    }
}

/// What a gate opens is rows for the next product, of prompts and others, and so it is when room is used again.
#[test]
fn what_a_gate_opens_meets_the_next_product() {
    let mut rng = StdRng::seed_from_u64(27);
    for compute in with_units() {
        // One strip and two, whose rows are cut in parts, and six.
        for inner in [32, 64, 192] {
            let columns = 64;
            let [gate, up, down] = [[inner, columns], [inner, columns], [columns, inner]].map(|shape| {
                let (bytes, _) = weights(&mut rng, GgmlDType::Q4_1, shape[0], shape[1]);
                pack(&compute, GgmlDType::Q4_1, &bytes, shape)
            });
            let mut next = QuantizedRows::default();
            for (others, of_prompts) in [(0, 170), (5, 33), (7, 0), (3, 150), (0, 1)] {
                let count = others + of_prompts;
                let x = numbers(&mut rng, count * columns);
                let gated = |x: &[f32], of_prompts, floats: &mut [f32], next: &mut QuantizedRows| {
                    let mut quantized = QuantizedRows::default();
                    quantized.set(&compute, x, &[&gate, &up], None, of_prompts);
                    let from = Rows {
                        floats: x,
                        quantized: &quantized,
                    };
                    compute.gated(from, (&gate, Gate::Silu), &up, floats, next);
                };
                let mut floats = vec![f32::NAN; count * inner];
                gated(&x, of_prompts, &mut floats, &mut next);
                let (first, last) = floats.split_at(others * inner);
                assert!(first.iter().all(|x| x.is_finite()) && last.iter().all(|x| x.is_nan()));
                next.set_but_prompts(&compute, first, &[&down], None);
                let mut out = vec![f32::NAN; count * columns];
                let rows = Rows {
                    floats: &floats,
                    quantized: &next,
                };
                let target = Target {
                    matrix: &down,
                    out: &mut out,
                };
                compute.product(rows, &mut [target], Combine::Store);

                // Row by row, and the product of what was rounded already.
                let mut alone = first.to_vec();
                for x in x[others * columns..].chunks_exact(columns) {
                    let mut one = QuantizedRows::default();
                    gated(x, 1, &mut vec![0.0; inner], &mut one);
                    alone.extend(one.as_bf16().to_floats());
                }
                let mut expected = vec![f32::NAN; count * columns];
                mixed(&compute, &down, &alone, of_prompts, &mut expected, Combine::Store);
                assert!(out == expected, "{inner}: {others} and {of_prompts}");
            }
        }
    }
}

#[test]
fn powers_of_two_are_near_and_have_their_ends() {
    struct Powers([f32; 16], bool);
    impl Work for &mut Powers {
        #[inline(always)]
        fn run(self, simd: Avx512, units: Units) {
            // SAFETY: there are 16 numbers.
            unsafe {
                let x = simd.load(self.0.as_ptr());
                let y = if self.1 {
                    opened(units, x, x)
                } else {
                    power_of_two(units, x)
                };
                simd.store(self.0.as_mut_ptr(), y);
            }
        }
    }
    let Some(units) = Units::here() else { return };
    let of = |x: f32, gate: bool| {
        let mut powers = Powers([x; 16], gate);
        units.run(&mut powers);
        assert!(powers.0.iter().all(|y| y.to_bits() == powers.0[0].to_bits()));
        powers.0[0]
    };
    assert_eq!(of(0.0, false), 1.0);
    assert_eq!(of(-3.0, false), 0.125);
    assert_eq!(of(f32::NEG_INFINITY, false), 0.0);
    assert_eq!(of(-1e30, false), 0.0);
    assert_eq!(of(128.0, false), f32::INFINITY);
    assert_eq!(of(f32::INFINITY, false), f32::INFINITY);
    assert!(of(f32::NAN, false).is_nan());
    for i in -12_600..=12_700 {
        let x = i as f32 / 100.0;
        let expected = f64::from(x).exp2();
        let error = (f64::from(of(x, false)) - expected).abs() / expected;
        assert!(error < 1.0 / 300_000.0, "2^{x}: {error}");
    }
    for i in -8000..=8000 {
        let x = i as f32 / 100.0;
        let expected = f64::from(x) / (1.0 + f64::from(-x).exp());
        let error = (f64::from(of(x, true)) - expected).abs();
        assert!(error <= expected.abs() / 10_000.0, "{x}: {error}");
    }
    // Behind what a float holds, a gate is shut, or open.
    assert!(of(-1000.0, true) == 0.0 && of(1e30, true) > 0.999e30);
    assert!(of(f32::NAN, true).is_nan());
}

#[test]
fn what_is_not_a_number_in_a_prompt_stays_so() {
    let mut rng = StdRng::seed_from_u64(23);
    for compute in with_units() {
        let (rows, columns) = (16, 576);
        let (mut bytes, _) = weights(&mut rng, GgmlDType::Q4_1, rows, columns);
        let matrix = pack(&compute, GgmlDType::Q4_1, &bytes, [rows, columns]);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = numbers(&mut rng, 20 * columns);
            x[7 * columns + 11] = bad;
            let mut out = vec![0.0; 20 * rows];
            mixed(&compute, &matrix, &x, 20, &mut out, Combine::Store);
            for (row, out) in out.chunks_exact(rows).enumerate() {
                assert!(out.iter().all(|x| x.is_finite() == (row != 7)), "row {row}");
            }
        }
        // The largest fraction that a broken scale may have.
        bytes[0] = 0xff;
        bytes[1] = 0x7f;
        let broken = pack(&compute, GgmlDType::Q4_1, &bytes, [rows, columns]);
        let x = numbers(&mut rng, columns);
        let mut out = vec![0.0; rows];
        mixed(&compute, &broken, &x, 1, &mut out, Combine::Store);
        assert!(out[0].is_nan() && out[1..].iter().all(|x| x.is_finite()));
    }
}

/// Takes blocks apart as [`super::super::amx::unpack`] does, which wants no matrix units for it.
///
/// # Safety
/// The processor has what [`Level::Avx512`] stands for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn taken_apart(matrix: &Matrix, tile: usize, first: usize, to: &mut [HalfTile]) {
    // SAFETY: the features of this very function.
    let simd = unsafe { Avx512::new() };
    let (data, blocks, count) = (matrix.tile(tile), matrix.columns() / BLOCK, to.len());
    with_layout!(matrix.format(), L => {
        unpack::<L>(simd, data, blocks, (first, count), (data, first), to);
    }, _ => unreachable!("weights that are not quantised"));
}

#[test]
fn blocks_are_taken_apart_from_where_they_lie() {
    if !Level::Avx512.is_here() {
        return;
    }
    let mut rng = StdRng::seed_from_u64(27);
    let compute = Compute::new(1, Dispatch(Level::Avx512)).unwrap();
    let rows = 37;
    for dtype in QUANTIZED {
        // Blocks that share a line of scales, with and without a neighbour; or eight that share a scale.
        let alone = dtype.block_size() == BLOCK;
        let blocks = if alone { 19 } else { 24 };
        let columns = blocks * BLOCK;
        let (bytes, values) = weights(&mut rng, dtype, rows, columns);
        let matrix = pack(&compute, dtype, &bytes, [rows, columns]);
        let ranges = if alone {
            [0..19, 16..19, 5..6]
        } else {
            [0..24, 16..24, 8..16]
        };
        for (tile, range) in (0..matrix.tiles()).flat_map(|tile| ranges.clone().map(|range| (tile, range))) {
            let mut to = vec![HalfTile::ZERO; range.len()];
            // SAFETY: asked above.
            unsafe { taken_apart(&matrix, tile, range.start, &mut to) };
            for row in tile * LANES..rows.min((tile + 1) * LANES) {
                let lane = row % LANES;
                for (block, to) in range.clone().zip(&to) {
                    for column in 0..BLOCK {
                        let expected = values[row * columns + block * BLOCK + column];
                        let found = bf16::from_bits(to.0[(column / 2 * LANES + lane) * 2 + column % 2]);
                        assert!(
                            (found.to_f32() - expected).abs() <= expected.abs() / 256.0 + 1e-6,
                            "{dtype:?}: column {column} of block {block} of row {row}: {found} {expected}"
                        );
                    }
                }
            }
        }
    }
}
