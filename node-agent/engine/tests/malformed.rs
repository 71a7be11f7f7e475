//! A corpus of files that are no models, or nearly: each is refused within a second, in words that say
//! what is wrong; none brings the process down, takes its memory, or loads as something that it is not.
#![allow(clippy::unwrap_used)] // a test may panic

mod common;

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::ask::{answer, request, tokens};
use common::gguf::{
    ARRAY, F32, FLOAT32, Gguf, Q8_0, STRING, UINT8, list, strings, tiny_gemma, tiny_llama, value,
};
use freehold_engine::inspect::inspect;
use freehold_engine::{Engine, EngineOptions, LoadModel, ModelFacts};
use proptest::prelude::*;
use tempfile::TempDir;

/// What the issue allows.
const LIMIT: Duration = Duration::from_secs(1);
/// Kubernetes keeps 32 KiB of a condition's message; a person reads one line.
const LONGEST_ERROR: usize = 1500;

/// Looks at a file, under the clock.
fn look(path: &Path) -> Result<ModelFacts, String> {
    let mut fastest = Duration::MAX;
    let mut found = inspect(path);
    // The machine may be busy with something else for longer than that; a slow file is slow every time.
    for _ in 0..5 {
        let started = Instant::now();
        found = inspect(path);
        fastest = fastest.min(started.elapsed());
        if fastest < LIMIT {
            break;
        }
    }
    assert!(fastest < LIMIT, "took {fastest:?}: {found:?}");
    found.map_err(|error| {
        let error = error.to_string();
        assert!(
            error.len() < LONGEST_ERROR,
            "{} bytes of error: {error:.200}",
            error.len()
        );
        assert!(
            !error.chars().any(char::is_control),
            "control characters in {error:?}"
        );
        error
    })
}

fn load(path: &Path) -> Result<Engine, LoadModel> {
    let options = EngineOptions {
        context_length: Some(64),
        max_sequences: 1,
        ..EngineOptions::default()
    };
    Engine::load(path, &options, |_| ())
}

/// The reason why a file is refused, which inspecting and loading give alike.
fn refused(file: &Gguf) -> String {
    let folder = TempDir::new().unwrap();
    let path = file.write(folder.path());
    let error = look(&path).expect_err("inspect refuses the file");
    let from_load = load(&path).expect_err("load refuses the file").to_string();
    assert_eq!(error, from_load);
    error
}

#[track_caller]
fn assert_refused(file: &Gguf, words: &[&str]) {
    let error = refused(file);
    for word in words {
        assert!(error.contains(word), "no {word:?} in: {error}");
    }
}

#[test]
fn tiny_models_are_sound_and_answer() {
    for file in [tiny_llama(), tiny_gemma()] {
        let folder = TempDir::new().unwrap();
        let path = file.write(folder.path());
        let facts = look(&path).unwrap();
        assert_eq!(
            (facts.block_count, facts.head_dim, facts.quantization.as_str()),
            (2, 16, "F32")
        );
        let engine = load(&path).unwrap();
        let prompt = tokens(&engine, "hello world");
        assert_eq!(answer(&engine, request(prompt, 3)).tokens.len(), 3);
    }
}

#[test]
fn a_model_cut_at_any_byte_is_refused() {
    for model in [tiny_llama(), tiny_gemma()] {
        let folder = TempDir::new().unwrap();
        let path = model.write(folder.path());
        let (header, bytes) = model.parts();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        // Every byte of the header, and of the data the edges of the tensors.
        let data = (header..bytes.len()).filter(|at| at % 32 < 2 || bytes.len() - at < 64);
        let cuts: Vec<usize> = (0..header).chain(data).collect();
        for &length in cuts.iter().rev() {
            file.set_len(length as u64).unwrap();
            let error = look(&path).expect_err("a cut file is refused");
            assert!(!error.is_empty());
        }
        assert!(look(&path).unwrap_err().contains("truncated or damaged"));
    }
}

/// Writes over a few bytes, looks, loads what is called sound, and puts the bytes back.
struct Patched {
    _folder: TempDir,
    path: PathBuf,
    file: File,
    bytes: Vec<u8>,
    header: usize,
}

impl Patched {
    fn new(model: &Gguf) -> Self {
        let folder = TempDir::new().unwrap();
        let path = model.write(folder.path());
        let (header, bytes) = model.parts();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        Self {
            _folder: folder,
            path,
            file,
            bytes,
            header,
        }
    }

    /// True when the patched file is still called sound.
    fn try_patches(&self, patches: &[(usize, Vec<u8>)]) -> bool {
        for (at, patch) in patches {
            self.file.write_all_at(patch, *at as u64).unwrap();
        }
        let sound = look(&self.path).is_ok();
        // What inspect lets pass, load may refuse for the numbers in it, and never panics on.
        if let Err(error) = load(&self.path) {
            assert!(
                !sound || matches!(error, LoadModel::NotANumber),
                "inspect let pass: {error}"
            );
        }
        for (at, patch) in patches {
            let end = (at + patch.len()).min(self.bytes.len());
            self.file.write_all_at(&self.bytes[*at..end], *at as u64).unwrap();
        }
        self.file.set_len(self.bytes.len() as u64).unwrap();
        sound
    }
}

#[test]
fn extreme_numbers_anywhere_in_the_header_do_no_harm() {
    for model in [tiny_llama(), tiny_gemma()] {
        let patched = Patched::new(&model);
        let mut still_sound = 0;
        for at in 0..patched.header - 8 {
            for number in [0, 1, u64::from(u32::MAX), 1 << 40, u64::MAX] {
                still_sound += usize::from(patched.try_patches(&[(at, number.to_le_bytes().to_vec())]));
            }
        }
        // Texts and scores may be anything; lengths, counts and shapes may not.
        assert!(
            still_sound > 0 && still_sound < patched.header * 4,
            "{still_sound} sound"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_do_no_harm(
        gemma: bool,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..5),
        in_data in prop::option::of((any::<prop::sample::Index>(), any::<[u8; 4]>())),
    ) {
        thread_local! {
            static MODELS: [Patched; 2] = [Patched::new(&tiny_llama()), Patched::new(&tiny_gemma())];
        }
        MODELS.with(|models| {
            let model = &models[usize::from(gemma)];
            let mut patches: Vec<(usize, Vec<u8>)> = flips
                .iter()
                .map(|(at, flip)| (at.index(model.header), *flip))
                .map(|(at, flip)| (at, vec![model.bytes[at] ^ flip]))
                .collect();
            if let Some((at, bytes)) = in_data {
                patches.push((model.header + at.index(model.bytes.len() - model.header - 4), bytes.to_vec()));
            }
            model.try_patches(&patches);
        });
    }

    #[test]
    fn noise_behind_the_magic_is_refused(noise in prop::collection::vec(any::<u8>(), 0..600), version in 2_u32..4) {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("model.gguf");
        // Small counts let the reader come past the first check.
        let bytes = [b"GGUF", &version.to_le_bytes()[..], &1_u64.to_le_bytes(), &2_u64.to_le_bytes(), &noise].concat();
        std::fs::write(&path, bytes).unwrap();
        prop_assert!(look(&path).is_err());
    }
}

#[test]
fn lists_that_would_fill_memory_are_refused() {
    // A hole in a file costs its sender nothing: 64 MiB of zeros are a list of 60 million bytes, which
    // would take eight times that as numbers, and 4 GiB of hole eight times that again.
    for (kind, least_bytes, name) in [(UINT8, 1, "numbers"), (STRING, 8, "empty texts")] {
        let folder = TempDir::new().unwrap();
        let room = 60_u64 << 20;
        let path = tiny_llama()
            .set("x", list(kind, room / least_bytes, &[]))
            .write(folder.path());
        let mut file = OpenOptions::new().write(true).open(&path).unwrap();
        let bytes = tiny_llama().set("x", list(kind, room / least_bytes, &[])).bytes();
        // The directory of tensors follows the list; cut it off, so that only the hole is there.
        let metadata_end = find(&bytes, &(room / least_bytes).to_le_bytes()) + 8;
        file.set_len(metadata_end as u64).unwrap();
        file.seek(SeekFrom::Start(metadata_end as u64 + (64 << 20)))
            .unwrap();
        file.write_all(&[0]).unwrap();
        let error = look(&path).expect_err("the list is refused");
        assert!(error.contains("metadata x"), "{name}: {error}");
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> usize {
    let at = bytes.windows(wanted.len()).position(|window| window == wanted);
    at.expect("the bytes are there")
}

#[test]
fn more_entries_than_any_model_has_are_refused_at_once() {
    let mut many_keys = tiny_llama();
    many_keys
        .metadata
        .extend((0..2_000_000).map(|n| (format!("{n:x}"), value(UINT8, &[0]))));
    let mut many_tensors = tiny_llama();
    let one = common::gguf::Tensor {
        name: String::new(),
        shape: vec![1],
        kind: F32,
        data: Vec::new(),
        offset: Some(0),
    };
    many_tensors
        .tensors
        .extend((0..2_000_000).map(|n| common::gguf::Tensor {
            name: format!("{n:x}"),
            ..one.clone()
        }));
    for (file, words) in [
        (many_keys, "number of metadata entries"),
        (many_tensors, "number of tensors"),
    ] {
        let folder = TempDir::new().unwrap();
        let error = look(&file.write(folder.path())).expect_err("too many entries are refused");
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn what_the_file_says_reaches_nobody_at_length() {
    let endless = "\u{1b}[31mred\nsecond line ".repeat(100_000);
    for key in [
        "general.architecture",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "llama.rope.scaling.type",
    ] {
        assert_refused(&tiny_llama().str(key, &endless), &[key]);
    }
    let mut named = tiny_llama();
    named
        .metadata
        .push((format!("key\n{}", "k".repeat(900)), value(99, &[])));
    assert_refused(&named, &["of type 99"]);
    let mut tensor = tiny_llama();
    tensor.tensors[0].name = format!("\u{1b}[2J{}", "t".repeat(900));
    tensor.tensors[0].kind = 77;
    assert_refused(&tensor, &["number 77"]);
    // Facts go into a status, too.
    let folder = TempDir::new().unwrap();
    let boastful = tiny_llama()
        .str("general.name", &endless)
        .str("general.license", &endless);
    let facts = look(&boastful.write(folder.path())).unwrap();
    assert!(facts.name.unwrap().len() <= 256);
    assert!(facts.licence.unwrap().len() <= 256);
}

#[test]
fn a_missing_key_is_named() {
    let needed = [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
    ];
    for key in needed {
        assert_refused(&tiny_llama().without(key), &[key, "missing"]);
    }
    assert_refused(
        &tiny_gemma().without("tokenizer.ggml.scores"),
        &["tokenizer.ggml.scores", "missing"],
    );
}

#[test]
fn a_key_of_another_type_is_named() {
    for (model, file) in [("llama", tiny_llama()), ("gemma3", tiny_gemma())] {
        for (key, _) in file.metadata.clone() {
            let wrong = if key.starts_with("tokenizer.ggml.") || key.starts_with("general.") {
                value(FLOAT32, &1.5_f32.to_le_bytes())
            } else {
                value(STRING, &[0; 8])
            };
            if key == "tokenizer.chat_template" {
                continue;
            }
            assert_refused(&file.clone().set(&key, wrong), &[&key]);
        }
        assert_refused(
            &file.clone().u32("tokenizer.chat_template", 1),
            &["tokenizer.chat_template"],
        );
        let negative = value(5, &(-1_i32).to_le_bytes());
        let key = format!("{model}.block_count");
        assert_refused(&file.set(&key, negative), &[&key, "-1"]);
    }
}

#[test]
fn sizes_that_fit_nothing_are_refused_by_name() {
    let sizes = [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "rope.dimension_count",
    ];
    for name in sizes {
        let key = format!("llama.{name}");
        for size in [0, u32::MAX] {
            assert_refused(&tiny_llama().u32(&key, size), &[&key]);
        }
    }
    // These fit no tensor of the file.
    for (key, size) in [
        ("embedding_length", 64),
        ("feed_forward_length", 32),
        ("attention.head_count", 4),
    ] {
        assert_refused(&tiny_llama().u32(&format!("llama.{key}"), size), &["tensor"]);
    }
    assert_refused(&tiny_llama().u32("llama.block_count", 3), &["blk.2.", "missing"]);
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert_refused(
            &tiny_llama().f32("llama.rope.freq_base", bad),
            &["llama.rope.freq_base"],
        );
        let key = "llama.attention.layer_norm_rms_epsilon";
        assert_refused(&tiny_llama().f32(key, bad), &[key]);
    }
}

#[test]
fn every_tensor_must_be_there_in_its_shape() {
    for file in [tiny_llama(), tiny_gemma()] {
        for tensor in &file.tensors {
            let name = tensor.name.as_str();
            assert_refused(&file.clone().without_tensor(name), &[name, "missing"]);
            let longer = |tensor: &mut common::gguf::Tensor| {
                *tensor.shape.last_mut().unwrap() += 1;
                tensor
                    .data
                    .resize(tensor.shape.iter().product::<u64>() as usize * 4, 0);
            };
            assert_refused(&file.clone().edit(name, longer), &[]);
        }
    }
}

#[test]
fn tensors_that_lie_are_refused() {
    let name = "blk.0.attn_q.weight";
    let with = |change: &dyn Fn(&mut common::gguf::Tensor)| tiny_llama().edit(name, |tensor| change(tensor));
    let outside = [u64::MAX - 31, u64::MAX / 2 + 1, 1 << 40, 1 << 20];
    for offset in outside {
        assert_refused(
            &with(&|t| t.offset = Some(offset & !31)),
            &[name, "truncated or damaged"],
        );
    }
    assert_refused(&with(&|t| t.offset = Some(4)), &[name, "multiples of 32"]);
    assert_refused(&with(&|t| t.offset = Some(0)), &["may not overlap"]);
    for shape in [
        vec![0, 32],
        vec![u64::MAX, 2],
        vec![1 << 32, 1 << 32],
        vec![1 << 62, 4],
    ] {
        assert_refused(&with(&|t| t.shape.clone_from(&shape)), &[name]);
    }
    for shape in [vec![], vec![32, 1, 1, 1, 32], vec![1; 100]] {
        assert_refused(&with(&|t| t.shape.clone_from(&shape)), &["number of dimensions"]);
    }
    assert_refused(&with(&|t| t.kind = 4), &[name, "number 4"]);
    assert_refused(&with(&|t| t.kind = u32::MAX), &[name]);
    // 34 bytes for 32 numbers: the tensor's own bytes suffice, and their meaning is another.
    assert_refused(
        &with(&|t| (t.shape, t.kind) = (vec![33, 32], Q8_0)),
        &[name, "multiple of 32"],
    );
    assert_refused(
        &with(&|t| t.name = "blk.0.attn_k.weight".into()),
        &["blk.0.attn_k.weight", "twice"],
    );
    // A vector that scales must be of plain numbers.
    let _ = refused_or_sound(&tiny_llama().edit("output_norm.weight", |t| t.kind = 1));
}

/// Either answer is right, as long as inspecting and loading agree.
fn refused_or_sound(file: &Gguf) -> Option<String> {
    let folder = TempDir::new().unwrap();
    let path = file.write(folder.path());
    let error = look(&path).err();
    assert_eq!(load(&path).is_err(), error.is_some(), "{error:?}");
    error
}

#[test]
fn alignments_that_are_none_are_refused() {
    for alignment in [0, 3, 31, 48, 1 << 20, 1 << 31, u32::MAX] {
        assert_refused(
            &tiny_llama().u32("general.alignment", alignment),
            &["general.alignment"],
        );
    }
    let mut wide = tiny_llama().u32("general.alignment", 4096);
    wide.alignment = 4096;
    assert_eq!(refused_or_sound(&wide), None);
}

#[test]
fn lists_in_lists_are_refused_however_deep() {
    let mut nested = list(UINT8, 1, &[0]);
    for _ in 0..100_000 {
        // A list whose only element is the list so far.
        let inner = &nested[4..];
        nested = [
            &ARRAY.to_le_bytes(),
            &ARRAY.to_le_bytes(),
            &1_u64.to_le_bytes()[..],
            inner,
        ]
        .concat();
        if nested.len() > 4096 {
            break;
        }
    }
    assert_refused(&tiny_llama().set("x", nested), &["metadata x", "list of lists"]);
    let itself = list(ARRAY, u64::MAX, &[9; 64]);
    assert_refused(&tiny_llama().set("x", itself), &["metadata x", "list of lists"]);
}

#[test]
fn vocabularies_that_do_not_fit_are_refused() {
    let few = strings(&["a", "b"]);
    assert_refused(
        &tiny_llama().set("tokenizer.ggml.tokens", few),
        &["vocabulary", "2 tokens"],
    );
    assert_refused(
        &tiny_llama().set("tokenizer.ggml.tokens", strings::<&str>(&[])),
        &["0 tokens"],
    );
    for (key, list) in [
        ("tokenizer.ggml.token_type", list(5, 1, &1_u32.to_le_bytes())),
        ("tokenizer.ggml.scores", list(FLOAT32, 1, &1_f32.to_le_bytes())),
    ] {
        assert_refused(&tiny_gemma().set(key, list), &[key, "1 long"]);
    }
    for key in ["bos_token_id", "eos_token_id", "eot_token_id"] {
        let key = format!("tokenizer.ggml.{key}");
        assert_refused(&tiny_llama().u32(&key, 5_000), &[&key, "5000"]);
    }
    assert_refused(
        &tiny_llama().str("tokenizer.ggml.pre", "unheard-of"),
        &["tokenizer.ggml.pre", "unheard-of"],
    );
    assert_refused(
        &tiny_llama().str("tokenizer.ggml.model", "t5"),
        &["tokenizer.ggml.model", "t5"],
    );
    assert_refused(
        &tiny_llama().str("general.architecture", "mamba"),
        &["general.architecture", "mamba"],
    );
    assert_refused(
        &tiny_llama().str("tokenizer.chat_template", "{% for %}"),
        &["tokenizer.chat_template"],
    );
    let deep = "{% if a %}".repeat(200_000);
    assert_refused(
        &tiny_llama().str("tokenizer.chat_template", &deep),
        &["tokenizer.chat_template"],
    );
    let deep = format!("{{{{ {} }}}}", "(".repeat(500_000));
    assert_refused(
        &tiny_llama().str("tokenizer.chat_template", &deep),
        &["tokenizer.chat_template"],
    );
}

#[test]
fn weights_that_are_no_numbers_are_found_at_load() {
    let folder = TempDir::new().unwrap();
    for number in [f32::NAN, f32::INFINITY] {
        let spoil = |t: &mut common::gguf::Tensor| t.data[..4].copy_from_slice(&number.to_le_bytes());
        let path = tiny_llama()
            .edit("blk.1.ffn_down.weight", spoil)
            .write(folder.path());
        look(&path).expect("the structure is sound");
        assert!(matches!(load(&path), Err(LoadModel::NotANumber)));
    }
}

#[test]
fn merges_and_scores_of_any_kind_do_no_harm() {
    let odd = [
        "", " ", "a", "a ", " a", "  ", "a  b", "h e l", "\u{0}", "Ġ Ġ Ġ", "é é",
    ];
    let folder = TempDir::new().unwrap();
    let engine = load(
        &tiny_llama()
            .set("tokenizer.ggml.merges", strings(&odd))
            .write(folder.path()),
    )
    .unwrap();
    assert_eq!(
        engine.tokenizer().decode(&tokens(&engine, "hello  wörld")),
        "hello  wörld"
    );
    let numbers = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0];
    let engine = load(&tiny_gemma().write(folder.path())).unwrap();
    let count = engine.tokenizer().vocab_size();
    let scores: Vec<u8> = (0..count).flat_map(|id| numbers[id % 5].to_le_bytes()).collect();
    let file = tiny_gemma().set("tokenizer.ggml.scores", list(FLOAT32, count as u64, &scores));
    let engine = load(&file.write(folder.path())).unwrap();
    let prompt = tokens(&engine, "hello world hello hellor");
    assert_eq!(engine.tokenizer().decode(&prompt), "hello world hello hellor");
}

#[test]
fn things_that_are_no_files_are_refused() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert!(look(&at("absent.gguf")).unwrap_err().contains("absent.gguf"));
    std::fs::write(at("empty.gguf"), b"").unwrap();
    assert!(look(&at("empty.gguf")).unwrap_err().contains("truncated"));
    std::fs::create_dir(at("folder")).unwrap();
    assert!(look(&at("folder")).unwrap_err().contains("config.json"));
    assert!(look(Path::new("/dev/null")).is_err());
    assert!(look(Path::new("/dev/zero")).is_err());
    std::os::unix::fs::symlink(at("loop"), at("loop")).unwrap();
    assert!(look(&at("loop")).is_err());
    for (start, words) in [
        (&b"PK\x03\x04 a zip, as pickled weights come"[..], "GGUF"),
        (b"\x80\x02}q\x00. a pickle", "GGUF"),
        (b"<!DOCTYPE html><html>not found</html>", "GGUF"),
        (b"version https://git-lfs.example/spec/v1\noid sha256:00", "GGUF"),
        (b"FUGG\0\0\0\x03 big-endian", "GGUF"),
        (b"GGUF\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "little-endian"),
        (b"GGUF\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "version"),
    ] {
        std::fs::write(at("other.gguf"), start).unwrap();
        let error = look(&at("other.gguf")).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_pipe_nobody_writes_to_does_not_hang() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("pipe.gguf");
    let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    let (sender, receiver) = std::sync::mpsc::channel();
    let pipe = path.clone();
    std::thread::spawn(move || sender.send(look(&pipe)));
    let found = receiver.recv_timeout(Duration::from_secs(5));
    if found.is_err() {
        // Let the thread go before the test fails.
        let _ = OpenOptions::new().read(true).write(true).open(&path);
    }
    assert!(found.expect("an answer comes at once").is_err());
}

#[test]
fn real_models_are_looked_at_in_under_a_second() {
    for (name, parameters, kv_bytes) in [
        (common::SMOLLM2, 134_515_008, 2 * 30 * 3 * 64 * 2),
        (common::GEMMA3, 268_098_176, 2 * 18 * 256 * 2),
    ] {
        let facts = look(&common::model(name)).unwrap();
        assert_eq!(facts.parameter_count, parameters);
        assert_eq!(facts.kv_bytes_per_token(freehold_engine::KvType::F16), kv_bytes);
        assert!(facts.weight_bytes <= facts.file_bytes && facts.weight_bytes > facts.file_bytes / 2);
    }
}
