//! How fast the kernels are by themselves, on weights that no cache of a core holds: `just bench-kernels`. It judges nothing.

use std::time::Instant;

use super::*;

/// Times each is measured; the median is shown.
const ROUNDS: usize = 15;
/// Shape of the matrices: a small model's feed-forward part.
const SHAPE: [usize; 2] = [1536, 768];
/// So many of them: from some 25 MiB of Q2_K to 270 of F32.
const MATRICES: usize = 60;
const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 64, 256];

/// Thousand million products a second, in the median.
fn pace(products: usize, mut work: impl FnMut()) -> f64 {
    let mut seconds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let started = Instant::now();
            work();
            started.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    products as f64 / seconds[ROUNDS / 2] / 1e9
}

fn all_threads(dispatch: Dispatch) -> Compute {
    Compute::new(available_threads(), dispatch).unwrap()
}

#[test]
#[ignore = "a measurement: just bench-kernels"]
fn pace_of_products() {
    let mut rng = StdRng::seed_from_u64(30);
    let [outputs, columns] = SHAPE;
    println!("thousand million products a second, of {ROWS:?} rows at once");
    for dispatch in Dispatch::available().filter(|level| level.0 != Level::Portable) {
        let compute = all_threads(dispatch);
        println!("{}, {} threads", dispatch.name(), compute.pool.threads());
        for dtype in QUANTIZED.into_iter().chain(FLOATS) {
            let (bytes, _) = weights(&mut rng, dtype, outputs, columns);
            let matrices: Vec<Matrix> = (0..MATRICES)
                .map(|_| pack(&compute, dtype, &bytes, SHAPE))
                .collect();
            let paces = ROWS.map(|rows| {
                let x = numbers(&mut rng, rows * columns);
                let mut quantized = QuantizedRows::default();
                quantized.set(&compute, &x, &[&matrices[0]], None, 0);
                let mut out = vec![0.0; rows * outputs];
                let pace = pace(MATRICES * rows * outputs * columns, || {
                    for matrix in &matrices {
                        let rows = Rows {
                            floats: &x,
                            quantized: &quantized,
                        };
                        let mut targets = [Target {
                            matrix,
                            out: &mut out,
                        }];
                        compute.product(rows, &mut targets, Combine::Store);
                    }
                });
                format!("{pace:7.1}")
            });
            println!("  {:5} {}", format!("{dtype:?}"), paces.join(" "));
        }
    }
}

#[test]
#[ignore = "a measurement: just bench-kernels"]
fn pace_of_rounding() {
    let mut rng = StdRng::seed_from_u64(31);
    let columns = SHAPE[1];
    println!("thousand million numbers a second, normalised and rounded, of {ROWS:?} rows at once");
    for dispatch in Dispatch::available() {
        let compute = all_threads(dispatch);
        let (bytes, _) = weights(&mut rng, GgmlDType::Q4_1, 16, columns);
        let matrix = pack(&compute, GgmlDType::Q4_1, &bytes, [16, columns]);
        let weight = numbers(&mut rng, columns);
        let norm = Norm {
            weight: &weight,
            epsilon: 1e-5,
        };
        let paces = ROWS.map(|rows| {
            let x = numbers(&mut rng, rows * columns);
            let mut quantized = QuantizedRows::default();
            let pace = pace(MATRICES * rows * columns, || {
                for _ in 0..MATRICES {
                    quantized.set(&compute, &x, &[&matrix], Some(norm), 0);
                }
            });
            format!("{pace:7.2}")
        });
        println!("  {:12} {}", dispatch.name(), paces.join(" "));
    }
}

/// Caches of some sequences, of one layer: `[layers, keys and values, heads, numbers]` in each block.
struct OfLayer<'a> {
    blocks: &'a [Vec<f16>],
    /// Blocks of a sequence.
    each: usize,
    layer: usize,
    attention: Attention,
}

impl Cache for OfLayer<'_> {
    fn block(&self, sequence: usize, block: usize, kv_head: usize) -> (Numbers<'_>, Numbers<'_>) {
        let Attention {
            kv_heads, head_dim, ..
        } = self.attention;
        let size = BLOCK_TOKENS * padded(head_dim);
        let side = |side: usize| {
            let head = (self.layer * 2 + side) * kv_heads + kv_head;
            Numbers::F16(&self.blocks[sequence * self.each + block][head * size..(head + 1) * size])
        };
        (side(0), side(1))
    }
}

#[test]
#[ignore = "a measurement: just bench-kernels"]
fn pace_of_attention() {
    const LAYERS: usize = 30;
    let attention = Attention {
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        scale: 0.125,
        window: None,
    };
    let (width, size) = (9 * 64, LAYERS * 2 * 3 * BLOCK_TOKENS * 64);
    let mut rng = StdRng::seed_from_u64(32);
    println!("thousand million products a second: sequences x rows, the last at so many tokens");
    for dispatch in Dispatch::available() {
        let compute = all_threads(dispatch);
        println!("{}, {} threads", dispatch.name(), compute.pool.threads());
        for (sequences, rows, tokens) in [
            (1, 1, 80),
            (1, 1, 2000),
            (16, 1, 80),
            (16, 1, 500),
            (1, 256, 256),
            (1, 64, 2000),
        ] {
            let each = usize::div_ceil(tokens, BLOCK_TOKENS);
            let block = numbers(&mut rng, size)
                .into_iter()
                .map(f16::from_f32)
                .collect::<Vec<_>>();
            let blocks = vec![block; sequences * each];
            let runs: Vec<Run> = (0..sequences)
                .map(|sequence| Run {
                    sequence,
                    first_row: sequence * rows,
                    rows,
                    position: tokens - rows,
                    of_prompt: false,
                })
                .collect();
            let queries = numbers(&mut rng, sequences * rows * width);
            let mut out = vec![0.0; queries.len()];
            // Each row sees itself and what is before it; a key and a value of each.
            let seen: usize = (tokens - rows + 1..=tokens).sum();
            let pace = pace(LAYERS * sequences * seen * 2 * width, || {
                for layer in 0..LAYERS {
                    let cache = OfLayer {
                        blocks: &blocks,
                        each,
                        layer,
                        attention,
                    };
                    compute.attend(&attention, &cache, &runs, (&queries, None), &mut out);
                }
            });
            println!("  {sequences:2} x {rows:3} at {tokens:4} {pace:7.1}");
        }
    }
}
