//! What a fuzzer does with its bytes. Each function panics when something is wrong.

use std::path::PathBuf;
use std::sync::OnceLock;

use freehold_engine::gguf::GgufFile;
use freehold_engine::inspect::inspect;
use freehold_engine::{ChatTemplate, Engine, EngineOptions, Special, Tokenizer};
use serde_json::Value;

use crate::gguf::{self, Gguf};

/// Largest file that is loaded whole: threads and tensors take time, which is better spent on more files. The models of
/// [`sound_models`] are below.
const LOADED_BYTES: usize = 192 << 10;

/// A small model of each family, with its name: what the fuzzer of model files begins with.
pub fn sound_models() -> Vec<(&'static str, Gguf)> {
    vec![
        ("llama", gguf::tiny_llama()),
        ("gemma", gguf::tiny_gemma()),
        ("qwen2", gguf::tiny_qwen2()),
        ("qwen3", gguf::tiny_qwen3()),
        ("phi3", gguf::tiny_phi3()),
        ("granite", gguf::tiny_granite()),
    ]
}

/// Writes bytes to a file of this process's own, in memory where the system has such a place.
fn file(data: &[u8]) -> PathBuf {
    let shared = PathBuf::from("/dev/shm");
    let folder = if shared.is_dir() {
        shared
    } else {
        std::env::temp_dir()
    };
    let path = folder.join(format!("freehold-fuzz-{}", std::process::id()));
    std::fs::write(&path, data).expect("there is room for a small file");
    path
}

/// A model file: looked at, taken apart, and loaded if it claims to be sound. Says whether it could be loaded.
pub fn gguf(data: &[u8]) -> bool {
    let path = file(data);
    let looked = inspect(&path);
    if let Ok(file) = GgufFile::open(&path) {
        for name in file.tensors().keys() {
            let _ = file.tensor_bytes(name);
        }
        if let Ok(tokenizer) = Tokenizer::from_gguf(&file) {
            round(&tokenizer, "a b\u{e9}\u{1f600} <s>", false);
        }
        let _ = ChatTemplate::from_gguf(&file, String::new(), String::new());
    }
    if looked.is_err() || data.len() >= LOADED_BYTES {
        return false;
    }
    let options = EngineOptions {
        context_length: Some(32),
        max_sequences: 1,
        threads: Some(1),
        ..EngineOptions::default()
    };
    Engine::load(&path, &options, |_| ()).is_ok()
}

/// A conversation through a template: `template`, a zero byte, `conversation` in JSON.
pub fn template(data: &[u8]) {
    let mut parts = data.splitn(2, |&byte| byte == 0);
    let source = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let conversation = parts.next().unwrap_or_default();
    let conversation: Value = serde_json::from_slice(conversation).unwrap_or_else(|_| {
        serde_json::json!([
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi {{ x }}"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "1"},
        ])
    });
    let tools = serde_json::json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    if let Ok(template) = ChatTemplate::new(source, "<s>".to_owned(), "</s>".to_owned()) {
        for tools in [None, Some(&tools)] {
            let _ = template.render(&conversation, tools, true);
        }
    }
}

/// A text through a tokenizer of each kind; or, behind a first byte of 255, a `tokenizer.json`.
pub fn text(data: &[u8]) {
    if let Some(json) = data.strip_prefix(&[255]) {
        if let Ok(tokenizer) = Tokenizer::from_tokenizer_json(json) {
            round(&tokenizer, "a b\u{e9}\u{1f600} [CLS]", false);
        }
        return;
    }
    static TOKENIZERS: OnceLock<Vec<Tokenizer>> = OnceLock::new();
    let tokenizers = TOKENIZERS.get_or_init(|| {
        let open = |bytes: &[u8]| {
            Tokenizer::from_gguf(&GgufFile::open(&file(bytes)).expect("sound")).expect("sound")
        };
        vec![
            open(&crate::gguf::tiny_llama().bytes()),
            open(&crate::gguf::tiny_gemma().bytes()),
        ]
    });
    let text = String::from_utf8_lossy(data);
    for (tokenizer, whole) in tokenizers.iter().zip([true, false]) {
        round(tokenizer, &text, whole);
    }
}

/// There and back. Where every byte has its word, nothing is lost.
fn round(tokenizer: &Tokenizer, text: &str, whole: bool) {
    for parse in [false, true] {
        let tokens = tokenizer.encode(text, Special { add: false, parse });
        assert!(
            tokens
                .iter()
                .all(|&token| (token as usize) < tokenizer.vocab_size())
        );
        let decoded = tokenizer.decode(&tokens);
        if whole && !parse {
            assert_eq!(decoded, text);
        }
    }
    let _ = tokenizer.encode_guarded(&tokenizer.guard(text), true);
}

/// A request's body, as each of the gateway's endpoints reads it.
pub fn request(data: &[u8]) {
    for refusal in freehold_gateway::read_as_any_request(data) {
        assert!(refusal.len() < 2000, "a refusal of {} bytes", refusal.len());
    }
}
