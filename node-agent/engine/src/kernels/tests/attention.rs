//! Attention, against plain arithmetic and against itself.

use super::super::vector::{Weights, WeightsTo};
use super::*;

/// Rows of answers, and where matrix units compute those rows of prompts.
fn of_both_kinds(compute: Compute) -> impl Iterator<Item = (Compute, bool)> {
    let kinds = if compute.units_read_prompts() { 2 } else { 1 };
    [false, true]
        .into_iter()
        .take(kinds)
        .map(move |of_prompt| (compute.clone(), of_prompt))
}

/// A cache of one sequence and one head for each KV head.
struct TestCache {
    blocks: Vec<Vec<(Vec<f16>, Vec<f16>)>>,
}

impl Cache for TestCache {
    fn block(&self, _: usize, block: usize, kv_head: usize) -> (Numbers<'_>, Numbers<'_>) {
        let (keys, values) = &self.blocks[block][kv_head];
        (Numbers::F16(keys), Numbers::F16(values))
    }
}

#[test]
fn attention_equals_plain_arithmetic_and_no_row_knows_the_others() {
    let mut rng = StdRng::seed_from_u64(9);
    // With the last scale, later scores lie far above those before.
    for (heads, kv_heads, head_dim, scale) in [
        (3, 3, 8, 0.4),
        (2, 1, 16, 0.4),
        (6, 2, 64, 0.4),
        (4, 1, 80, 0.4),
        (7, 1, 32, 0.4),
        (2, 1, 256, 0.2),
        (6, 2, 64, 8.0),
    ] {
        for window in [None, Some(70)] {
            let tokens = 1100;
            let (keys, values) = (
                numbers(&mut rng, tokens * kv_heads * head_dim),
                numbers(&mut rng, tokens * kv_heads * head_dim),
            );
            let half = |x: f32| f16::from_f32(x);
            let at =
                |x: &[f32], token: usize, head: usize, d: usize| x[(token * kv_heads + head) * head_dim + d];
            let blocks = (0..tokens.div_ceil(BLOCK_TOKENS)).map(|block| {
                (0..kv_heads)
                    .map(|head| {
                        let width = padded(head_dim);
                        // What nobody wrote yet must not matter.
                        let mut k = vec![f16::MAX; width * BLOCK_TOKENS];
                        let mut v = vec![f16::MAX; width * BLOCK_TOKENS];
                        for t in 0..BLOCK_TOKENS.min(tokens - block * BLOCK_TOKENS) {
                            for d in 0..head_dim {
                                k[d * BLOCK_TOKENS + t] = half(at(&keys, block * BLOCK_TOKENS + t, head, d));
                                v[t * width + d] = half(at(&values, block * BLOCK_TOKENS + t, head, d));
                            }
                        }
                        (k, v)
                    })
                    .collect()
            });
            let cache = TestCache {
                blocks: blocks.collect(),
            };
            let attention = Attention {
                heads,
                kv_heads,
                head_dim,
                scale,
                window,
            };
            let rows = 37;
            let position = tokens - rows;
            let queries = numbers(&mut rng, rows * heads * head_dim);
            let mut expected = Vec::new();
            for row in 0..rows {
                for head in 0..heads {
                    let query = &queries[(row * heads + head) * head_dim..][..head_dim];
                    let kv_head = head / (heads / kv_heads);
                    let last = position + row;
                    let first = window.map_or(0, |window| (last + 1).saturating_sub(window));
                    let number = |x: &[f32], t, d| half(at(x, t, kv_head, d)).to_f64();
                    let weights: Vec<f64> = (first..=last)
                        .map(|t| {
                            let score: f64 = (0..head_dim)
                                .map(|d| f64::from(query[d]) * number(&keys, t, d))
                                .sum();
                            (f64::from(scale) * score).exp()
                        })
                        .collect();
                    let total: f64 = weights.iter().sum();
                    expected.extend((0..head_dim).map(|d| {
                        (first..=last)
                            .zip(&weights)
                            .map(|(t, weight)| weight * number(&values, t, d))
                            .sum::<f64>()
                            / total
                    }));
                }
            }
            for (compute, of_prompt) in contexts().flat_map(of_both_kinds) {
                let mut run = Run {
                    sequence: 0,
                    first_row: 0,
                    rows,
                    position,
                    of_prompt,
                };
                let mut together = vec![0.0; queries.len()];
                compute.attend(&attention, &cache, &[run], (&queries, None), &mut together);
                // Scores are as inexact as they are large, and matrix units round to 8 significant bits.
                let tolerance = match (of_prompt, scale > 1.0) {
                    (false, false) => 2e-5,
                    (false, true) => 4e-4,
                    (true, false) => 2e-3,
                    (true, true) => 6e-2,
                };
                close(&together, &expected, tolerance, compute.dispatch.name());
                let width = heads * head_dim;
                for row in [0, 5, rows - 1] {
                    run.position = position + row;
                    run.rows = 1;
                    let range = row * width..(row + 1) * width;
                    let mut alone = vec![0.0; width];
                    compute.attend(
                        &attention,
                        &cache,
                        &[run],
                        (&queries[range.clone()], None),
                        &mut alone,
                    );
                    assert_eq!(alone, together[range], "{}", compute.dispatch.name());
                }
            }
        }
    }
}

/// Answers and prompts, few rows and many, in one call on any number of threads: cut along the context or not.
#[test]
fn results_are_the_same_to_the_bit_however_the_work_is_cut() {
    let mut rng = StdRng::seed_from_u64(43);
    let (heads, head_dim, blocks) = (3, 16, 40);
    let size = padded(head_dim) * BLOCK_TOKENS * blocks;
    let (keys, mut values) = (numbers(&mut rng, size), numbers(&mut rng, size));
    // Who sees this token has no result.
    let token = 700;
    values[token * padded(head_dim) + 3] = f32::NAN;
    let cache = of_floats(&keys, &values, head_dim);
    // On matrix units sixteen queries are a tile: 5 rows are fewer, 6 are more, 11 are more than two.
    let shapes = [
        (1, 1200),
        (5, 1100),
        (6, 640),
        (11, 990),
        (40, 300),
        (1, 690),
        (2, 0),
    ];
    for dispatch in Dispatch::available() {
        for (window, of_prompt) in [(None, false), (Some(300), false), (None, true), (Some(300), true)] {
            let attention = Attention {
                heads,
                kv_heads: 1,
                head_dim,
                scale: 0.4,
                window,
            };
            let mut runs = Vec::new();
            let mut rows = 0;
            for (sequence, (count, position)) in shapes.into_iter().enumerate() {
                runs.push(Run {
                    sequence,
                    first_row: rows,
                    rows: count,
                    position,
                    of_prompt,
                });
                rows += count;
            }
            let width = heads * head_dim;
            let queries = numbers(&mut StdRng::seed_from_u64(2), rows * width);
            let bits = |threads: usize, runs: &[Run], queries: &[f32]| -> Vec<u32> {
                let compute = Compute {
                    pool: Pool::new(threads).unwrap(),
                    dispatch,
                    rounding: Rounding::Once,
                };
                let mut out = vec![0.0; queries.len()];
                compute.attend(&attention, &cache, runs, (queries, None), &mut out);
                // What is no number may be any of them.
                out.iter()
                    .map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() })
                    .collect()
            };
            let uncut = bits(1, &runs, &queries);
            assert!(uncut.contains(&u32::MAX) && uncut.iter().any(|&x| x != u32::MAX));
            for threads in [2, 3, 8] {
                assert!(
                    bits(threads, &runs, &queries) == uncut,
                    "{threads} threads, {}",
                    dispatch.name()
                );
            }
            for run in &runs {
                let range = run.first_row * width..(run.first_row + run.rows) * width;
                let alone = Run { first_row: 0, ..*run };
                let found = bits(8, &[alone], &queries[range.clone()]);
                assert!(found == uncut[range], "{run:?} alone, {}", dispatch.name());
            }
        }
    }
}

/// A cache of one head: blocks of keys and values.
pub(super) struct Blocks<'a>(pub(super) Vec<(Numbers<'a>, Numbers<'a>)>);

impl Cache for Blocks<'_> {
    fn block(&self, _: usize, block: usize, _: usize) -> (Numbers<'_>, Numbers<'_>) {
        self.0[block]
    }
}

#[test]
fn a_cache_of_8_bits_equals_the_floats_that_it_stands_for() {
    let mut rng = StdRng::seed_from_u64(11);
    for head_dim in [64, 80, 16] {
        let (width, groups, blocks) = (padded(head_dim), head_dim.div_ceil(SCALE_DIMS), 3);
        let size = width * BLOCK_TOKENS;
        let mut small =
            |count: usize| -> Vec<i8> { (0..count).map(|_| rng.random_range(-127..=127)).collect() };
        let (keys, values) = (small(size * blocks), small(size * blocks));
        let scales = numbers(&mut StdRng::seed_from_u64(3), groups * BLOCK_TOKENS * blocks);
        let scale = |block: usize, group: usize, token: usize| {
            let group = group.min(groups - 1);
            scales[(block * groups + group) * BLOCK_TOKENS + token]
        };
        let wide = |from: &[i8], keys: bool| -> Vec<f32> {
            let place = |index: usize| {
                let (block, index) = (index / size, index % size);
                let (d, token) = if keys {
                    (index / BLOCK_TOKENS, index % BLOCK_TOKENS)
                } else {
                    (index % width, index / width)
                };
                scale(block, d / SCALE_DIMS, token)
            };
            from.iter()
                .enumerate()
                .map(|(index, x)| f32::from(*x) * place(index))
                .collect()
        };
        let (wide_keys, wide_values) = (wide(&keys, true), wide(&values, false));
        let range = |block: usize| block * size..(block + 1) * size;
        let scales =
            |block: usize| &scales[block * groups * BLOCK_TOKENS..(block + 1) * groups * BLOCK_TOKENS];
        let of_8_bits = |block| {
            (
                Numbers::Q8(&keys[range(block)], scales(block)),
                Numbers::Q8(&values[range(block)], scales(block)),
            )
        };
        let of_floats = |block| {
            (
                Numbers::F32(&wide_keys[range(block)]),
                Numbers::F32(&wide_values[range(block)]),
            )
        };
        let caches = [
            Blocks((0..blocks).map(of_8_bits).collect()),
            Blocks((0..blocks).map(of_floats).collect()),
        ];
        for (compute, of_prompt) in contexts().flat_map(of_both_kinds) {
            for rows in [1, 7] {
                let attention = Attention {
                    heads: 2,
                    kv_heads: 1,
                    head_dim,
                    scale: 0.01,
                    window: None,
                };
                let run = Run {
                    sequence: 0,
                    first_row: 0,
                    rows,
                    position: 80 - rows,
                    of_prompt,
                };
                let queries = numbers(&mut StdRng::seed_from_u64(5), rows * 2 * head_dim);
                let [small, float] = [&caches[0], &caches[1]].map(|cache| {
                    let mut out = vec![0.0; queries.len()];
                    compute.attend(&attention, cache, &[run], (&queries, None), &mut out);
                    out
                });
                assert_eq!(
                    small,
                    float,
                    "{} {rows} rows of {head_dim}",
                    compute.dispatch.name()
                );
            }
        }
    }
}

/// A cache of floats of one head, whose keys and values are these.
fn of_floats<'a>(keys: &'a [f32], values: &'a [f32], head_dim: usize) -> Blocks<'a> {
    let size = padded(head_dim) * BLOCK_TOKENS;
    let blocks = keys.chunks_exact(size).zip(values.chunks_exact(size));
    Blocks(
        blocks
            .map(|(keys, values)| (Numbers::F32(keys), Numbers::F32(values)))
            .collect(),
    )
}

#[test]
fn queries_that_are_turned_as_they_are_read_are_those_that_were_turned_before() {
    let mut rng = StdRng::seed_from_u64(41);
    let (heads, head_dim, half, blocks) = (3, 20, 9, 10);
    let size = padded(head_dim) * BLOCK_TOKENS * blocks;
    let (keys, values) = (numbers(&mut rng, size), numbers(&mut rng, size));
    let cache = of_floats(&keys, &values, head_dim);
    let attention = Attention {
        heads,
        kv_heads: 1,
        head_dim,
        scale: 0.4,
        window: None,
    };
    // A prompt of two pieces, its follower, and a lone row with more than a stretch before it.
    let runs = |of_prompt| {
        [(0, 20, 30), (20, 3, 0), (23, 1, 300)].map(|(first_row, rows, position)| Run {
            sequence: 0,
            first_row,
            rows,
            position,
            of_prompt,
        })
    };
    let rows = 24;
    let queries = numbers(&mut rng, rows * heads * head_dim);
    let (cos, sin) = (numbers(&mut rng, rows * half), numbers(&mut rng, rows * half));
    let weight = numbers(&mut rng, head_dim);
    let norm = Norm {
        weight: &weight,
        epsilon: 1e-5,
    };
    for (compute, of_prompt) in contexts().flat_map(of_both_kinds) {
        let runs = runs(of_prompt);
        for (norm, halves) in [(None, true), (Some(norm), true), (Some(norm), false)] {
            let turn = Turn {
                norm,
                cos: &cos,
                sin: &sin,
                half,
                halves,
            };
            let mut turned = queries.clone();
            for (row, queries) in turned.chunks_exact_mut(heads * head_dim).enumerate() {
                compute.turn(&turn, row, queries, head_dim);
            }
            let [mut before, mut meanwhile] = [(); 2].map(|()| vec![0.0; queries.len()]);
            compute.attend(&attention, &cache, &runs, (&turned, None), &mut before);
            compute.attend(&attention, &cache, &runs, (&queries, Some(&turn)), &mut meanwhile);
            assert_eq!(before, meanwhile, "{}", compute.dispatch.name());
        }
    }
}

/// A score without end takes all of the weight, or none of it.
#[test]
fn scores_without_end_are_not_those_of_neighbours() {
    let head_dim = 16;
    let size = padded(head_dim) * BLOCK_TOKENS;
    let attention = Attention {
        heads: 1,
        kv_heads: 1,
        head_dim,
        scale: 0.4,
        window: None,
    };
    for endless in [f32::INFINITY, f32::NEG_INFINITY] {
        let (mut keys, values) = (vec![0.5; 9 * size], vec![1.0; 9 * size]);
        // Of token 261, the sixth of the second stretch.
        keys[8 * size + 5] = endless;
        let cache = of_floats(&keys, &values, head_dim);
        for (compute, of_prompt) in contexts().flat_map(of_both_kinds) {
            let run = Run {
                sequence: 0,
                first_row: 0,
                rows: 3,
                position: 259,
                of_prompt,
            };
            let mut out = vec![0.0; 3 * head_dim];
            compute.attend(
                &attention,
                &cache,
                &[run],
                (&vec![1.0; 3 * head_dim], None),
                &mut out,
            );
            let name = compute.dispatch.name();
            let (before, sees) = out.split_at(2 * head_dim);
            let is_one = |x: &f32| (x - 1.0).abs() < 1e-5;
            assert!(before.iter().all(is_one), "{name}: {out:?}");
            if endless > 0.0 {
                assert!(sees.iter().all(|x| x.is_nan()), "{name}: {out:?}");
            } else {
                assert!(sees.iter().all(is_one), "{name}: {out:?}");
            }
        }
    }
}

#[test]
fn a_key_that_is_no_number_is_not_passed_over_where_a_window_shows_no_other_of_its_stretch() {
    let head_dim = 16;
    let size = padded(head_dim) * BLOCK_TOKENS;
    // The last token of the first stretch, and none after it.
    let (mut keys, values) = (vec![0.5; 12 * size], vec![1.0; 12 * size]);
    for d in 0..head_dim {
        keys[7 * size + d * BLOCK_TOKENS + BLOCK_TOKENS - 1] = f32::NAN;
    }
    let cache = of_floats(&keys, &values, head_dim);
    let attention = Attention {
        heads: 1,
        kv_heads: 1,
        head_dim,
        scale: 0.4,
        window: Some(70),
    };
    for (compute, of_prompt) in contexts().flat_map(of_both_kinds) {
        for (position, is_number) in [(255 + 69, false), (255 + 70, true)] {
            for rows in [1, 2] {
                let run = Run {
                    sequence: 0,
                    first_row: 0,
                    rows,
                    position,
                    of_prompt,
                };
                let mut out = vec![0.0; rows * head_dim];
                compute.attend(
                    &attention,
                    &cache,
                    &[run],
                    (&vec![1.0; rows * head_dim], None),
                    &mut out,
                );
                let name = compute.dispatch.name();
                assert!(
                    out[..head_dim].iter().all(|x| x.is_finite() == is_number),
                    "{name}: {out:?}"
                );
                // The next row sees one token less.
                assert!(out[head_dim..].iter().all(|x| *x == 1.0), "{name}: {out:?}");
            }
        }
    }
}

#[test]
fn a_value_that_is_no_number_is_seen_by_later_rows_alone() {
    let head_dim = 48;
    let size = padded(head_dim) * BLOCK_TOKENS;
    let rows = 40;
    for bad in [f32::NAN, f32::INFINITY] {
        let (keys, mut values) = (vec![0.5; 3 * size], vec![1.0; 3 * size]);
        let token = 45;
        values[size + (token - BLOCK_TOKENS) * padded(head_dim) + 20] = bad;
        let cache = of_floats(&keys, &values, head_dim);
        for window in [None, Some(20)] {
            let attention = Attention {
                heads: 1,
                kv_heads: 1,
                head_dim,
                scale: 0.4,
                window,
            };
            for compute in contexts().filter(Compute::units_read_prompts) {
                let run = Run {
                    sequence: 0,
                    first_row: 0,
                    rows,
                    position: 30,
                    of_prompt: true,
                };
                let mut out = vec![0.0; rows * head_dim];
                let queries = vec![1.0; rows * head_dim];
                compute.attend(&attention, &cache, &[run], (&queries, None), &mut out);
                for (row, out) in out.chunks_exact(head_dim).enumerate() {
                    let last = run.position + row;
                    let sees = token <= last && window.is_none_or(|window| token + window > last);
                    assert!(out.iter().all(|x| x.is_nan() == sees), "row {row}: {out:?}");
                    assert!(
                        sees || out.iter().all(|x| (x - 1.0).abs() < 0.01),
                        "row {row}: {out:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_power_of_nothing_is_one() {
    for compute in contexts() {
        let mut out = [0.0; 16];
        let weights = Weights {
            x: &[3.5; 16],
            most: 3.5,
            scale: 1.0,
        };
        compute.dispatch.run(WeightsTo(weights, &mut out));
        assert_eq!(out, [1.0; 16], "{}", compute.dispatch.name());
    }
}
