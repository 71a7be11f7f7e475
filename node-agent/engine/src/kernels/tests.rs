//! Every kernel at every level that this processor has, against plain arithmetic in 64 bits.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::f16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::attention::{Attention, BLOCK_TOKENS, Cache, Numbers, Run, SCALE_DIMS, padded};
use super::rows::TINY;
use super::vector::{Norm, Turn, argmax};
use super::*;

mod attention;
mod levels;
mod pace;
mod rows;
mod split;
#[cfg(target_arch = "x86_64")]
mod units;

const QUANTIZED: [GgmlDType; 10] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];
const FLOATS: [GgmlDType; 3] = [GgmlDType::F16, GgmlDType::BF16, GgmlDType::F32];

fn numbers(rng: &mut StdRng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-1.0..1.0_f32)).collect()
}

/// A compute context for each level, on one and on three threads.
fn contexts() -> impl Iterator<Item = Compute> {
    Dispatch::available().flat_map(|dispatch| {
        [1, 3].map(|threads| Compute {
            pool: Pool::new(threads).unwrap(),
            dispatch,
            rounding: Rounding::Once,
        })
    })
}

/// Weights as a file holds them, and what they stand for.
fn weights(rng: &mut StdRng, dtype: GgmlDType, rows: usize, columns: usize) -> (Vec<u8>, Vec<f32>) {
    let tensor = Tensor::from_vec(numbers(rng, rows * columns), (rows, columns), &Device::Cpu).unwrap();
    let tensor = QTensor::quantize(&tensor, dtype).unwrap();
    let values = tensor.dequantize(&Device::Cpu).unwrap();
    (
        tensor.data().unwrap().into_owned(),
        values.flatten_all().unwrap().to_vec1().unwrap(),
    )
}

/// `[m, n]` of `x [m, k]` and `w [n, k]`, in 64 bits.
fn reference(x: &[f32], w: &[f32], k: usize) -> Vec<f64> {
    x.chunks_exact(k)
        .flat_map(|x| {
            w.chunks_exact(k).map(|w| {
                x.iter()
                    .zip(w)
                    .map(|(x, w)| f64::from(*x) * f64::from(*w))
                    .sum::<f64>()
            })
        })
        .collect()
}

/// What is left of activations after they were rounded to 8 bits.
fn rounded(x: &[f32]) -> Vec<f32> {
    x.chunks_exact(32)
        .flat_map(|x| {
            let most = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            let (scale, inverse) = (most / 127.0, if most > 0.0 { 127.0 / most } else { 0.0 });
            x.iter()
                .map(move |x| (x * inverse).round_ties_even() * scale)
                .collect::<Vec<_>>()
        })
        .collect()
}

fn pack(compute: &Compute, dtype: GgmlDType, bytes: &[u8], shape: [usize; 2]) -> Matrix {
    let memory = Memory::default();
    Matrix::pack(
        compute,
        &memory,
        dtype,
        bytes,
        shape,
        WeightPrecision::Native,
        |_| (),
    )
    .unwrap()
}

fn product(compute: &Compute, matrix: &Matrix, x: &[f32], out: &mut [f32], combine: Combine) {
    let mut quantized = QuantizedRows::default();
    if matrix.is_quantized() {
        quantized.set(compute, x, &[matrix], None, 0);
    }
    let rows = Rows {
        floats: x,
        quantized: &quantized,
    };
    compute.product(rows, &mut [Target { matrix, out }], combine);
}

fn close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let difference = (f64::from(*found) - expected).abs();
        assert!(
            difference <= tolerance * (1.0 + expected.abs()),
            "{what}: number {index} is {found} and should be {expected}"
        );
    }
}

#[test]
fn rows_of_every_format_are_read_as_candle_reads_them() {
    let mut rng = StdRng::seed_from_u64(1);
    for dtype in QUANTIZED.into_iter().chain(FLOATS) {
        let (rows, columns) = (21, 512);
        let (bytes, values) = weights(&mut rng, dtype, rows, columns);
        let compute = Compute::new(2, Dispatch::best()).unwrap();
        let pack = |precision| {
            Matrix::pack(
                &compute,
                &Memory::default(),
                dtype,
                &bytes,
                [rows, columns],
                precision,
                |_| (),
            )
            .unwrap()
        };
        let (native, float) = (pack(WeightPrecision::Native), pack(WeightPrecision::Float));
        for (row, values) in values.chunks_exact(columns).enumerate() {
            let expected: Vec<f64> = values.iter().copied().map(f64::from).collect();
            let mut out = vec![0.0; columns];
            float.row(row, &mut out);
            close(&out, &expected, 1e-6, &format!("{dtype:?} as floats"));
            native.row(row, &mut out);
            close(&out, &expected, 1e-6, &format!("{dtype:?}"));
        }
    }
}

/// Decoding reads every weight for every token: what a tile adds to the file's bytes is time.
#[test]
fn tiles_are_hardly_larger_than_the_rows_of_the_file() {
    let mut rng = StdRng::seed_from_u64(6);
    let compute = Compute::new(1, Dispatch::best()).unwrap();
    for dtype in QUANTIZED.into_iter().chain(FLOATS) {
        let (bytes, _) = weights(&mut rng, dtype, 32, 1024);
        let matrix = pack(&compute, dtype, &bytes, [32, 1024]);
        let ratio = (0..matrix.tiles())
            .map(|tile| matrix.tile(tile).len())
            .sum::<usize>() as f64
            / bytes.len() as f64;
        // The two-bit format packs its factors closer than whole bytes.
        let most = if dtype == GgmlDType::Q2K { 1.2 } else { 1.04 };
        assert!(ratio <= most, "{dtype:?}: {ratio}");
    }
}

#[test]
fn products_equal_plain_arithmetic_in_every_format_and_shape() {
    let mut rng = StdRng::seed_from_u64(2);
    for dtype in QUANTIZED.into_iter().chain(FLOATS) {
        for (rows, columns) in [(1, 256), (16, 256), (37, 768), (64, 1024)] {
            let (bytes, _) = weights(&mut rng, dtype, rows, columns);
            for compute in contexts() {
                let matrix = pack(&compute, dtype, &bytes, [rows, columns]);
                let mut values = vec![0.0; rows * columns];
                for (row, out) in values.chunks_exact_mut(columns).enumerate() {
                    matrix.row(row, out);
                }
                for count in [1, 2, 3, 5, 6, 7, 8, 12, 70] {
                    let x = numbers(&mut rng, count * columns);
                    let seen = if matrix.is_quantized() {
                        rounded(&x)
                    } else {
                        x.clone()
                    };
                    let expected = reference(&seen, &values, columns);
                    let mut out = vec![f32::NAN; count * rows];
                    product(&compute, &matrix, &x, &mut out, Combine::Store);
                    let what = format!(
                        "{dtype:?} {rows}x{columns} x {count}, {}",
                        compute.dispatch.name()
                    );
                    // Sums of a thousand numbers in 32 bits: what a processor with other contexts draws may be 2.3e-5 off.
                    close(&out, &expected, 4e-5, &what);
                    let twice: Vec<f64> = expected.iter().map(|x| 2.0 * x).collect();
                    product(&compute, &matrix, &x, &mut out, Combine::Add);
                    close(&out, &twice, 8e-5, &what);
                }
            }
        }
    }
}

/// What files of small models have, and no multiples of 256: 32 columns, and 18 blocks, which fill a panel and begin
/// another.
#[test]
fn narrow_matrices_work_in_the_formats_that_allow_them() {
    let mut rng = StdRng::seed_from_u64(3);
    for dtype in QUANTIZED[..5].iter().copied().chain(FLOATS) {
        for (columns, count) in [(32, 5), (32, 21), (576, 37)] {
            let (bytes, values) = weights(&mut rng, dtype, 48, columns);
            for compute in contexts() {
                let matrix = pack(&compute, dtype, &bytes, [48, columns]);
                let x = numbers(&mut rng, count * columns);
                let mut out = vec![0.0; count * 48];
                product(&compute, &matrix, &x, &mut out, Combine::Store);
                let what = format!("{dtype:?} {columns} columns x {count}");
                let seen = if matrix.is_quantized() { rounded(&x) } else { x };
                close(&out, &reference(&seen, &values, columns), 1e-4, &what);
            }
        }
    }
}

/// What products begin with was not made for that format.
#[test]
#[should_panic(expected = "for products with other formats")]
fn rows_that_were_rounded_for_another_format_are_refused() {
    let mut rng = StdRng::seed_from_u64(7);
    let compute = Compute::new(1, Dispatch::best()).unwrap();
    let [minimums, halves] = [GgmlDType::Q4_1, GgmlDType::Q6K].map(|dtype| {
        let (bytes, _) = weights(&mut rng, dtype, 16, 256);
        pack(&compute, dtype, &bytes, [16, 256])
    });
    let x = numbers(&mut rng, 256);
    let mut quantized = QuantizedRows::default();
    quantized.set(&compute, &x, &[&halves], None, 0);
    quantized.set(&compute, &x, &[&minimums], None, 0);
    let rows = Rows {
        floats: &x,
        quantized: &quantized,
    };
    let mut out = [0.0; 16];
    let mut targets = [Target {
        matrix: &halves,
        out: &mut out,
    }];
    compute.product(rows, &mut targets, Combine::Store);
}

/// Rows of several matrices at once: what each asks for is made.
#[test]
fn formats_that_ask_for_different_corrections_share_rows() {
    let mut rng = StdRng::seed_from_u64(8);
    let columns = 768;
    for compute in contexts() {
        let matrices = QUANTIZED.map(|dtype| {
            let (bytes, _) = weights(&mut rng, dtype, 16, columns);
            pack(&compute, dtype, &bytes, [16, columns])
        });
        for count in [1, 5, 8, 64] {
            let x = numbers(&mut rng, count * columns);
            let mut quantized = QuantizedRows::default();
            quantized.set(&compute, &x, &matrices.each_ref(), None, 0);
            for (matrix, dtype) in matrices.iter().zip(QUANTIZED) {
                let (mut alone, mut together) = (vec![0.0; count * 16], vec![0.0; count * 16]);
                product(&compute, matrix, &x, &mut alone, Combine::Store);
                let rows = Rows {
                    floats: &x,
                    quantized: &quantized,
                };
                let mut targets = [Target {
                    matrix,
                    out: &mut together,
                }];
                compute.product(rows, &mut targets, Combine::Store);
                assert_eq!(alone, together, "{dtype:?} x {count}");
            }
        }
    }
}

/// The largest weights with the largest activations: sums of 16 bits would overflow here.
#[test]
fn extreme_numbers_do_not_overflow() {
    for dtype in QUANTIZED {
        let columns = 512;
        let extreme: Vec<f32> = (0..columns)
            .map(|i| if i % 64 < 32 { 1.0 } else { -1.0 })
            .collect();
        let tensor = Tensor::from_vec(extreme.clone(), (1, columns), &Device::Cpu).unwrap();
        let tensor = QTensor::quantize(&tensor, dtype).unwrap();
        let bytes = tensor.data().unwrap().into_owned();
        for compute in contexts() {
            let matrix = pack(&compute, dtype, &bytes, [1, columns]);
            let mut values = vec![0.0; columns];
            matrix.row(0, &mut values);
            for sign in [1.0, -1.0] {
                for count in [1, 3, 7, 16] {
                    let x: Vec<f32> = extreme.iter().map(|x| sign * x).collect();
                    let x = x.repeat(count);
                    let mut out = vec![0.0; count];
                    product(&compute, &matrix, &x, &mut out, Combine::Store);
                    let what = format!("{dtype:?} x {count}");
                    close(&out, &reference(&x, &values, columns), 1e-5, &what);
                }
            }
        }
    }
}

#[test]
fn a_row_in_a_batch_equals_the_row_alone_to_the_bit() {
    let mut rng = StdRng::seed_from_u64(4);
    for dtype in QUANTIZED.into_iter().chain(FLOATS) {
        let (rows, columns) = (40, 768);
        let (bytes, _) = weights(&mut rng, dtype, rows, columns);
        for compute in contexts() {
            let matrix = pack(&compute, dtype, &bytes, [rows, columns]);
            let x = numbers(&mut rng, 39 * columns);
            let mut alone = vec![0.0; 39 * rows];
            for (x, alone) in x.chunks_exact(columns).zip(alone.chunks_exact_mut(rows)) {
                product(&compute, &matrix, x, alone, Combine::Store);
            }
            // One to four groups of eight, and seven rows: what is done for many rows begins somewhere between.
            for count in [15, 23, 31, 39] {
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

#[test]
fn gated_products_equal_plain_arithmetic() {
    let mut rng = StdRng::seed_from_u64(5);
    let (rows, columns) = (40, 256);
    let (gate, gate_values) = weights(&mut rng, GgmlDType::Q4_1, rows, columns);
    let (up, up_values) = weights(&mut rng, GgmlDType::Q8_0, rows, columns);
    for compute in contexts() {
        let pack = |dtype, bytes| pack(&compute, dtype, bytes, [rows, columns]);
        let (gate, up) = (pack(GgmlDType::Q4_1, &gate), pack(GgmlDType::Q8_0, &up));
        let x = numbers(&mut rng, 9 * columns);
        let mut quantized = QuantizedRows::default();
        quantized.set(&compute, &x, &[&gate, &up], None, 0);
        let opened = reference(&rounded(&x), &gate_values, columns);
        let raised = reference(&rounded(&x), &up_values, columns);
        for kind in [Gate::Silu, Gate::Gelu] {
            let expected: Vec<f64> = opened
                .iter()
                .zip(&raised)
                .map(|(x, up)| {
                    let gate = match kind {
                        Gate::Silu => x / (1.0 + (-x).exp()),
                        Gate::Gelu => {
                            0.5 * x * (1.0 + (0.797_884_560_8 * (x + 0.044_715 * x * x * x)).tanh())
                        }
                    };
                    gate * up
                })
                .collect();
            let mut out = vec![0.0; 9 * rows];
            let rows = Rows {
                floats: &x,
                quantized: &quantized,
            };
            compute.gated(rows, (&gate, kind), &up, &mut out, &mut QuantizedRows::default());
            close(&out, &expected, 1e-3, &format!("{kind:?}"));
        }
    }
}

#[test]
fn what_is_not_a_number_stays_so() {
    let mut rng = StdRng::seed_from_u64(6);
    for dtype in QUANTIZED {
        let (bytes, _) = weights(&mut rng, dtype, 16, 256);
        for compute in contexts() {
            let matrix = pack(&compute, dtype, &bytes, [16, 256]);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for place in [0, 17, 255] {
                    let mut x = numbers(&mut rng, 3 * 256);
                    x[256 + place] = bad;
                    let mut out = vec![0.0; 3 * 16];
                    product(&compute, &matrix, &x, &mut out, Combine::Store);
                    assert!(out[..16].iter().chain(&out[32..]).all(|x| x.is_finite()));
                    assert!(
                        out[16..32].iter().all(|x| x.is_nan()),
                        "{dtype:?} {bad} at {place}"
                    );
                }
            }
        }
    }
}

#[test]
fn norms_and_sums_equal_plain_arithmetic() {
    let mut rng = StdRng::seed_from_u64(7);
    for compute in contexts() {
        for size in [2, 16, 40, 576] {
            let (x, weight) = (numbers(&mut rng, 30 * size), numbers(&mut rng, size));
            let expected: Vec<f64> = x
                .chunks_exact(size)
                .flat_map(|x| {
                    let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / size as f64;
                    let scale = 1.0 / (mean + 1e-5).sqrt();
                    x.iter()
                        .zip(&weight)
                        .map(move |(x, w)| f64::from(*x) * scale * f64::from(*w))
                        .collect::<Vec<_>>()
                })
                .collect();
            let mut out = vec![0.0; x.len()];
            let norm = Norm {
                weight: &weight,
                epsilon: 1e-5,
            };
            compute.normalize(norm, &x, &mut out);
            close(&out, &expected, 1e-5, "norm");
            let plus = |more: &dyn Fn(usize) -> f64| -> Vec<f64> {
                x.iter()
                    .enumerate()
                    .map(|(index, x)| f64::from(*x) + more(index))
                    .collect()
            };
            for (norm, by) in [(Some(norm), 1.0), (Some(norm), 0.5), (None, 2.0)] {
                let mut sum = x.clone();
                compute.add(&mut sum, &x, norm, by);
                let by = f64::from(by);
                let more = |index: usize| match norm {
                    Some(_) => expected[index] * by,
                    None => f64::from(x[index]) * by,
                };
                close(&sum, &plus(&more), 1e-5, "sum");
            }
        }
    }
    assert_eq!(argmax(&[1.0, 5.0, f32::NAN, 5.0]), Some(1));
    for best in 0..200 {
        let mut many = numbers(&mut rng, 200);
        many[(best + 64) % 200] = f32::NAN;
        many[best] = 2.0;
        assert_eq!(argmax(&many), Some(best));
    }
    // The first of equals, wherever parts of a long list begin.
    let mut long = vec![-1.0; 10_000];
    for (best, number) in [(9_999, 0.5), (8_192, 1.0), (8_191, 1.0), (4_096, 1.0), (5, 2.0)] {
        long[best] = number;
        assert_eq!(argmax(&long), Some(best));
    }
    long[4_500] = 2.0;
    assert_eq!(argmax(&long), Some(5));
    assert_eq!(argmax(&[f32::NEG_INFINITY; 10_000]), Some(0));
    assert_eq!(argmax(&[f32::NAN; 100]), None);
    assert_eq!(argmax(&[]), None);
}

#[test]
fn heads_turn_in_both_ways_of_pairing() {
    let mut rng = StdRng::seed_from_u64(8);
    let (heads, head_dim, half) = (3, 20, 9);
    let x = numbers(&mut rng, 2 * heads * head_dim);
    let (cos, sin) = (numbers(&mut rng, 2 * half), numbers(&mut rng, 2 * half));
    for compute in contexts() {
        for halves in [false, true] {
            let mut expected: Vec<f64> = x.iter().copied().map(f64::from).collect();
            for (row, x) in expected.chunks_exact_mut(heads * head_dim).enumerate() {
                for head in x.chunks_exact_mut(head_dim) {
                    for i in 0..half {
                        let (a, b) = if halves { (i, i + half) } else { (2 * i, 2 * i + 1) };
                        let (c, s) = (f64::from(cos[row * half + i]), f64::from(sin[row * half + i]));
                        (head[a], head[b]) = (head[a] * c - head[b] * s, head[a] * s + head[b] * c);
                    }
                }
            }
            let turn = Turn {
                norm: None,
                cos: &cos,
                sin: &sin,
                half,
                halves,
            };
            let mut out = x.clone();
            for (row, heads) in out.chunks_exact_mut(heads * head_dim).enumerate() {
                compute.turn(&turn, row, heads, head_dim);
            }
            close(&out, &expected, 1e-6, "rotation");
        }
    }
}

#[test]
fn a_thread_begins_where_its_share_of_the_next_product_lies() {
    let mut rng = StdRng::seed_from_u64(30);
    let compute = contexts().next().unwrap();
    let [before, first, second] = [[16, 64], [48, 64], [32, 64]].map(|shape| {
        let (bytes, _) = weights(&mut rng, GgmlDType::Q4_1, shape[0], shape[1]);
        pack(&compute, GgmlDType::Q4_1, &bytes, shape)
    });
    let at = |matrix: &Matrix, tile: usize| Some(matrix.tile(tile).as_ptr().addr());
    assert!(before.next().is_none());
    before.is_followed_by(&[&first, &second], false);
    // Five tiles on two threads: the first three, the other two.
    let next = before.next().unwrap();
    assert_eq!(next.share(0, 2), [at(&first, 0), None]);
    assert_eq!(next.share(1, 2), [at(&second, 0), None]);
    assert_eq!(next.share(3, 4), [at(&second, 1), None]);
    first.is_followed_by(&[&second, &before], true);
    let next = first.next().unwrap();
    assert_eq!(next.share(0, 2), [at(&second, 0), at(&before, 0)]);
    assert_eq!(next.share(1, 2)[0], at(&second, 1));
    assert_eq!(next.bytes(), 3 * second.tile(0).len());
}
