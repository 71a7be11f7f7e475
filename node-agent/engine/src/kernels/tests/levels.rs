//! The levels beside each other, to the bit, and the encoder's kernels at each of them.

use super::super::encode::Attended;
use super::super::vector::{CHUNK, HeadShape, WeightSums, Weights, WeightsTo};
use super::attention::Blocks;
use super::*;

/// Contexts of one thread: of the levels that have fused multiply-add, the best first.
fn fused() -> Vec<Compute> {
    let levels: Vec<Dispatch> = Dispatch::available().collect();
    let names: Vec<&str> = levels.iter().map(|level| level.name()).collect();
    println!("levels of this processor: {}", names.join(", "));
    let fused = |level: &Dispatch| {
        // Plain Rust has it on ARM, and elsewhere where the compiler was told of it.
        level.0 != Level::Portable || cfg!(any(target_arch = "aarch64", target_feature = "fma"))
    };
    let fused = levels.into_iter().filter(fused);
    fused
        .map(|dispatch| Compute {
            pool: Pool::new(1).unwrap(),
            dispatch,
            rounding: Rounding::Once,
        })
        .collect()
}

/// Computes the same at every level with fused multiply-add, and holds the results to each other.
fn same_bits(what: &str, compute_with: impl Fn(&Compute) -> Vec<f32>) {
    let contexts = fused();
    let results: Vec<Vec<u32>> = contexts
        .iter()
        .map(|compute| compute_with(compute).into_iter().map(f32::to_bits).collect())
        .collect();
    for (compute, result) in contexts.iter().zip(&results).skip(1) {
        let apart = result.iter().zip(&results[0]).position(|(a, b)| a != b);
        assert_eq!(
            apart.map(|at| (at, f32::from_bits(result[at]), f32::from_bits(results[0][at]))),
            None,
            "{what}: {} gives another number than {}",
            compute.dispatch.name(),
            contexts[0].dispatch.name()
        );
    }
}

#[test]
fn products_are_the_same_at_every_level_to_the_bit() {
    let mut rng = StdRng::seed_from_u64(21);
    for dtype in QUANTIZED.into_iter().chain(FLOATS) {
        for (rows, columns) in [(37, 768), (64, 256)] {
            let (bytes, _) = weights(&mut rng, dtype, rows, columns);
            for count in [1, 2, 3, 4, 5, 6, 7, 13, 40] {
                let x = numbers(&mut rng, count * columns);
                same_bits(&format!("{dtype:?} {rows}x{columns} x {count}"), |compute| {
                    let matrix = pack(compute, dtype, &bytes, [rows, columns]);
                    let mut out = vec![0.5; count * rows];
                    product(compute, &matrix, &x, &mut out, Combine::Add);
                    out
                });
            }
        }
    }
}

#[test]
fn gates_norms_and_rotations_are_the_same_at_every_level_to_the_bit() {
    let mut rng = StdRng::seed_from_u64(22);
    let (rows, columns) = (40, 256);
    let (gate, _) = weights(&mut rng, GgmlDType::Q4_1, rows, columns);
    let (up, _) = weights(&mut rng, GgmlDType::Q6K, rows, columns);
    let x: Vec<f32> = numbers(&mut rng, 9 * columns).iter().map(|x| 4.0 * x).collect();
    for kind in [Gate::Silu, Gate::Gelu] {
        same_bits(&format!("{kind:?}"), |compute| {
            let gate = pack(compute, GgmlDType::Q4_1, &gate, [rows, columns]);
            let up = pack(compute, GgmlDType::Q6K, &up, [rows, columns]);
            let mut quantized = QuantizedRows::default();
            quantized.set(compute, &x, &[&gate, &up], None, 0);
            let mut out = vec![0.0; 9 * rows];
            let rows = Rows {
                floats: &x,
                quantized: &quantized,
            };
            compute.gated(rows, (&gate, kind), &up, &mut out, &mut QuantizedRows::default());
            out
        });
    }
    for size in [2, 40, 576] {
        let (x, weight) = (numbers(&mut rng, 30 * size), numbers(&mut rng, size));
        same_bits("the norm and the sum", |compute| {
            let mut out = vec![0.0; x.len()];
            let norm = Norm {
                weight: &weight,
                epsilon: 1e-5,
            };
            compute.normalize(norm, &x, &mut out);
            compute.add(&mut out, &x, None, 0.7);
            compute.add(&mut out, &x, Some(norm), 1.3);
            out
        });
    }
    let (cos, sin) = (numbers(&mut rng, 2 * 9), numbers(&mut rng, 2 * 9));
    let (x, weight) = (numbers(&mut rng, 2 * 60), numbers(&mut rng, 20));
    let norm = Norm {
        weight: &weight,
        epsilon: 1e-5,
    };
    for (halves, norm) in [(false, None), (true, None), (true, Some(norm))] {
        same_bits("the rotation", |compute| {
            let turn = Turn {
                norm,
                cos: &cos,
                sin: &sin,
                half: 9,
                halves,
            };
            let mut out = x.clone();
            for (row, heads) in out.chunks_exact_mut(60).enumerate() {
                compute.turn(&turn, row, heads, 20);
            }
            out
        });
    }
}

#[test]
fn a_norm_and_rounding_in_one_step_are_what_they_are_one_after_the_other() {
    let mut rng = StdRng::seed_from_u64(17);
    let (bytes, _) = weights(&mut rng, GgmlDType::Q4_1, 16, 576);
    let weight = numbers(&mut rng, 576);
    let norm = Norm {
        weight: &weight,
        epsilon: 1e-5,
    };
    for compute in contexts() {
        let matrix = pack(&compute, GgmlDType::Q4_1, &bytes, [16, 576]);
        for rows in 1..=18 {
            let mut x = numbers(&mut rng, rows * 576);
            // A row that is no number, and no other with it.
            if rows > 2 {
                x[2 * 576 + 100] = f32::INFINITY;
            }
            let mut normed = vec![0.0; x.len()];
            compute.normalize(norm, &x, &mut normed);
            let multiplied = |x: &[f32], norm| {
                let mut quantized = QuantizedRows::default();
                quantized.set(&compute, x, &[&matrix], norm, 0);
                let mut out = vec![0.0_f32; rows * 16];
                let rows = Rows {
                    floats: x,
                    quantized: &quantized,
                };
                let mut targets = [Target {
                    matrix: &matrix,
                    out: &mut out,
                }];
                compute.product(rows, &mut targets, Combine::Store);
                out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            assert_eq!(
                multiplied(&x, Some(norm)),
                multiplied(&normed, None),
                "{rows} rows"
            );
        }
    }
}

#[test]
fn blocks_of_zeros_and_of_next_to_nothing_stay_what_they_are() {
    // Sixteen columns of ones: products are sums of a row.
    let ones: Vec<f32> = vec![1.0; 16 * 64];
    let bytes: Vec<u8> = QTensor::quantize(&Tensor::new(ones, &Device::Cpu).unwrap(), GgmlDType::Q8_0)
        .unwrap()
        .data()
        .unwrap()
        .into_owned();
    for compute in contexts() {
        let matrix = pack(&compute, GgmlDType::Q8_0, &bytes, [16, 64]);
        for rows in 1..=9 {
            for number in [0.0, 1e-38, 1e-37, 5e-37, 1e-30] {
                let mut x = vec![0.0_f32; rows * 64];
                // The second block alone has numbers.
                x.chunks_exact_mut(64).for_each(|row| row[32..].fill(number));
                let mut out = vec![1.0; rows * 16];
                product(&compute, &matrix, &x, &mut out, Combine::Store);
                for out in out {
                    // Below what 127 times an inverse can be, numbers may shrink and never grow or turn.
                    let sum = 32.0 * number;
                    let least = if number < 3.75e-37 { 0.0 } else { sum * 0.99 };
                    assert!((least..=sum * 1.01).contains(&out), "{number} x 32: {out}");
                }
            }
        }
    }
}

#[test]
fn attention_is_the_same_at_every_level_to_the_bit() {
    let mut rng = StdRng::seed_from_u64(23);
    for head_dim in [64, 80] {
        let (width, blocks) = (padded(head_dim), 5);
        let size = width * BLOCK_TOKENS;
        let halves = |rng: &mut StdRng| -> Vec<f16> {
            let numbers = numbers(rng, size * blocks);
            numbers.into_iter().map(f16::from_f32).collect()
        };
        let (keys, values) = (halves(&mut rng), halves(&mut rng));
        let small: Vec<i8> = (0..size * blocks).map(|_| rng.random_range(-127..=127)).collect();
        let count = head_dim.div_ceil(SCALE_DIMS) * BLOCK_TOKENS;
        let scales = numbers(&mut rng, count * blocks);
        let range = |block: usize| block * size..(block + 1) * size;
        let of_halves = |block| {
            (
                Numbers::F16(&keys[range(block)]),
                Numbers::F16(&values[range(block)]),
            )
        };
        let of_8_bits = |block: usize| {
            let numbers = Numbers::Q8(&small[range(block)], &scales[block * count..(block + 1) * count]);
            (numbers, numbers)
        };
        let caches = [
            Blocks((0..blocks).map(of_halves).collect()),
            Blocks((0..blocks).map(of_8_bits).collect()),
        ];
        for (cache, rows) in caches.iter().flat_map(|cache| [1, 7].map(|rows| (cache, rows))) {
            let queries = numbers(&mut rng, rows * 2 * head_dim);
            for (window, scale) in [(None, 0.1), (Some(70), 0.1), (None, 4.0)] {
                same_bits(
                    &format!("{rows} rows of {head_dim}, window {window:?}, scale {scale}"),
                    |compute| {
                        let attention = Attention {
                            heads: 2,
                            kv_heads: 1,
                            head_dim,
                            scale,
                            window,
                        };
                        let run = Run {
                            sequence: 0,
                            first_row: 0,
                            rows,
                            position: 150 - rows,
                            of_prompt: false,
                        };
                        let mut out = vec![0.0; queries.len()];
                        compute.attend(&attention, cache, &[run], (&queries, None), &mut out);
                        out
                    },
                );
            }
        }
    }
}

/// erf by its series, which for these numbers loses nothing that 32 bits would see.
fn erf(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn the_encoders_norm_and_gate_equal_plain_arithmetic_at_every_level() {
    let mut rng = StdRng::seed_from_u64(24);
    // Of two numbers that are nearly alike, 32 bits know the variance too badly to be held to 64.
    for size in [16, 40, 384] {
        let (x, weight) = (numbers(&mut rng, 30 * size), numbers(&mut rng, size));
        let bias = numbers(&mut rng, size);
        let expected: Vec<f64> = x
            .chunks_exact(size)
            .flat_map(|x| {
                let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / size as f64;
                let variance = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / size as f64;
                let scale = 1.0 / (variance + 1e-5).sqrt();
                x.iter()
                    .zip(weight.iter().zip(&bias))
                    .map(|(x, (w, b))| (f64::from(*x) - mean) * scale * f64::from(*w) + f64::from(*b))
                    .collect::<Vec<_>>()
            })
            .collect();
        for compute in contexts() {
            let mut out = x.clone();
            compute.layer_norm(&mut out, &weight, &bias, 1e-5);
            close(&out, &expected, 2e-5, compute.dispatch.name());
        }
        same_bits("the norm with a mean", |compute| {
            let mut out = x.clone();
            compute.layer_norm(&mut out, &weight, &bias, 1e-5);
            out
        });
    }
    let x: Vec<f32> = numbers(&mut rng, 1003).iter().map(|x| 5.0 * x).collect();
    let expected: Vec<f64> = x
        .iter()
        .map(|x| f64::from(*x))
        .map(|x| x / 2.0 * (1.0 + erf(x / std::f64::consts::SQRT_2)))
        .collect();
    for compute in contexts() {
        let mut out = x.clone();
        compute.gelu_erf(&mut out);
        close(&out, &expected, 1e-6, compute.dispatch.name());
    }
    same_bits("GELU", |compute| {
        let mut out = x.clone();
        compute.gelu_erf(&mut out);
        out
    });
}

#[test]
fn attention_over_whole_texts_equals_plain_arithmetic_at_every_level() {
    let mut rng = StdRng::seed_from_u64(25);
    let lengths = [1, 5, 33, 16];
    for (heads, head_dim) in [(2, 32), (3, 20)] {
        let width = heads * head_dim;
        let count = lengths.iter().sum::<usize>() * width;
        let [queries, keys, values] = [(); 3].map(|()| numbers(&mut rng, count));
        let mut expected = Vec::new();
        let mut first = 0;
        for length in lengths {
            for row in first..first + length {
                for head in 0..heads {
                    let part = |of: &[f32], row: usize| -> Vec<f64> {
                        let part = &of[row * width + head * head_dim..][..head_dim];
                        part.iter().map(|x| f64::from(*x)).collect()
                    };
                    let query = part(&queries, row);
                    let weights: Vec<f64> = (first..first + length)
                        .map(|other| {
                            let key = part(&keys, other);
                            let score: f64 = query.iter().zip(&key).map(|(q, k)| q * k).sum();
                            (score / (head_dim as f64).sqrt()).exp()
                        })
                        .collect();
                    let total: f64 = weights.iter().sum();
                    expected.extend((0..head_dim).map(|d| {
                        let values = (first..first + length).map(|other| part(&values, other)[d]);
                        values.zip(&weights).map(|(x, weight)| x * weight).sum::<f64>() / total
                    }));
                }
            }
            first += length;
        }
        let attend = |compute: &Compute| {
            let from = Attended {
                queries: &queries,
                keys: &keys,
                values: &values,
            };
            let mut out = vec![f32::NAN; count];
            compute.attend_texts(from, HeadShape { heads, head_dim }, &lengths, &mut out);
            out
        };
        for compute in contexts() {
            close(&attend(&compute), &expected, 2e-5, compute.dispatch.name());
        }
        same_bits("attention over texts", attend);
    }
}

#[test]
fn weights_and_their_sums_are_those_of_the_exponential_at_every_level() {
    let mut rng = StdRng::seed_from_u64(27);
    // Not whole lanes, not whole chunks, and one of neither.
    for count in [1, 15, 16, 1000, 1024, 3001] {
        let x: Vec<f32> = numbers(&mut rng, count).iter().map(|x| 9.0 * x).collect();
        let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for scale in [1.0, 0.4, 3.0] {
            let expected: Vec<f64> = x
                .iter()
                .map(|x| (f64::from(x - most) * f64::from(scale)).exp())
                .collect();
            let sums: Vec<f64> = expected.chunks(CHUNK).map(|chunk| chunk.iter().sum()).collect();
            let of = || Weights { x: &x, most, scale };
            let each = |compute: &Compute| {
                let mut to = vec![f32::NAN; count];
                compute.dispatch.run(WeightsTo(of(), &mut to));
                to
            };
            let summed = |compute: &Compute| compute.dispatch.run(WeightSums(of()));
            for compute in contexts() {
                close(&each(&compute), &expected, 1e-6, compute.dispatch.name());
                close(&summed(&compute), &sums, 1e-6, compute.dispatch.name());
            }
            same_bits("weights", each);
            same_bits("sums of weights", summed);
        }
    }
}
