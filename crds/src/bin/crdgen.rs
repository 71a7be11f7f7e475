//! Writes the CustomResourceDefinitions as YAML, or checks that what is there is what would be written.
//!
//! `crdgen [--check] DIR`: one file a kind. With `--check` nothing is written and a difference ends with 1.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let check = arguments
        .iter()
        .position(|a| a == "--check")
        .map(|at| arguments.remove(at))
        .is_some();
    let [directory] = arguments.as_slice() else {
        eprintln!("usage: crdgen [--check] DIR");
        return ExitCode::from(2);
    };
    match run(&PathBuf::from(directory), check) {
        Ok(stale) if stale.is_empty() => ExitCode::SUCCESS,
        Ok(stale) => {
            eprintln!(
                "out of date: {}; run `just crds` and commit the result",
                stale.join(", ")
            );
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("crdgen: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The names of the files that differ from what the types say; without `check` they are written.
fn run(directory: &std::path::Path, check: bool) -> Result<Vec<String>, Box<dyn std::error::Error>> {
    let mut stale = Vec::new();
    for crd in freehold_crds::all() {
        let name = format!("{}.yaml", crd.spec.names.plural);
        let path = directory.join(&name);
        let text = format!(
            "# Written by crdgen from crds/src; do not edit.\n{}",
            serde_yaml::to_string(&crd)?
        );
        if std::fs::read_to_string(&path).ok().as_deref() != Some(text.as_str()) {
            stale.push(name);
            if !check {
                std::fs::create_dir_all(directory)?;
                std::fs::write(&path, text)?;
            }
        }
    }
    Ok(if check { stale } else { Vec::new() })
}
