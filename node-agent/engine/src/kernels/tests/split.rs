//! Rows in two parts: products that keep sixteen bits of them.

use super::*;

/// As [`contexts`], rounding twice.
fn twice() -> impl Iterator<Item = Compute> {
    contexts().map(|compute| compute.with_rounding(Rounding::Twice))
}

/// What is left of activations after both parts were rounded to 8 bits.
fn rounded_twice(x: &[f32]) -> Vec<f32> {
    let first = rounded(x);
    let rest: Vec<f32> = x.iter().zip(&first).map(|(x, first)| x - first).collect();
    first
        .iter()
        .zip(rounded(&rest))
        .map(|(first, rest)| first + rest)
        .collect()
}

#[test]
fn products_equal_plain_arithmetic_of_sixteen_bits() {
    let mut rng = StdRng::seed_from_u64(50);
    let (rows, columns) = (37, 768);
    for dtype in QUANTIZED.into_iter().chain(FLOATS) {
        let (bytes, _) = weights(&mut rng, dtype, rows, columns);
        for compute in twice() {
            let matrix = pack(&compute, dtype, &bytes, [rows, columns]);
            let mut values = vec![0.0; rows * columns];
            for (row, out) in values.chunks_exact_mut(columns).enumerate() {
                matrix.row(row, out);
            }
            // Up to more rows than a piece of work holds.
            for count in [1, 2, 3, 4, 5, 8, 37] {
                let x = numbers(&mut rng, count * columns);
                let seen = if matrix.is_quantized() {
                    rounded_twice(&x)
                } else {
                    x.clone()
                };
                let expected = reference(&seen, &values, columns);
                let mut out = vec![f32::NAN; count * rows];
                product(&compute, &matrix, &x, &mut out, Combine::Store);
                let what = format!("{dtype:?} x {count}, {}", compute.dispatch.name());
                close(&out, &expected, 8e-5, &what);
                // One rounding would leave some two hundred times as much.
                close(&out, &reference(&x, &values, columns), 1e-3, &what);
                let doubled: Vec<f64> = expected.iter().map(|x| 2.0 * x).collect();
                product(&compute, &matrix, &x, &mut out, Combine::Add);
                close(&out, &doubled, 16e-5, &what);
            }
        }
    }
}

#[test]
fn a_row_in_a_batch_equals_the_row_alone_to_the_bit() {
    let mut rng = StdRng::seed_from_u64(51);
    let (rows, columns) = (40, 768);
    for dtype in QUANTIZED {
        let (bytes, _) = weights(&mut rng, dtype, rows, columns);
        for compute in twice() {
            let matrix = pack(&compute, dtype, &bytes, [rows, columns]);
            let x = numbers(&mut rng, 39 * columns);
            let mut alone = vec![0.0; 39 * rows];
            for (x, alone) in x.chunks_exact(columns).zip(alone.chunks_exact_mut(rows)) {
                product(&compute, &matrix, x, alone, Combine::Store);
            }
            for count in [2, 3, 7, 15, 39] {
                let mut together = vec![0.0; count * rows];
                product(
                    &compute,
                    &matrix,
                    &x[..count * columns],
                    &mut together,
                    Combine::Store,
                );
                let what = format!("{dtype:?} {}, {count} rows", compute.dispatch.name());
                assert!(together == alone[..count * rows], "{what}");
            }
        }
    }
}

/// A norm is part of the rounding, and matrices of floats take each row once beside others that take it twice.
#[test]
fn matrices_of_floats_and_gates_share_rows_with_others() {
    let mut rng = StdRng::seed_from_u64(52);
    let columns = 256;
    let weight = numbers(&mut rng, columns);
    let norm = Norm {
        weight: &weight,
        epsilon: 1e-5,
    };
    for compute in twice() {
        let [rounded, floats] = [GgmlDType::Q4_1, GgmlDType::F16].map(|dtype| {
            let (bytes, _) = weights(&mut rng, dtype, 40, columns);
            pack(&compute, dtype, &bytes, [40, columns])
        });
        for count in [1, 3, 9, 33] {
            let x = numbers(&mut rng, count * columns);
            let mut normed = vec![0.0; x.len()];
            compute.normalize(norm, &x, &mut normed);
            let alone = [&rounded, &floats].map(|matrix| {
                let mut out = vec![0.0; count * 40];
                product(&compute, matrix, &normed, &mut out, Combine::Store);
                out
            });
            let mut quantized = QuantizedRows::default();
            quantized.set(&compute, &x, &[&rounded], Some(norm), 0);
            let rows = Rows {
                floats: &normed,
                quantized: &quantized,
            };
            let mut together = [vec![0.0; count * 40], vec![0.0; count * 40]];
            let mut targets: Vec<Target<'_>> = [&rounded, &floats]
                .into_iter()
                .zip(&mut together)
                .map(|(matrix, out)| Target { matrix, out })
                .collect();
            compute.product(rows, &mut targets, Combine::Store);
            assert!(together == alone, "{count} rows, {}", compute.dispatch.name());

            let gate = |x: f64| x / (1.0 + (-x).exp());
            for (first, second) in [(0, 1), (1, 0), (0, 0), (1, 1)] {
                let matrices = [&rounded, &floats];
                let mut out = vec![0.0; count * 40];
                compute.gated(
                    rows,
                    (matrices[first], Gate::Silu),
                    matrices[second],
                    &mut out,
                    &mut QuantizedRows::default(),
                );
                let expected: Vec<f64> = alone[first]
                    .iter()
                    .zip(&alone[second])
                    .map(|(x, up)| gate(f64::from(*x)) * f64::from(*up))
                    .collect();
                close(&out, &expected, 1e-5, "gate");
            }
        }
    }
}

#[test]
fn what_is_not_a_number_stays_so() {
    let mut rng = StdRng::seed_from_u64(53);
    let (bytes, _) = weights(&mut rng, GgmlDType::Q4_1, 16, 256);
    for compute in twice() {
        let matrix = pack(&compute, GgmlDType::Q4_1, &bytes, [16, 256]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = numbers(&mut rng, 3 * 256);
            x[256 + 100] = bad;
            let mut out = vec![0.0; 3 * 16];
            product(&compute, &matrix, &x, &mut out, Combine::Store);
            assert!(out[..16].iter().chain(&out[32..]).all(|x| x.is_finite()));
            assert!(out[16..32].iter().all(|x| x.is_nan()), "{bad}");
        }
    }
}

/// Blocks that are nothing, or hardly anything, or as large as floats go: no step of nothing is divided by.
#[test]
fn the_smallest_and_the_largest_numbers_are_split() {
    let mut rng = StdRng::seed_from_u64(54);
    let (bytes, values) = weights(&mut rng, GgmlDType::Q8_0, 16, 32);
    for compute in twice() {
        let matrix = pack(&compute, GgmlDType::Q8_0, &bytes, [16, 32]);
        for number in [0.0, -0.0, 1e-40, TINY.next_down(), TINY.next_up(), 1e-30, 1e36] {
            let x: Vec<f32> = (0..32)
                .map(|i| if i % 3 == 0 { number } else { -number / 7.0 })
                .collect();
            let mut out = vec![f32::NAN; 16];
            product(&compute, &matrix, &x, &mut out, Combine::Store);
            let expected = reference(&x, &values, 32);
            for (found, expected) in out.iter().zip(expected) {
                let difference = (f64::from(*found) - expected).abs();
                let allowed = f64::from(number.abs()) * 2e-3 + f64::from(TINY);
                assert!(difference <= allowed, "{number}: {found} and not {expected}");
            }
        }
    }
}
