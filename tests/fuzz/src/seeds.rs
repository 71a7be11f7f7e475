//! Writes the seeds that are not kept in the repository: small model files, sound and not.
//!
//!     seeds FOLDER       FOLDER/gguf/… and FOLDER/text/…

use std::path::Path;

use freehold_fuzz::gguf::{tiny_gemma, tiny_granite, tiny_llama, tiny_phi3, tiny_qwen2, tiny_qwen3};

fn main() {
    let folder = std::env::args().nth(1).expect("a folder to write to");
    let folder = Path::new(&folder);
    std::fs::create_dir_all(folder.join("gguf")).expect("the folder can be made");
    let sound = [
        ("llama", tiny_llama()),
        ("gemma", tiny_gemma()),
        ("qwen2", tiny_qwen2()),
        ("qwen3", tiny_qwen3()),
        ("phi3", tiny_phi3()),
        ("granite", tiny_granite()),
    ];
    for (name, file) in sound {
        let bytes = file.bytes();
        std::fs::write(folder.join("gguf").join(name), &bytes).expect("a small file");
        // A header with nothing behind it.
        let head = bytes.len().min(4096);
        std::fs::write(folder.join("gguf").join(format!("{name}-head")), &bytes[..head]).expect("a small file");
    }
}
