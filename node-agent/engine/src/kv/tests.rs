use super::*;
use crate::kernels::attention::padded;

const SHAPE: KvShape = KvShape {
    layers: 2,
    kv_heads: 2,
    head_dim: 4,
};

/// Keys and values of a head in a block, as floats.
fn numbers(cache: &KvCache, table: &BlockTable, layer: usize, block: usize, head: usize) -> [Vec<f32>; 2] {
    let tables = [table];
    let layer = LayerCache {
        cache,
        tables: &tables,
        layer,
    };
    let (keys, values) = layer.block(0, block, head);
    let columns = |index: usize| index % BLOCK_TOKENS;
    let rows = |index: usize| index / padded(4);
    [widened(keys, &columns), widened(values, &rows)]
}

fn widened(numbers: Numbers<'_>, token: &dyn Fn(usize) -> usize) -> Vec<f32> {
    match numbers {
        Numbers::F16(x) => x.iter().map(|x| x.to_f32()).collect(),
        Numbers::F32(x) => x.to_vec(),
        Numbers::Q8(x, scales) => x
            .iter()
            .enumerate()
            .map(|(index, x)| f32::from(*x) * scales[token(index)])
            .collect(),
    }
}

/// Writes rows, both as keys and as values.
fn write<'a>(
    cache: &mut KvCache,
    pool: &Pool,
    layer: usize,
    places: impl Iterator<Item = (&'a BlockTable, usize)>,
    rows: &[f32],
) {
    cache.write(pool, layer, places, (&mut rows.to_vec(), rows), |_, _| ());
}

fn fill(cache: &mut KvCache, table: &BlockTable, from: usize, to: usize) {
    // As many at once as a prompt may have, on more threads than one.
    let rows: Vec<f32> = (from * 8..to * 8).map(|number| number as f32).collect();
    for layer in 0..2 {
        let places = (from..to).map(|position| (table, position));
        write(cache, &Pool::new(2).unwrap(), layer, places, &rows);
    }
}

fn write_one(cache: &mut KvCache, table: &BlockTable, layer: usize, position: usize, number: f32) {
    let place = std::iter::once((table, position));
    write(cache, &Pool::new(1).unwrap(), layer, place, &[number; 8]);
}

fn text(count: usize) -> Vec<u32> {
    (0..count as u32).collect()
}

#[test]
fn what_is_written_is_read_at_its_place() {
    for kv_type in [KvType::F16, KvType::F32, KvType::Q8] {
        let mut cache = KvCache::new(SHAPE, kv_type, 4, 0);
        let mut table = BlockTable::default();
        assert!(cache.reserve(&mut table, 40));
        fill(&mut cache, &table, 0, 40);
        let [keys, values] = numbers(&cache, &table, 1, 1, 1);
        let near = |found: &[f32], wanted: &[f32]| {
            for (found, wanted) in found.iter().zip(wanted) {
                assert!(
                    (found - wanted).abs() <= wanted / 250.0,
                    "{found} {wanted} {kv_type:?}"
                );
            }
        };
        near(&values[..4], &[260.0, 261.0, 262.0, 263.0]);
        near(&values[padded(4)..][..4], &[268.0, 269.0, 270.0, 271.0]);
        near(&keys[..2], &[260.0, 268.0]);
        near(&keys[BLOCK_TOKENS..][..2], &[261.0, 269.0]);
    }
}

#[test]
fn keys_of_many_dimensions_lie_in_their_columns() {
    let shape = KvShape {
        head_dim: 40,
        ..SHAPE
    };
    let mut cache = KvCache::new(shape, KvType::F16, 1, 0);
    let mut table = BlockTable::default();
    assert!(cache.reserve(&mut table, 8));
    let row: Vec<f32> = (0..80).map(|number| number as f32).collect();
    let place = std::iter::once((&table, 7));
    write(&mut cache, &Pool::new(1).unwrap(), 1, place, &row);
    let [keys, values] = numbers(&cache, &table, 1, 0, 1);
    let column: Vec<f32> = (0..40).map(|d| keys[d * BLOCK_TOKENS + 7]).collect();
    assert_eq!(column, row[40..]);
    assert_eq!(values[7 * padded(40)..][..40], row[40..]);
}

#[test]
fn keys_are_prepared_before_they_are_written_each_once() {
    let mut cache = KvCache::new(SHAPE, KvType::F32, 2, 0);
    let mut table = BlockTable::default();
    assert!(cache.reserve(&mut table, 40));
    let mut keys = vec![1.0; 8 * 8];
    let places = (28..36).map(|position| (&table, position));
    let pool = Pool::new(2).unwrap();
    cache.write(&pool, 1, places, (&mut keys, &[5.0; 8 * 8]), |row, key| {
        key.iter_mut().for_each(|x| *x += row as f32);
    });
    for row in 0..8 {
        let (block, token) = ((28 + row) / BLOCK_TOKENS, (28 + row) % BLOCK_TOKENS);
        let [keys, values] = numbers(&cache, &table, 1, block, 1);
        assert_eq!((keys[token], values[token * padded(4)]), (1.0 + row as f32, 5.0));
    }
}

#[test]
fn blocks_are_back_in_their_places_after_a_write_that_failed() {
    for threads in [1, 2] {
        let mut cache = KvCache::new(SHAPE, KvType::F16, 2, 0);
        let mut table = BlockTable::default();
        assert!(cache.reserve(&mut table, 40));
        fill(&mut cache, &table, 0, 40);
        let pool = Pool::new(threads).unwrap();
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let places = (30..40).map(|position| (&table, position));
            cache.write(&pool, 0, places, (&mut [0.0; 80], &[0.0; 80]), |row, _| {
                assert!(row < 5, "row 5");
            });
        }));
        assert!(failed.is_err());
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // Numbers of nine rows are not there.
            let places = (30..40).map(|position| (&table, position));
            write(&mut cache, &pool, 0, places, &[0.0; 8]);
        }));
        assert!(failed.is_err());
        let [keys, _] = numbers(&cache, &table, 1, 1, 1);
        assert_eq!(keys[..2], [260.0, 268.0]);
    }
}

#[test]
fn what_sequences_write_together_is_what_each_writes_alone() {
    let mut cache = KvCache::new(SHAPE, KvType::F16, 8, 0);
    let (mut together, mut alone) = (
        [BlockTable::default(), BlockTable::default()],
        [BlockTable::default(), BlockTable::default()],
    );
    for table in together.iter_mut().chain(&mut alone) {
        assert!(cache.reserve(table, 40));
    }
    // Of the first its last tokens, across two blocks; of the second its first.
    let parts = [(0, 30..38), (1, 0..3)];
    let rows: Vec<f32> = (0..11 * 8).map(|number| number as f32).collect();
    for layer in 0..2 {
        let places = parts.iter().flat_map(|(sequence, positions)| {
            positions.clone().map(|position| (&together[*sequence], position))
        });
        write(&mut cache, &Pool::new(3).unwrap(), layer, places, &rows);
        let mut first = 0;
        for (sequence, positions) in parts.clone() {
            for position in positions {
                let (row, place) = (
                    &rows[first..first + 8],
                    std::iter::once((&alone[sequence], position)),
                );
                write(&mut cache, &Pool::new(1).unwrap(), layer, place, row);
                first += 8;
            }
        }
    }
    for (sequence, block) in [(0, 0), (0, 1), (1, 0)] {
        for (layer, head) in [(0, 0), (1, 1)] {
            assert_eq!(
                numbers(&cache, &together[sequence], layer, block, head),
                numbers(&cache, &alone[sequence], layer, block, head)
            );
        }
    }
    assert!(numbers(&cache, &together[0], 1, 1, 1)[0].iter().any(|x| *x > 0.0));
}

#[test]
fn a_full_cache_gives_nothing_and_gets_everything_back() {
    let mut cache = KvCache::new(SHAPE, KvType::F16, 3, 3);
    let (mut a, mut b) = (BlockTable::default(), BlockTable::default());
    assert!(cache.reserve(&mut a, 64));
    assert!(!cache.reserve(&mut b, 33));
    assert_eq!(cache.available_blocks(), 1);
    cache.release(&mut a);
    assert_eq!(cache.available_blocks(), 3);
    assert!(cache.reserve(&mut b, 96));
}

#[test]
fn a_prefix_is_shared_and_its_last_part_copied() {
    let mut cache = KvCache::new(SHAPE, KvType::F16, 8, 8);
    let mut first = BlockTable::default();
    let tokens = text(50);
    assert!(cache.reserve(&mut first, 50));
    fill(&mut cache, &first, 0, 50);
    cache.publish(&mut first, &tokens);
    let mut second = BlockTable::default();
    assert_eq!(cache.attach(&mut second, &tokens), 49);
    assert_eq!(second.blocks[0], first.blocks[0]);
    assert_ne!(second.blocks[1], first.blocks[1]);
    assert_eq!(cache.used_blocks(), 3);
    assert_eq!(
        numbers(&cache, &second, 1, 1, 1),
        numbers(&cache, &first, 1, 1, 1)
    );
    // Each goes on in a block of its own.
    write_one(&mut cache, &second, 1, 49, 9.0);
    assert_ne!(
        numbers(&cache, &second, 1, 1, 1),
        numbers(&cache, &first, 1, 1, 1)
    );
    cache.release(&mut first);
    cache.release(&mut second);
    assert_eq!(cache.used_blocks(), 0);
    assert_eq!(cache.known_prefix(0, &tokens), 49);
    assert_eq!(cache.known_prefix(1, &tokens), 0);
}

#[test]
fn the_last_token_is_always_computed() {
    let mut cache = KvCache::new(SHAPE, KvType::F16, 4, 4);
    let mut first = BlockTable::default();
    let tokens = text(64);
    assert!(cache.reserve(&mut first, 64));
    fill(&mut cache, &first, 0, 64);
    cache.publish(&mut first, &tokens);
    let mut second = BlockTable::default();
    assert_eq!(cache.attach(&mut second, &tokens), 63);
    // Writing its key must not meet a block that the first one uses.
    write_one(&mut cache, &second, 0, 63, 1.0);
}

#[test]
fn two_that_computed_the_same_keep_one() {
    let mut cache = KvCache::new(SHAPE, KvType::F16, 4, 4);
    let tokens = text(32);
    let mut tables = [BlockTable::default(), BlockTable::default()];
    for table in &mut tables {
        assert!(cache.reserve(table, 33));
        fill(&mut cache, table, 0, 32);
    }
    assert_eq!(cache.used_blocks(), 4);
    for table in &mut tables {
        cache.publish(table, &tokens);
    }
    assert_eq!(tables[0].blocks[0], tables[1].blocks[0]);
    assert_eq!(cache.used_blocks(), 3);
    tables.iter_mut().for_each(|table| cache.release(table));
    assert_eq!(cache.used_blocks(), 0);
    assert_eq!(cache.available_blocks(), 4);
}

#[test]
fn what_is_kept_is_bounded_and_gives_way_to_what_is_needed() {
    let mut cache = KvCache::new(SHAPE, KvType::F16, 4, 2);
    let mut table = BlockTable::default();
    let tokens = text(96);
    assert!(cache.reserve(&mut table, 96));
    fill(&mut cache, &table, 0, 96);
    cache.publish(&mut table, &tokens);
    cache.release(&mut table);
    // Leaves went first: the beginning is still known.
    assert_eq!(cache.known_prefix(0, &tokens), 64);
    assert!(cache.reserve(&mut table, 128));
    assert_eq!(cache.known_prefix(0, &tokens), 0);
    cache.release(&mut table);
    cache.trim();
    assert!(cache.blocks.iter().all(Option::is_none));
}
