//! Hours of ordinary disorder in short: random arrivals, lengths, cancels and callers that vanish.
//!
//! Every finished answer must equal its answer alone, no slot may stay taken, and memory must not creep.
//! `FREEHOLD_SOAK_SECONDS` makes it longer than the usual 20 s (`just soak`: 30 minutes); from 5 minutes on
//! the slope of resident memory is judged too. The disorder is the same for the same `FREEHOLD_SOAK_SEED`.
#![allow(clippy::unwrap_used)] // a test may panic
#![cfg(target_os = "linux")]

mod common;

use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use common::ask::{Answer, answer, eventually, request, tokens};
use common::{PROMPTS, SMOLLM2, model};
use freehold_engine::{
    Constraint, Engine, EngineOptions, FinishReason, GenerateEvent, GenerateRequest, GenerationHandle, Reject,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

/// Resident memory may grow by this much in a minute, after the first third of the time.
const SLOPE_LIMIT: f64 = 1024.0 * 1024.0;
/// From here on the slope means something.
const SLOPE_FROM: Duration = Duration::from_secs(300);
/// An answer that has not ended when this many that were asked for after it have is stuck. (One of the longest takes as long as
/// some dozens of the shortest.) The clock does not say: on a machine that is busy otherwise all of them take their time.
const PASSED_LIMIT: usize = 300;
/// Where no answer at all ends for so long, the engine stands still.
const STILL_LIMIT: Duration = Duration::from_secs(300);
const SEQUENCES: u32 = 6;
const QUEUE: u32 = 8;

fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().unwrap())
}

fn resident_bytes() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 4096.0
}

/// Requests of many kinds, among them long prompts that share their beginning.
fn variants(engine: &Engine, rng: &mut StdRng) -> Vec<GenerateRequest> {
    (0..32_usize)
        .map(|index| {
            let words = match index % 4 {
                0 => PROMPTS[index % PROMPTS.len()].to_owned(),
                1 => PROMPTS.join(" "),
                2 => format!("{} {}", PROMPTS.join(" "), PROMPTS[index % PROMPTS.len()]),
                _ => "one two three four ".repeat(1 + index),
            };
            let mut prompt = tokens(engine, &words);
            prompt.truncate(rng.random_range(1..400));
            let mut request = request(prompt, rng.random_range(1..90));
            request.scope = format!("caller {}", index % 3);
            if index % 3 == 1 {
                request.sampling.temperature = 0.9;
                request.sampling.seed = Some(index as u64);
            }
            if index % 5 == 2 {
                request.stop = vec!["\n".to_owned()];
            }
            if index % 8 == 5 {
                request.constraint = Some(Constraint::JsonSchema(json!({
                    "type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 9
                })));
            }
            request
        })
        .collect()
}

/// A request under way and what its caller is going to do.
struct Asked {
    variant: usize,
    handle: Option<GenerationHandle>,
    events: Receiver<GenerateEvent>,
    text: String,
    /// The caller drops its handle then.
    leaves: Option<Instant>,
    /// Answers asked for later that ended before it.
    passed: usize,
}

fn ask(engine: &Engine, variant: usize, request: GenerateRequest, rng: &mut StdRng) -> Result<Asked, Reject> {
    let (sender, events) = channel();
    // One caller in ten stops listening in the middle.
    let mut hears = if rng.random_bool(0.1) {
        rng.random_range(0..20)
    } else {
        u32::MAX
    };
    let sink = Box::new(move |event: GenerateEvent| {
        let _ = sender.send(event);
        hears = hears.saturating_sub(1);
        if hears == 0 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    let handle = engine.generate(request, sink)?;
    let leaves = rng
        .random_bool(0.25)
        .then(|| Instant::now() + Duration::from_millis(rng.random_range(0..800)));
    Ok(Asked {
        variant,
        handle: Some(handle),
        events,
        text: String::new(),
        leaves,
        passed: 0,
    })
}

#[derive(Debug, Default)]
struct Tally {
    finished: u64,
    cancelled: u64,
    refused: u64,
}

impl Asked {
    /// Reads what is there. True when it has ended.
    fn poll(&mut self, alone: &[Answer], tally: &mut Tally) -> bool {
        if self.leaves.is_some_and(|at| Instant::now() >= at) {
            self.handle = None;
        }
        loop {
            match self.events.try_recv() {
                Ok(GenerateEvent::Started { .. }) => {}
                Ok(GenerateEvent::Text { text, .. }) => self.text.push_str(&text),
                Ok(GenerateEvent::Finished(finished)) => {
                    let expected = &alone[self.variant];
                    match finished.reason {
                        FinishReason::Cancelled => {
                            assert!(expected.text.starts_with(&self.text), "request {}", self.variant);
                            tally.cancelled += 1;
                        }
                        reason => {
                            assert_eq!(reason, expected.finished.reason, "request {}", self.variant);
                            assert_eq!(self.text, expected.text, "request {}", self.variant);
                            tally.finished += 1;
                        }
                    }
                    return true;
                }
                Err(TryRecvError::Empty) => return false,
                Err(TryRecvError::Disconnected) => panic!("request {} was never told its end", self.variant),
            }
        }
    }
}

/// Bytes a minute, by least squares.
fn slope(samples: &[(f64, f64)]) -> f64 {
    let count = samples.len() as f64;
    let mean = |pick: fn(&(f64, f64)) -> f64| samples.iter().map(pick).sum::<f64>() / count;
    let (x, y) = (mean(|s| s.0), mean(|s| s.1));
    let above: f64 = samples.iter().map(|s| (s.0 - x) * (s.1 - y)).sum();
    let below: f64 = samples.iter().map(|s| (s.0 - x).powi(2)).sum();
    above / below * 60.0
}

#[test]
fn disorder_changes_no_answer_and_leaves_nothing_behind() {
    let length = Duration::from_secs(setting("FREEHOLD_SOAK_SECONDS", 20));
    let seed = setting("FREEHOLD_SOAK_SEED", 1);
    let mut rng = StdRng::seed_from_u64(seed);
    let load = |kv_tokens| {
        let options = EngineOptions {
            context_length: Some(512),
            max_sequences: SEQUENCES,
            max_queued: QUEUE,
            // Less than all of them may want, so that some are set aside.
            kv_tokens,
            ..EngineOptions::default()
        };
        Engine::load(&model(SMOLLM2), &options, |_| ()).unwrap()
    };
    let engine = load(Some(1024));
    let variants = variants(&engine, &mut rng);
    let alone: Vec<Answer> = {
        let reference = load(None);
        variants
            .iter()
            .map(|request| answer(&reference, request.clone()))
            .collect()
    };
    let (mut asked, mut tally, mut samples) = (Vec::<Asked>::new(), Tally::default(), Vec::new());
    let begun = Instant::now();
    let (mut next, mut sample, mut moved) = (begun, begun, begun);
    while begun.elapsed() < length || !asked.is_empty() {
        let now = Instant::now();
        if now >= next && begun.elapsed() < length {
            // Quiet spells and rushes.
            let rush = begun.elapsed().as_secs() % 20 < 8;
            next = now + Duration::from_millis(rng.random_range(0..if rush { 60 } else { 900 }));
            let variant = rng.random_range(0..variants.len());
            match ask(&engine, variant, variants[variant].clone(), &mut rng) {
                Ok(one) => asked.push(one),
                Err(Reject::QueueFull { .. }) => tally.refused += 1,
                Err(other) => panic!("{other}"),
            }
        }
        // The latest first, so that each sees how many that came after it have ended.
        let mut ended = 0;
        for index in (0..asked.len()).rev() {
            if asked[index].poll(&alone, &mut tally) {
                asked.remove(index);
                ended += 1;
                continue;
            }
            let one = &mut asked[index];
            one.passed += ended;
            assert!(
                one.passed < PASSED_LIMIT,
                "request {} is stuck: {:?}",
                one.variant,
                engine.progress()
            );
        }
        if ended > 0 || asked.is_empty() {
            moved = now;
        }
        assert!(
            moved.elapsed() < STILL_LIMIT,
            "no answer ends: {:?}",
            engine.progress()
        );
        if now >= sample {
            sample = now + length.max(Duration::from_secs(20)) / 600;
            samples.push((begun.elapsed().as_secs_f64(), resident_bytes()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let progress = engine.progress();
    samples.retain(|(seconds, _)| *seconds > length.as_secs_f64() / 3.0);
    let slope = slope(&samples);
    println!(
        "seed {seed}: {tally:?}, {:.1} MiB resident, {:+.3} MiB a minute, {progress:?}",
        resident_bytes() / SLOPE_LIMIT,
        slope / SLOPE_LIMIT
    );
    eventually("everything is given back", || {
        let progress = engine.progress();
        progress.active == 0 && progress.queued == 0 && progress.kv_blocks_used == 0
    });
    assert!(tally.finished > 10 && tally.cancelled > 0, "{tally:?}");
    if length >= SLOPE_FROM {
        assert!(slope < SLOPE_LIMIT, "memory grows by {slope:.0} bytes a minute");
    }
}
