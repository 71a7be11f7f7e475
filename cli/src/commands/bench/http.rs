//! The whole path: concurrent chats through a gateway.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use freehold_crds::ModelDeployment;
use kube::Api;
use kube::api::PostParams;
use serde_json::json;

use super::Plan;
use super::numbers::{AnswerTimes, ChatFigures, HttpFigures, chat_figures};
use crate::all_in_one::{AllInOne, Settings};
use crate::commands::chat;

/// Name of the model on the bus of an all-in-one that this command starts.
const NAME: &str = "bench";
/// Tokens that a question, the model's template and an answer fit in, beside the answer itself.
const QUESTION_TOKENS: usize = 256;
/// Answers that a number of chats gives at the least: fewer tell no percentile.
const FEWEST_ANSWERS: usize = 8;
/// A load of some gigabytes from a cold disk fits in this.
const READY_WITHIN: Duration = Duration::from_secs(300);
/// No two questions alike, so that no kept prefix answers for the engine; all ask for a long answer.
const SUBJECTS: [&str; 16] = [
    "a lighthouse keeper",
    "the last train of the night",
    "a gardener who talks to bees",
    "two rivals at chess",
    "a ship in the ice",
    "the baker of a mountain village",
    "an old radio",
    "a cartographer",
    "the first snow",
    "a violin maker",
    "a bridge between two towns",
    "the night watch of a museum",
    "a fox and a farmer",
    "a letter that came too late",
    "a storm at sea",
    "the clock of the town hall",
];

/// Measures a gateway that runs already.
///
/// # Errors
/// When it is not there, has no such model, or an answer breaks off.
pub async fn measure(
    base_url: &str,
    model: &str,
    api_key: Option<String>,
    plan: &Plan,
    mut step: impl FnMut(&str),
) -> Result<HttpFigures> {
    let client = Arc::new(chat::Client::new(base_url, api_key)?);
    let mut chats = Vec::new();
    // Connections, caches and pages: none of them is a first token.
    ask(&client, model, "to begin", 8).await?;
    step("warmed up");
    for &concurrent in &plan.chats {
        chats.push(converse(&client, model, concurrent, plan).await?);
        step("chats");
    }
    Ok(HttpFigures {
        base_url: base_url.to_owned(),
        model: model.to_owned(),
        chats,
    })
}

/// How often `measure` calls its `step`.
#[must_use]
pub fn steps(plan: &Plan) -> usize {
    1 + plan.chats.len()
}

/// Measures an all-in-one that is started for it, in a folder that goes when it ends.
///
/// # Errors
/// When it does not start, the model does not become ready, or an answer breaks off.
pub async fn measure_own(path: &Path, plan: &Plan, step: impl FnMut(&str)) -> Result<HttpFigures> {
    let folder = tempfile::tempdir().context("failed to make a folder for the all-in-one")?;
    let free_port = "127.0.0.1:0".parse()?;
    let settings = Settings {
        data_dir: None,
        listen: free_port,
        api_listen: free_port,
        node_name: Some(NAME.to_owned()),
        memory_limit: None,
    };
    let all = AllInOne::start(&settings, folder.path()).await?;
    let measured = async {
        deploy(&all, path, plan).await?;
        measure(&all.base_url(), NAME, None, plan, step).await
    }
    .await;
    let stopped = all.stop().await;
    let figures = measured?;
    stopped?;
    Ok(figures)
}

async fn deploy(all: &AllInOne, path: &Path, plan: &Plan) -> Result<()> {
    let path = path
        .canonicalize()
        .with_context(|| format!("failed to find {}", path.display()))?;
    let most = plan.chats.iter().copied().max().unwrap_or(1);
    let deployment: ModelDeployment = serde_json::from_value(json!({
        "apiVersion": format!("{}/{}", freehold_crds::GROUP, freehold_crds::VERSION),
        "kind": "ModelDeployment",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"path": path},
            "engine": {
                "contextLength": QUESTION_TOKENS + plan.answer_tokens,
                "concurrency": most,
                "queue": most,
                "threads": plan.threads,
            },
        },
    }))?;
    let deployments: Api<ModelDeployment> = Api::namespaced(all.client(), "default");
    deployments.create(&PostParams::default(), &deployment).await?;
    let begun = Instant::now();
    loop {
        let status = deployments.get(NAME).await?.status.unwrap_or_default();
        let is = |kind: &str| {
            let mut conditions = status.conditions.iter();
            conditions.find(|condition| condition.type_ == kind && condition.status == "True")
        };
        if is("Ready").is_some() {
            return Ok(());
        }
        if let Some(stalled) = is("Stalled") {
            bail!("the model cannot become ready: {}", stalled.message);
        }
        if begun.elapsed() > READY_WITHIN {
            let ready = status
                .conditions
                .iter()
                .find(|condition| condition.type_ == "Ready");
            let told = ready.map_or("no status", |condition| condition.message.as_str());
            bail!(
                "the model is not ready after {} s: {told}",
                READY_WITHIN.as_secs()
            );
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// `concurrent` clients that each ask anew as soon as they are answered.
async fn converse(
    client: &Arc<chat::Client>,
    model: &str,
    concurrent: usize,
    plan: &Plan,
) -> Result<ChatFigures> {
    let answers_wanted = (concurrent * plan.rounds).max(FEWEST_ANSWERS);
    let next = Arc::new(AtomicUsize::new(0));
    let started = Instant::now();
    let clients: Vec<_> = (0..concurrent)
        .map(|_| {
            let (client, model, next) = (Arc::clone(client), model.to_owned(), Arc::clone(&next));
            let answer_tokens = plan.answer_tokens;
            tokio::spawn(async move {
                let mut answers = Vec::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= answers_wanted {
                        return Ok::<_, anyhow::Error>(answers);
                    }
                    let turn = format!("{concurrent}.{number}");
                    answers.push(ask(&client, &model, &turn, answer_tokens).await?);
                }
            })
        })
        .collect();
    let mut answers = Vec::new();
    for client in clients {
        answers.extend(
            client
                .await
                .map_err(|error| anyhow!("a client broke off: {error}"))??,
        );
    }
    Ok(chat_figures(
        concurrent,
        &answers,
        started.elapsed().as_secs_f64(),
    ))
}

async fn ask(client: &chat::Client, model: &str, turn: &str, tokens: usize) -> Result<AnswerTimes> {
    let number: usize = turn.bytes().map(usize::from).sum();
    let subject = SUBJECTS.get(number % SUBJECTS.len()).copied().unwrap_or_default();
    // The turn stands first: questions differ from their first words on.
    let question = format!("Story {turn}. Tell me a very long and detailed story about {subject}.");
    let messages = [json!({"role": "user", "content": question})];
    let options = json!({"temperature": 0, "max_tokens": tokens});
    let answer = client.stream(model, &messages, &options, |_| ()).await?;
    Ok(AnswerTimes {
        tokens: answer.completion_tokens,
        first_seconds: answer.first_piece.map(|first| first.as_secs_f64()),
    })
}
