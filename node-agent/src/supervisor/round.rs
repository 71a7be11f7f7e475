//! One round of a probe's checks on one worker.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use freehold_crds::health_probe::{Check, InferenceCheck};
use freehold_crds::{Device, Quantity};
use freehold_gateway::worker::{
    CallWorker, EmbedCall, EmbedInput, GenerateCall, PromptInput, SamplingCall, WorkerBeat, WorkerClient,
    WorkerErrorKind, WorkerEvent,
};
use freehold_rules::health::Outcome;
use freehold_rules::plan::memory::mib;
use tokio::sync::watch;

/// What is asked where a check needs a measurement and the probe has no question of its own.
const OWN_QUESTION: &str = "The quick brown fox jumps over the lazy dog. The quick brown";
/// Its answer: long enough to measure the pace, short enough to be cheap.
const OWN_TOKENS: u32 = 16;
/// It has this long.
const OWN_LIMIT: Duration = Duration::from_secs(30);

/// What a round looks at.
pub(super) struct Round {
    /// Names its requests in the worker's log.
    pub(super) name: String,
    pub(super) checks: Vec<Check>,
    pub(super) socket: PathBuf,
    /// `generate` or `embed`.
    pub(super) task: String,
    pub(super) device: Device,
    /// For how long the worker has stood still with work in flight.
    pub(super) stalled_for: Duration,
    pub(super) beat: watch::Receiver<WorkerBeat>,
    pub(super) data_dir: PathBuf,
}

/// An answer, measured.
struct Answer {
    text: String,
    first_token: Duration,
    /// Of this one sequence; None where the answer is too short to tell.
    tokens_per_second: Option<f64>,
}

/// Why there is no answer.
enum NoAnswer {
    Late(Duration),
    /// The worker is full: with work, which says that it lives.
    Busy,
    Broken(String),
}

impl Round {
    /// Runs every check and gives its result by name.
    pub(super) async fn run(self) -> Vec<(String, Outcome)> {
        let mut results = Vec::with_capacity(self.checks.len());
        let mut measured = None;
        // Questions first: pace and latency are measured on them.
        for check in &self.checks {
            if let Some(question) = &check.inference {
                let answer = self.ask(question).await;
                results.push((check.name.clone(), self.judge(question, &answer)));
                if measured.is_none() {
                    measured = answer.ok();
                }
            }
        }
        let needs_measure = |check: &Check| check.tokens_per_second.is_some() || check.latency.is_some();
        if measured.is_none() && self.checks.iter().any(needs_measure) && self.task != "embed" {
            let own = InferenceCheck {
                prompt: OWN_QUESTION.to_owned(),
                max_tokens: OWN_TOKENS,
                ..InferenceCheck::default()
            };
            let own = InferenceCheck {
                timeout_seconds: u32::try_from(OWN_LIMIT.as_secs()).unwrap_or(30),
                ..own
            };
            measured = self.ask(&own).await.ok();
        }
        for check in self.checks.iter().filter(|check| check.inference.is_none()) {
            results.push((check.name.clone(), self.look(check, measured.as_ref())));
        }
        results
    }

    /// Everything but questions.
    fn look(&self, check: &Check, measured: Option<&Answer>) -> Outcome {
        if let Some(progress) = &check.progress {
            let limit = Duration::from_secs(progress.stall_seconds.into());
            if self.stalled_for < limit {
                return Outcome::Pass("work in flight advances".to_owned());
            }
            let limit = progress.stall_seconds;
            return fail(
                format!("no step for more than {limit} s with requests in flight"),
                true,
            );
        }
        if let Some(floor) = &check.tokens_per_second {
            let least = floor.minimum;
            return match measured.and_then(|answer| answer.tokens_per_second) {
                Some(pace) if pace >= least => Outcome::Pass(format!("at least {least} tokens/s")),
                Some(pace) => fail(format!("{pace:.1} tokens/s, the floor is {least}"), false),
                None => Outcome::Unknown("the pace could not be measured".to_owned()),
            };
        }
        if let Some(latency) = &check.latency {
            let most = latency.max_time_to_first_token_ms;
            return match measured.map(|answer| answer.first_token.as_millis()) {
                Some(took) if took <= u128::from(most) => {
                    Outcome::Pass(format!("first token within {most} ms"))
                }
                Some(took) => fail(
                    format!("first token after {took} ms, at most {most} ms are allowed"),
                    false,
                ),
                None => Outcome::Unknown("the time to the first token could not be measured".to_owned()),
            };
        }
        if let Some(device) = &check.device {
            let (expected, found) = (device.expected, self.device);
            return if expected == Device::Auto || expected == found {
                Outcome::Pass(format!("runs on {found:?}"))
            } else {
                fail(format!("runs on {found:?}, expected is {expected:?}"), false)
            };
        }
        if let Some(memory) = &check.memory {
            let resident = self.beat.borrow().resident_bytes;
            return match memory.maximum.bytes() {
                Ok(_) if resident == 0 => Outcome::Unknown("the worker's memory is not known yet".to_owned()),
                Ok(most) if resident <= most => Outcome::Pass(format!("within {}", memory.maximum)),
                Ok(_) => fail(
                    format!(
                        "{} resident, at most {} are allowed",
                        mib(resident),
                        memory.maximum
                    ),
                    true,
                ),
                Err(error) => Outcome::Unknown(error.to_string()),
            };
        }
        if let Some(temperature) = &check.temperature {
            return hot_or_not(
                hottest_celsius(Path::new("/sys/class/thermal")),
                temperature.maximum_celsius,
            );
        }
        if let Some(disk) = &check.disk {
            return disk_has(&self.data_dir, &disk.minimum_free);
        }
        Outcome::Unknown("this version does not know the check".to_owned())
    }

    fn judge(&self, question: &InferenceCheck, answer: &Result<Answer, NoAnswer>) -> Outcome {
        match answer {
            Ok(answer) => expected(question, &answer.text),
            Err(NoAnswer::Busy) => Outcome::Unknown("every slot is taken by other requests".to_owned()),
            Err(NoAnswer::Late(progress)) if progress.is_zero() => fail(
                format!(
                    "no answer within {} s, and no step meanwhile",
                    question.timeout_seconds
                ),
                true,
            ),
            Err(NoAnswer::Late(_)) => {
                let limit = question.timeout_seconds;
                fail(
                    format!("no answer within {limit} s; the worker is slow and moves"),
                    false,
                )
            }
            Err(NoAnswer::Broken(problem)) => fail(problem.clone(), true),
        }
    }

    async fn ask(&self, question: &InferenceCheck) -> Result<Answer, NoAnswer> {
        let limit = Duration::from_secs(question.timeout_seconds.into());
        let steps = self.beat.borrow().steps;
        let asked = async {
            if self.task == "embed" {
                self.embed(question).await
            } else {
                self.generate(question).await
            }
        };
        match tokio::time::timeout(limit, asked).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(CallWorker::Refused(error))) if error.kind == WorkerErrorKind::QueueFull => {
                Err(NoAnswer::Busy)
            }
            Ok(Err(error)) => Err(NoAnswer::Broken(format!("the worker did not answer: {error}"))),
            Err(_) => {
                let moved = self.beat.borrow().steps != steps;
                Err(NoAnswer::Late(if moved { limit } else { Duration::ZERO }))
            }
        }
    }

    async fn embed(&self, question: &InferenceCheck) -> Result<Answer, CallWorker> {
        let started = Instant::now();
        let input = vec![EmbedInput::Text(question.prompt.clone())];
        let reply = WorkerClient::new(&self.socket)
            .embed(&EmbedCall {
                request_id: self.name.clone(),
                input,
            })
            .await?;
        let sound = reply
            .vectors
            .iter()
            .all(|vector| !vector.is_empty() && vector.iter().all(|x| x.is_finite()));
        let text = if sound { "embedded" } else { "not finite" }.to_owned();
        Ok(Answer {
            text,
            first_token: started.elapsed(),
            tokens_per_second: None,
        })
    }

    async fn generate(&self, question: &InferenceCheck) -> Result<Answer, CallWorker> {
        let started = Instant::now();
        let sampling = SamplingCall {
            temperature: Some(0.0),
            ..SamplingCall::default()
        };
        let call = |prompt| GenerateCall {
            request_id: self.name.clone(),
            prompt,
            max_tokens: Some(question.max_tokens),
            max_context: None,
            scope: String::new(),
            stop: Vec::new(),
            echo: false,
            constraint: None,
            sampling: sampling.clone(),
        };
        let messages = serde_json::json!([{"role": "user", "content": question.prompt}]);
        let client = WorkerClient::new(&self.socket);
        // A question is a chat where the model has a template for one, else plain text.
        let chat = client
            .generate(&call(PromptInput::Chat {
                messages,
                tools: None,
            }))
            .await;
        let mut generation = match chat {
            Err(CallWorker::Refused(error)) if error.kind != WorkerErrorKind::QueueFull => {
                client
                    .generate(&call(PromptInput::Text {
                        text: question.prompt.clone(),
                    }))
                    .await?
            }
            other => other?,
        };
        let (mut text, mut first, mut tokens) = (String::new(), None, 0_u32);
        while let Some(event) = generation.next().await? {
            match event {
                WorkerEvent::Started { .. } => {}
                WorkerEvent::Text { text: piece, .. } => {
                    first.get_or_insert_with(Instant::now);
                    text.push_str(&piece);
                }
                WorkerEvent::Finished {
                    completion_tokens, ..
                } => tokens = completion_tokens,
                WorkerEvent::Failed { message } => return Err(CallWorker::Protocol { found: message }),
            }
        }
        let first = first.unwrap_or_else(Instant::now);
        let decoding = first.elapsed().as_secs_f64();
        let pace = (tokens > 1 && decoding > 0.0).then(|| f64::from(tokens - 1) / decoding);
        Ok(Answer {
            text,
            first_token: first.duration_since(started),
            tokens_per_second: pace,
        })
    }
}

fn fail(message: String, may_restart: bool) -> Outcome {
    Outcome::Fail { message, may_restart }
}

/// The answer itself is not told: it may hold what the prompt holds.
fn expected(question: &InferenceCheck, answer: &str) -> Outcome {
    let Some(pattern) = &question.expect else {
        return Outcome::Pass("answered".to_owned());
    };
    match regex::RegexBuilder::new(pattern).size_limit(1 << 20).build() {
        Ok(pattern) if pattern.is_match(answer) => Outcome::Pass("answered as expected".to_owned()),
        Ok(_) => fail(
            format!(
                "the answer ({} characters) does not match {pattern:?}",
                answer.chars().count()
            ),
            true,
        ),
        Err(_) => Outcome::Unknown(format!("{pattern:?} is not a regular expression")),
    }
}

fn hot_or_not(hottest: Option<u32>, most: u32) -> Outcome {
    match hottest {
        None => Outcome::Unknown("this machine shows no temperature".to_owned()),
        Some(found) if found <= most => Outcome::Pass(format!("at most {most} °C")),
        Some(found) => fail(format!("{found} °C, at most {most} °C are allowed"), false),
    }
}

/// The hottest sensor, in whole degrees.
fn hottest_celsius(thermal: &Path) -> Option<u32> {
    let zones = std::fs::read_dir(thermal).ok()?.flatten();
    let milli = zones.filter_map(|zone| {
        let text = std::fs::read_to_string(zone.path().join("temp")).ok()?;
        text.trim().parse::<i64>().ok()
    });
    // Sensors that are switched off report nonsense: what no machine survives is not a temperature.
    let celsius = milli
        .map(|milli| milli / 1000)
        .filter(|celsius| (1..200).contains(celsius))
        .max()?;
    u32::try_from(celsius).ok()
}

fn disk_has(data_dir: &Path, minimum: &Quantity) -> Outcome {
    let Ok(disk) = rustix::fs::statvfs(data_dir) else {
        return Outcome::Unknown("the disk does not tell its size".to_owned());
    };
    let free = disk.f_bavail * disk.f_frsize;
    match minimum.bytes() {
        Ok(least) if free >= least => Outcome::Pass(format!("at least {minimum} free")),
        Ok(_) => fail(format!("{} free, {minimum} must be", mib(free)), false),
        Err(error) => Outcome::Unknown(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(expect: Option<&str>) -> InferenceCheck {
        InferenceCheck {
            expect: expect.map(str::to_owned),
            ..InferenceCheck::default()
        }
    }

    #[test]
    fn answers_are_held_to_the_pattern_and_never_repeated() {
        assert!(matches!(expected(&question(None), "anything"), Outcome::Pass(_)));
        assert!(matches!(
            expected(&question(Some("(?i)paris")), "It is Paris."),
            Outcome::Pass(_)
        ));
        let Outcome::Fail {
            message,
            may_restart: true,
        } = expected(&question(Some("Paris")), "secret")
        else {
            panic!("must fail")
        };
        assert!(!message.contains("secret"), "{message}");
        assert!(matches!(expected(&question(Some("(")), "x"), Outcome::Unknown(_)));
    }

    #[test]
    fn the_hottest_sensible_sensor_counts() {
        let thermal = tempfile::tempdir().expect("a folder");
        assert_eq!(hottest_celsius(thermal.path()), None);
        for (zone, text) in [
            ("a", "41000\n"),
            ("b", "67500\n"),
            ("c", "-274000\n"),
            ("d", "999000"),
            ("e", "x"),
        ] {
            std::fs::create_dir(thermal.path().join(zone)).expect("made");
            std::fs::write(thermal.path().join(zone).join("temp"), text).expect("written");
        }
        assert_eq!(hottest_celsius(thermal.path()), Some(67));
        assert!(matches!(hot_or_not(Some(67), 67), Outcome::Pass(_)));
        assert!(matches!(
            hot_or_not(Some(68), 67),
            Outcome::Fail {
                may_restart: false,
                ..
            }
        ));
    }
}
