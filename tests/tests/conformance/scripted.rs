//! Runs the scripted cases on both servers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use freehold_tests::api_server::Storage;
use freehold_tests::exchange::{Answer, send};
use freehold_tests::likeness::{Difference, Renamed, differences};
use freehold_tests::named::is_named;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::both::{Both, SUITE};
use crate::script::{Case, Step, files};

/// Cases that run at once: each waits for one of two servers most of the time.
const AT_ONCE: usize = 6;
/// How often a case may be tried before a difference counts.
const ATTEMPTS: usize = 3;
/// Between the numbers of two attempts at a case: more than there are cases and sequences.
const ANOTHER: usize = 100_000;

/// What a case found.
pub struct Found {
    title: String,
    pub complaints: Vec<String>,
    reasons: BTreeSet<String>,
    /// Those of [`WORDS`] that were met.
    words: BTreeSet<&'static str>,
    /// What the embedded server answered, step by step, so far as it can be compared with what it answers again.
    embedded: Vec<Value>,
    /// It ended early, at [`NULLED`].
    pub cut_short: bool,
    /// Whether all that differs was asked of a cache of the real server.
    of_a_cache: bool,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripted_operations_answer_alike() {
    answer_alike(Both::start().await).await;
}

/// What most clusters at home stand on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripted_operations_answer_alike_over_kine() {
    if is_named() {
        println!("skipped: the named cluster has one storage, which the other test met");
        return;
    }
    answer_alike(Both::start_on(Storage::Kine).await).await;
}

async fn answer_alike(both: Both) {
    let begun = std::time::Instant::now();
    let both = Arc::new(both);
    let only = std::env::var("FREEHOLD_TEST_CASE").unwrap_or_default();
    let mut waiting: Vec<(String, Case)> = Vec::new();
    for (file, cases) in files() {
        let titled = cases
            .into_iter()
            .map(|case| (format!("{file}: {}", case.case), case));
        waiting.extend(titled.filter(|(title, _)| title.contains(&only)));
    }
    let total = waiting.len();
    let mut running = JoinSet::new();
    let mut found = Vec::new();
    let run = async {
        for (number, (title, case)) in waiting.into_iter().enumerate() {
            if running.len() >= AT_ONCE {
                found.extend(running.join_next().await.map(Result::unwrap));
            }
            running.spawn(run_patiently(Arc::clone(&both), number, title, case));
        }
        while let Some(result) = running.join_next().await {
            found.push(result.unwrap());
        }
    };
    tokio::time::timeout(SUITE, run).await.unwrap();
    let failed: Vec<&Found> = found
        .iter()
        .filter(|found| !found.complaints.is_empty())
        .collect();
    for found in &failed {
        println!("== {}\n{}", found.title, found.complaints.join("\n"));
    }
    let met: BTreeSet<&str> = found.iter().flat_map(|f| &f.words).copied().collect();
    let unmet: Vec<&str> = WORDS
        .iter()
        .map(|(words, _)| *words)
        .filter(|words| !met.contains(words))
        .collect();
    let reasons: BTreeSet<&str> = found
        .iter()
        .flat_map(|f| &f.reasons)
        .map(String::as_str)
        .collect();
    println!(
        "{total} cases in {:.0?}, {} differ; reasons in use: {reasons:?}",
        begun.elapsed(),
        failed.len()
    );
    assert!(failed.is_empty(), "{} of {total} cases differ", failed.len());
    assert!(
        unmet.is_empty() || !only.is_empty(),
        "no case meets {unmet:?} in a message that differs: take them away"
    );
}

/// Every reason that a case gives stands in the document, for people to read.
#[test]
fn what_differs_is_explained() {
    let path = freehold_tests::folder().join("../docs/conformance.md");
    let text = std::fs::read_to_string(path).unwrap();
    let headings: BTreeSet<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .map(str::to_owned)
        .collect();
    let steps = files()
        .into_iter()
        .flat_map(|(_, cases)| cases)
        .flat_map(|case| case.steps);
    let words = WORDS.iter().map(|(_, reason)| (*reason).to_owned());
    let given: BTreeSet<String> = steps
        .flat_map(|step| step.differs.into_values())
        .chain(words)
        .collect();
    let unexplained: Vec<_> = given.difference(&headings).collect();
    assert!(
        unexplained.is_empty(),
        "docs/conformance.md has no heading for {unexplained:?}"
    );
    let unmet: Vec<_> = headings.difference(&given).collect();
    assert!(
        unmet.is_empty(),
        "docs/conformance.md explains {unmet:?}, which no case meets: write a case, or take it away"
    );
}

/// Runs a case, and again where it differs and may: on a machine whose cores are busy elsewhere, the real server's
/// caches lag behind its store by more than a watch of a second waits. What truly differs does so each time. Nothing
/// else is tried twice, and the embedded server, which has no caches, must answer alike each time.
pub async fn run_patiently(both: Arc<Both>, number: usize, title: String, case: Case) -> Found {
    let mut found = run_case(Arc::clone(&both), number, title.clone(), case.clone()).await;
    for attempt in 1..ATTEMPTS {
        if found.complaints.is_empty() || !found.of_a_cache {
            break;
        }
        println!("tried again: {title}\n{}", found.complaints.join("\n"));
        // Namespaces of its own each time.
        let number = number + attempt * ANOTHER;
        let again = run_case(Arc::clone(&both), number, title.clone(), case.clone()).await;
        let wavers = first_difference(&found.embedded, &again.embedded);
        found = again;
        if let Some(wavers) = wavers {
            found.complaints.push(format!(
                "  the embedded server answered the same case in two ways:\n    {wavers}"
            ));
            break;
        }
    }
    found
}

/// Where the embedded server's answers to the same steps part.
fn first_difference(before: &[Value], now: &[Value]) -> Option<String> {
    let (before, now) = (Value::from(before.to_vec()), Value::from(now.to_vec()));
    let found = differences(&before, &now).into_iter().next()?;
    let shown = |value: &Option<Value>| value.as_ref().map_or("nothing".to_owned(), Value::to_string);
    Some(format!(
        "{}\n      first: {}\n      then:  {}",
        found.at,
        shown(&found.real),
        shown(&found.embedded)
    ))
}

#[test]
fn a_server_that_wavers_is_told_from_one_that_stays() {
    let answers = |phase: &str| {
        [
            json!({"code": 200, "body": {"status": {"phase": phase}}}),
            json!({"code": 404}),
        ]
    };
    assert_eq!(first_difference(&answers("Good"), &answers("Good")), None);
    let found = first_difference(&answers("Good"), &answers("New")).unwrap();
    assert!(found.starts_with("/0/body/status/phase"), "{found}");
    assert!(first_difference(&answers("Good"), &answers("Good")[..1]).is_some());
}

pub async fn run_case(both: Arc<Both>, number: usize, title: String, case: Case) -> Found {
    let namespace = both.namespace(&number.to_string()).await;
    let mut alone = Renamed::default();
    let mut answered = Vec::new();
    let mut cut_short = false;
    let mut of_a_cache = true;
    let start = BTreeMap::from([
        ("ns".to_owned(), namespace.clone()),
        ("versiona".to_owned(), String::new()),
        ("versionb".to_owned(), String::new()),
    ]);
    let mut saved = [start.clone(), start];
    let mut renamed = [Renamed::default(), Renamed::default()];
    let mut complaints = Vec::new();
    let mut reasons = BTreeSet::new();
    let mut words = BTreeSet::new();
    'steps: for (at, step) in case.steps.iter().enumerate() {
        for round in 1..=step.times.unwrap_or(1) {
            for saved in &mut saved {
                saved.insert("i".to_owned(), round.to_string());
            }
            let so_far = complaints.len();
            let (real, embedded) = perform(&both, step, &mut saved).await;
            let told = alone.comparable(&embedded).to_string();
            answered.push(serde_json::from_str(&told.replace(&namespace, "$ns")).unwrap());
            if step.differs.is_empty() && nulled(step, &real) {
                // From here on the two hold different objects.
                reasons.insert(NULLED.to_owned());
                cut_short = true;
                break 'steps;
            }
            if let Some(code) = step.code().filter(|&code| code != real.code) {
                complaints.push(format!(
                    "  step {}: {}\n    the real server gives {} and not {code}: {}",
                    at + 1,
                    step.action,
                    real.code,
                    real.body
                ));
            }
            let seen = compare(&mut renamed, &real, &embedded);
            let (known, unknown): (Vec<_>, Vec<_>) = seen
                .into_iter()
                .partition(|difference| reason(step, difference).is_some());
            reasons.extend(known.iter().filter_map(|difference| reason(step, difference)));
            words.extend(
                known
                    .iter()
                    .filter_map(|difference| Some(other_words(difference)?.0)),
            );
            for (place, reason) in &step.differs {
                if !known.iter().any(|difference| difference.at.starts_with(place)) {
                    complaints.push(format!(
                        "  step {}: {}\n    {place} is the same now: take `{reason}` away",
                        at + 1,
                        step.action
                    ));
                }
            }
            if !unknown.is_empty() {
                let list: Vec<String> = unknown
                    .iter()
                    .map(|difference| format!("    {difference}"))
                    .collect();
                complaints.push(format!("  step {}: {}\n{}", at + 1, step.action, list.join("\n")));
            }
            of_a_cache &= complaints.len() == so_far || step.asks_a_cache();
        }
    }
    Found {
        title,
        complaints,
        reasons,
        words,
        embedded: answered,
        cut_short,
        of_a_cache,
    }
}

pub const NULLED: &str = "A map that an apply empties";

/// Whether the server laid null where an apply took the last entry away, and then refused what it had made.
fn nulled(step: &Step, real: &Answer) -> bool {
    let message = real
        .body
        .get("message")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let made = ["array", "object"].map(|kind| format!("in body must be of type {kind}: \"null\""));
    step.action.starts_with("APPLY") && real.code == 422 && made.iter().any(|made| message.contains(made))
}

/// Where the codes differ, the bodies do so at every place: then the code and the message tell it all.
fn compare(renamed: &mut [Renamed; 2], real: &Answer, embedded: &Answer) -> Vec<Difference> {
    let brief = |answer: &Answer| {
        let told = answer.body.get("message").unwrap_or(&answer.body);
        Some(Value::from(format!("{} {told}", answer.code)))
    };
    if real.code == embedded.code {
        return differences(&renamed[0].comparable(real), &renamed[1].comparable(embedded));
    }
    vec![Difference {
        at: "/code".to_owned(),
        real: brief(real),
        embedded: brief(embedded),
    }]
}

/// Messages that say the same in other words, by what the real server says.
const WORDS: &[(&str, &str)] = &[
    ("json: ", "Words of the readers"),
    ("json parse error", "Words of the readers"),
    ("unexpected end of JSON input", "Words of the readers"),
    ("YAML", "Words of the readers"),
    ("strconv.", "Words of the readers"),
    ("illegal base64 data", "Words of the readers"),
    ("parsing time ", "Words of the readers"),
    ("unknown conversion", "Words of the readers"),
    ("registered for version", "Words of the readers"),
    ("Object 'Kind' is missing", "Words of the readers"),
    ("415: Unsupported Media Type", "Words of the readers"),
    ("continue key is not valid", "Words of the readers"),
    ("StorageError: ", "Words of the storage"),
    ("Invalid value: \"{", "The order of keys in a quoted object"),
    (
        "the server rejected our request due to an error in our request",
        "Errors that say more",
    ),
];

fn other_words(difference: &Difference) -> Option<(&'static str, &'static str)> {
    let told = difference.at.ends_with("/message");
    let (Some(Value::String(real)), Some(Value::String(_)), true) =
        (&difference.real, &difference.embedded, told)
    else {
        return None;
    };
    WORDS.iter().copied().find(|(words, _)| real.contains(words))
}

fn reason(step: &Step, difference: &Difference) -> Option<String> {
    if let Some((_, reason)) = other_words(difference) {
        return Some(reason.to_owned());
    }
    let known = step
        .differs
        .iter()
        .find(|(place, _)| difference.at.starts_with(*place))?;
    Some(known.1.clone())
}

async fn perform(both: &Both, step: &Step, saved: &mut [BTreeMap<String, String>; 2]) -> (Answer, Answer) {
    tokio::time::sleep(Duration::from_secs_f32(step.pause_seconds)).await;
    let requests = [step.request(&saved[0]), step.request(&saved[1])];
    let answers = tokio::join!(send(&both.real, &requests[0]), send(&both.embedded, &requests[1]));
    let (real, embedded) = (answers.0.unwrap(), answers.1.unwrap());
    step.keep(&real, &mut saved[0]);
    step.keep(&embedded, &mut saved[1]);
    (step.compared(real), step.compared(embedded))
}
