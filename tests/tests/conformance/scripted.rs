//! Runs the scripted cases on both servers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use freehold_tests::exchange::{Answer, send};
use freehold_tests::likeness::{Difference, Renamed, differences};
use serde_json::Value;
use tokio::task::JoinSet;

use crate::both::{Both, SUITE};
use crate::script::{Case, Step, files};

/// Cases that run at once: each waits for one of two servers most of the time.
const AT_ONCE: usize = 6;
/// How often a case may be tried before a difference counts.
const ATTEMPTS: usize = 3;

/// What a case found.
pub struct Found {
    title: String,
    pub complaints: Vec<String>,
    reasons: BTreeSet<String>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripted_operations_answer_alike() {
    let both = Arc::new(Both::start().await);
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
    let reasons: BTreeSet<&str> = found
        .iter()
        .flat_map(|f| &f.reasons)
        .map(String::as_str)
        .collect();
    println!(
        "{total} cases, {} differ; reasons in use: {reasons:?}",
        failed.len()
    );
    assert!(failed.is_empty(), "{} of {total} cases differ", failed.len());
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
}

/// Runs a case, and again where it differs: on a machine whose cores are busy elsewhere, the real server's
/// caches lag behind its store by more than a watch of a second waits. What truly differs does so each time.
async fn run_patiently(both: Arc<Both>, number: usize, title: String, case: Case) -> Found {
    let mut found = run_case(Arc::clone(&both), number, title.clone(), case.clone()).await;
    for attempt in 1..ATTEMPTS {
        if found.complaints.is_empty() {
            break;
        }
        println!("tried again: {title}");
        // Namespaces of its own each time.
        let number = number + attempt * 1000;
        found = run_case(Arc::clone(&both), number, title.clone(), case.clone()).await;
    }
    found
}

pub async fn run_case(both: Arc<Both>, number: usize, title: String, case: Case) -> Found {
    let namespace = both.namespace(&number.to_string()).await;
    let start = BTreeMap::from([
        ("ns".to_owned(), namespace),
        ("versiona".to_owned(), String::new()),
        ("versionb".to_owned(), String::new()),
    ]);
    let mut saved = [start.clone(), start];
    let mut renamed = [Renamed::default(), Renamed::default()];
    let mut complaints = Vec::new();
    let mut reasons = BTreeSet::new();
    'steps: for (at, step) in case.steps.iter().enumerate() {
        for round in 1..=step.times.unwrap_or(1) {
            for saved in &mut saved {
                saved.insert("i".to_owned(), round.to_string());
            }
            let (real, embedded) = perform(&both, step, &mut saved).await;
            if step.differs.is_empty() && nulled(step, &real) {
                // From here on the two hold different objects.
                reasons.insert(NULLED.to_owned());
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
        }
    }
    Found {
        title,
        complaints,
        reasons,
    }
}

const NULLED: &str = "A map that an apply empties";

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

fn other_words(difference: &Difference) -> Option<String> {
    let told = difference.at.ends_with("/message");
    let (Some(Value::String(real)), Some(Value::String(_)), true) =
        (&difference.real, &difference.embedded, told)
    else {
        return None;
    };
    let known = WORDS.iter().find(|(words, _)| real.contains(words))?;
    Some(known.1.to_owned())
}

fn reason(step: &Step, difference: &Difference) -> Option<String> {
    if let Some(reason) = other_words(difference) {
        return Some(reason);
    }
    let known = step
        .differs
        .iter()
        .find(|(place, _)| difference.at.starts_with(*place))?;
    Some(known.1.clone())
}

async fn perform(both: &Both, step: &Step, saved: &mut [BTreeMap<String, String>; 2]) -> (Answer, Answer) {
    let requests = [step.request(&saved[0]), step.request(&saved[1])];
    let answers = tokio::join!(send(&both.real, &requests[0]), send(&both.embedded, &requests[1]));
    let (real, embedded) = (answers.0.unwrap(), answers.1.unwrap());
    step.keep(&real, &mut saved[0]);
    step.keep(&embedded, &mut saved[1]);
    (real, embedded)
}
