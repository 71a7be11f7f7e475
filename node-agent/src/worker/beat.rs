//! What a worker says of itself: lines of JSON on stdout.

use std::io::Write;
use std::time::{Duration, Instant};

use freehold_engine::Engine;
use freehold_gateway::worker::{WorkerBeat, WorkerLine};

use super::serve::Embedding;

/// With work in flight.
const BUSY_EVERY: Duration = Duration::from_secs(1);
/// At rest.
const REST_EVERY: Duration = Duration::from_secs(5);

/// Writes one line. A parent that is gone is noticed on stdin.
pub(super) fn say(line: &WorkerLine) {
    let Ok(mut text) = serde_json::to_vec(line) else {
        return;
    };
    text.push(b'\n');
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(&text).and_then(|()| stdout.flush());
}

/// Beats from a thread of its own: neither a busy engine nor a busy socket holds it up.
pub(super) fn start(engine: Engine, embedding: Embedding) -> std::io::Result<()> {
    let beat = move || {
        let mut last = WorkerBeat::default();
        let mut said: Option<Instant> = None;
        loop {
            let now = read(&engine, &embedding);
            let moved =
                now.steps != last.steps || now.active + now.queued > 0 || last.active + last.queued > 0;
            if moved || said.is_none_or(|said| said.elapsed() >= REST_EVERY) {
                say(&WorkerLine::Beat(now));
                said = Some(Instant::now());
                last = now;
            }
            std::thread::sleep(BUSY_EVERY);
        }
    };
    std::thread::Builder::new()
        .name("beat".to_owned())
        .spawn(beat)
        .map(|_| ())
}

/// The counters now.
pub(super) fn read(engine: &Engine, embedding: &Embedding) -> WorkerBeat {
    let progress = engine.progress();
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    WorkerBeat {
        steps: progress.steps,
        tokens_generated: progress.tokens_generated,
        prompt_tokens: progress.prompt_tokens,
        active: count(progress.active) + embedding.active(),
        queued: count(progress.queued) + embedding.queued(),
        tokens_per_second: progress.tokens_per_second as f32,
        resident_bytes: resident_bytes().unwrap_or(0),
    }
}

/// Resident memory of this process; None where there is no /proc.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace()
        .next()?
        .parse::<u64>()
        .ok()
        .map(|kib| kib * 1024)
}
