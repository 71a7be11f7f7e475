//! Rows rounded to 8 bits, number by number.

use super::super::rows::{BLOCK, GROUP};
use super::*;

const COLUMNS: usize = 256;

/// Rows whose blocks are what blocks can be at their ends.
fn rows() -> Vec<Vec<f32>> {
    let mut rng = StdRng::seed_from_u64(40);
    let tiny = 3.75e-37_f32;
    let blocks = |block: &dyn Fn(usize) -> f32| (0..COLUMNS).map(|i| block(i % BLOCK)).collect::<Vec<_>>();
    let mut rows = vec![
        numbers(&mut rng, COLUMNS),
        blocks(&|_| 0.0),
        blocks(&|_| -0.0),
        blocks(&|i| if i == 3 { -1e-40 } else { 0.0 }),
        blocks(&|i| if i % 2 == 0 { tiny.next_down() } else { -1e-37 }),
        blocks(&|_| tiny.next_up()),
        // The largest sums, of both signs.
        blocks(&|_| 3.0),
        blocks(&|i| if i < BLOCK / 2 { -3.0 } else { 3.0 }),
        // A half that is below zero, and one that is nothing in all.
        blocks(&|i| match i {
            0..16 => -0.5,
            16 => 1.0,
            17 => -1.0,
            _ => 0.0,
        }),
        blocks(&|i| f32::MAX / (1 + i) as f32),
    ];
    rows.extend((0..GROUP).map(|_| numbers(&mut rng, COLUMNS)));
    rows
}

/// The bits that are kept of a row, in a group or alone: values, scales, corrections.
fn kept(quantized: &QuantizedRows, wanted: usize) -> [Vec<u32>; 3] {
    let mut groups = quantized.groups().iter();
    let group = *groups
        .find(|group| (group.first_row..group.first_row + group.rows).contains(&wanted))
        .unwrap();
    let view = quantized.view(group);
    let of_row = |index: &usize| index % group.rows == wanted - group.first_row;
    let pick = |length: usize| (0..length).filter(of_row).collect::<Vec<_>>();
    let bits = |value: &[i8; 4]| u32::from_ne_bytes(value.map(i8::cast_unsigned));
    [
        pick(view.values.len())
            .iter()
            .map(|&i| bits(&view.values[i]))
            .collect(),
        pick(view.scales.len())
            .iter()
            .map(|&i| view.scales[i].to_bits())
            .collect(),
        pick(view.corrections.len())
            .iter()
            .map(|&i| view.corrections[i].cast_unsigned())
            .collect(),
    ]
}

#[test]
fn a_row_is_rounded_alone_as_among_others_to_the_bit() {
    let mut rng = StdRng::seed_from_u64(41);
    let weight = numbers(&mut rng, COLUMNS);
    let norm = Norm {
        weight: &weight,
        epsilon: 1e-5,
    };
    let (rows, mut in_company) = (rows(), 0);
    // So few rows are one thread's work.
    for compute in contexts().step_by(2) {
        // All corrections that this level makes, of all formats.
        let matrices = QUANTIZED.map(|dtype| {
            let (bytes, _) = weights(&mut rng, dtype, 16, COLUMNS);
            pack(&compute, dtype, &bytes, [16, COLUMNS])
        });
        let matrices: Vec<&Matrix> = matrices.iter().collect();
        let rounded = |x: &[f32], norm| {
            let mut quantized = QuantizedRows::default();
            quantized.set(&compute, x, &matrices, norm, 0);
            quantized
        };
        for norm in [None, Some(norm)] {
            let alone: Vec<_> = rows.iter().map(|x| kept(&rounded(x, norm), 0)).collect();
            for count in 2..=GROUP {
                for first in 0..=rows.len() - count {
                    let together = rounded(&rows[first..first + count].concat(), norm);
                    in_company += together.groups().iter().filter(|group| group.rows > 1).count();
                    for row in 0..count {
                        assert!(
                            kept(&together, row) == alone[first + row],
                            "row {} among {count}, {}",
                            first + row,
                            compute.dispatch.name()
                        );
                    }
                }
            }
        }
    }
    assert!(in_company > 0);
}

#[test]
fn what_is_not_a_number_in_a_row_alone_is_in_its_scales() {
    let mut rng = StdRng::seed_from_u64(42);
    let weight = numbers(&mut rng, COLUMNS);
    let norm = Norm {
        weight: &weight,
        epsilon: 1e-5,
    };
    for compute in contexts().step_by(2) {
        let (bytes, _) = weights(&mut rng, GgmlDType::Q4_1, 16, COLUMNS);
        let matrix = pack(&compute, GgmlDType::Q4_1, &bytes, [16, COLUMNS]);
        for (norm, place) in [(None, 0), (None, 31), (Some(norm), 255), (None, 100)] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = numbers(&mut rng, COLUMNS);
                x[place] = bad;
                let mut quantized = QuantizedRows::default();
                quantized.set(&compute, &x, &[&matrix], norm, 0);
                let view = quantized.view(quantized.groups()[0]);
                assert!(view.scales.iter().all(|scale| scale.is_nan()), "{bad} at {place}");
            }
        }
    }
}
