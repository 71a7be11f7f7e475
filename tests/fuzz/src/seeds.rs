//! Writes the seeds that are not kept in the repository: small model files, sound and not.
//!
//!     seeds FOLDER       FOLDER/gguf/… and FOLDER/text/…

use std::path::Path;

use freehold_fuzz::targets::sound_models;

fn main() {
    let folder = std::env::args().nth(1).expect("a folder to write to");
    let folder = Path::new(&folder);
    std::fs::create_dir_all(folder.join("gguf")).expect("the folder can be made");
    for (name, file) in sound_models() {
        let bytes = file.bytes();
        std::fs::write(folder.join("gguf").join(name), &bytes).expect("a small file");
        // A header with nothing behind it.
        let head = bytes.len().min(4096);
        std::fs::write(folder.join("gguf").join(format!("{name}-head")), &bytes[..head]).expect("a small file");
    }
}
