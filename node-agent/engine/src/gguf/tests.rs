//! A small valid file, and every way to break it.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::read;

/// Writes GGUF files, sound ones and others.
#[derive(Clone, Default)]
pub(crate) struct Writer {
    metadata: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, u64)>,
    data: Vec<u8>,
}

fn text(value: &str) -> Vec<u8> {
    let mut bytes = (value.len() as u64).to_le_bytes().to_vec();
    bytes.extend(value.as_bytes());
    bytes
}

impl Writer {
    pub(crate) fn raw(mut self, key: &str, kind: u32, value: Vec<u8>) -> Self {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend(value);
        self.metadata.push((key.to_owned(), bytes));
        self
    }

    pub(crate) fn str(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, text(value))
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, value.to_le_bytes().to_vec())
    }

    pub(crate) fn strings(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = 8_u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| bytes.extend(text(value)));
        self.raw(key, 9, bytes)
    }

    pub(crate) fn tensor(mut self, name: &str, shape: &[u64], kind: u32, offset: u64) -> Self {
        self.tensors.push((name.to_owned(), shape.to_vec(), kind, offset));
        self
    }

    pub(crate) fn data(mut self, bytes: usize) -> Self {
        self.data = vec![0; bytes];
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            out.extend(text(key));
            out.extend(value);
        }
        for (name, shape, kind, offset) in &self.tensors {
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }
}

fn sound() -> Writer {
    Writer::default()
        .str("general.architecture", "llama")
        .u32("general.alignment", 32)
        .strings("tokenizer.ggml.tokens", &["a", "b", "ab"])
        .tensor("a.weight", &[32, 2], 0, 0)
        .tensor("b.weight", &[32, 4], 8, 256)
        .data(512)
}

/// The error of a broken file, which must come at once.
fn error(bytes: &[u8]) -> String {
    let started = Instant::now();
    let error = read(bytes).expect_err("the file is broken").to_string();
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "took {:?}",
        started.elapsed()
    );
    error
}

#[test]
fn a_sound_file_is_read() {
    let (metadata, tensors) = read(&sound().bytes()).unwrap();
    assert_eq!(metadata.len(), 3);
    assert_eq!(tensors["b.weight"].shape, [4, 32]);
    assert_eq!(tensors["b.weight"].bytes, 4 * 34);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = sound().bytes();
    // The last 120 bytes are padding that no tensor needs.
    let needed = bytes.len() - (512 - 256 - 4 * 34);
    for length in 0..needed {
        error(&bytes[..length]);
    }
    assert!(read(&bytes[..needed]).is_ok());
}

#[test]
fn claims_beyond_the_file_are_refused_at_once() {
    for (at, what) in [
        (8, "the number of tensors"),
        (16, "the number of metadata entries"),
    ] {
        for claim in [u64::MAX, 1 << 40, 1 << 20] {
            let mut bytes = sound().bytes();
            bytes[at..at + 8].copy_from_slice(&claim.to_le_bytes());
            let error = error(&bytes);
            assert!(error.contains(what) && error.contains("has room for"), "{error}");
        }
    }
    let huge_list = [8_u32.to_le_bytes().to_vec(), u64::MAX.to_le_bytes().to_vec()].concat();
    assert!(error(&sound().raw("x", 9, huge_list).bytes()).contains("has room for"));
    let huge_text = u64::MAX.to_le_bytes().to_vec();
    assert!(error(&sound().raw("x", 8, huge_text).bytes()).contains("has room for"));
}

#[test]
fn shapes_that_overflow_are_refused() {
    for shape in [
        &[u64::MAX, 2][..],
        &[1 << 32, 1 << 32],
        &[0, 4],
        &[1 << 20, 1 << 20, 1 << 20, 1 << 20],
    ] {
        let error = error(&sound().tensor("x", shape, 0, 0).bytes());
        assert!(error.contains("the shape of tensor x"), "{error}");
    }
    assert!(error(&sound().tensor("x", &[32, 1, 1, 1, 1], 0, 0).bytes()).contains("number of dimensions"));
    assert!(error(&sound().tensor("x", &[33], 8, 0).bytes()).contains("multiple of 32"));
}

#[test]
fn offsets_outside_the_file_or_over_others_are_refused() {
    assert!(error(&sound().tensor("x", &[32], 0, 1 << 40).bytes()).contains("truncated or damaged"));
    assert!(error(&sound().tensor("x", &[32], 0, u64::MAX - 31).bytes()).contains("truncated or damaged"));
    assert!(error(&sound().tensor("x", &[32], 0, 7).bytes()).contains("multiples of 32"));
    assert!(error(&sound().tensor("x", &[32], 0, 0).bytes()).contains("may not overlap"));
}

#[test]
fn alignments_that_are_none_are_refused() {
    for alignment in [0, 3, 1 << 20] {
        let file = Writer::default()
            .u32("general.alignment", alignment)
            .tensor("a", &[32], 0, 0)
            .data(128);
        assert!(error(&file.bytes()).contains("general.alignment"), "{alignment}");
    }
}

#[test]
fn nested_lists_unknown_types_and_double_names_are_refused() {
    let nested = [
        9_u32.to_le_bytes().to_vec(),
        1_u64.to_le_bytes().to_vec(),
        vec![0; 64],
    ]
    .concat();
    assert!(error(&sound().raw("x", 9, nested).bytes()).contains("a list of lists"));
    assert!(error(&sound().raw("x", 99, vec![0; 8]).bytes()).contains("of type 99"));
    assert!(error(&sound().str("general.architecture", "again").bytes()).contains("there twice"));
    assert!(error(&sound().tensor("a.weight", &[32], 0, 416).data(1024).bytes()).contains("there twice"));
    assert!(error(&sound().tensor("x", &[32], 77, 416).data(1024).bytes()).contains("number 77"));
    assert!(error(b"GGML").contains("the magic"));
    assert!(error(b"GGUF\x01\0\0\0").contains("the version"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    /// Whatever is flipped, reading ends well or with an error; it never panics and never dawdles.
    #[test]
    fn flipped_bytes_never_harm(flips in prop::collection::vec((0_usize..400, any::<u8>()), 1..6)) {
        let mut bytes = sound().bytes();
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        let started = Instant::now();
        let _ = read(&bytes);
        prop_assert!(started.elapsed() < Duration::from_secs(1));
    }
}
