//! Serving generations: the whole answer at once, or a stream of server-sent events.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use freehold_rules::govern::request::Size;
use futures::StreamExt;
use http::{HeaderName, StatusCode, header};
use jiff::Timestamp;
use serde_json::Value;
use std::convert::Infallible;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio_stream::wrappers::ReceiverStream;
use tracing::{info, warn};
use uuid::Uuid;

use super::Unserved;
use super::chat::ChatRequest;
use super::completions::CompletionRequest;
use super::fan_out::FanOut;
use super::parameters::Parameters;
use super::tools::Tools;
use super::wording::{Api, Choice, Usage, Wording};
use crate::bus::revision;
use crate::error::ApiError;
use crate::exchange::{Ask, Exchange};
use crate::worker::{CallWorker, PromptInput, WorkerClient, WorkerEvent};

/// Chunks that wait for a slow client, beyond what the connection holds itself. The worker is read on
/// until they are full; after that the client has the stall limit to take one.
const BUFFERED_CHUNKS: usize = 1024;

/// A chat or completion request as work for a worker.
#[derive(Debug)]
pub(super) struct GenerateJob {
    api: Api,
    model: String,
    prompts: Vec<PromptInput>,
    prompt_bytes: usize,
    parameters: Parameters,
    tools: Tools,
}

impl From<ChatRequest> for GenerateJob {
    fn from(request: ChatRequest) -> Self {
        let ChatRequest {
            model,
            prompt,
            prompt_bytes,
            parameters,
            tools,
        } = request;
        Self {
            api: Api::Chat,
            tools,
            model,
            prompts: vec![prompt],
            prompt_bytes,
            parameters,
        }
    }
}

impl From<CompletionRequest> for GenerateJob {
    fn from(request: CompletionRequest) -> Self {
        let CompletionRequest {
            model,
            prompts,
            prompt_bytes,
            parameters,
        } = request;
        Self {
            api: Api::Completion,
            tools: Tools::default(),
            model,
            prompts,
            prompt_bytes,
            parameters,
        }
    }
}

/// Answers as they grow, and what they cost.
#[derive(Debug, Default)]
struct Tally {
    answers_per_prompt: usize,
    /// Tokens of each prompt; an answer's siblings share it.
    prompts: Vec<u32>,
    /// Tokens of each answer; counted in pieces until the worker tells.
    completions: Vec<u32>,
}

impl Tally {
    fn prompt(&mut self, index: usize, tokens: u32) {
        if let Some(prompt) = self.prompts.get_mut(index / self.answers_per_prompt.max(1)) {
            *prompt = tokens;
        }
    }

    fn usage(&self) -> Usage {
        let sum = |counts: &[u32]| counts.iter().map(|&count| u64::from(count)).sum();
        Usage {
            prompt_tokens: sum(&self.prompts),
            completion_tokens: sum(&self.completions),
        }
    }
}

/// A generation that a worker has begun.
struct Running {
    fan_out: FanOut,
    exchange: Exchange,
    wording: Wording,
    tally: Tally,
    choices: Vec<Choice>,
}

impl GenerateJob {
    pub(super) fn ask(&self) -> Ask<'_> {
        Ask {
            model: &self.model,
            output_tokens: self.parameters.max_tokens,
            prompt_bytes: self.prompt_bytes,
            answers: self.answers(),
            generates: true,
        }
    }

    fn answers(&self) -> u32 {
        let prompts = u32::try_from(self.prompts.len()).unwrap_or(u32::MAX);
        self.parameters.answers.saturating_mul(prompts)
    }

    /// Has a worker answer. Returns once the first event is here, so that what the worker refuses
    /// still gets a status of its own.
    pub(super) async fn serve(
        &self,
        client: WorkerClient,
        exchange: Exchange,
        size: &Size,
        assignment: &str,
    ) -> Result<Response, Unserved> {
        let mut running = self.running(client, exchange, size, assignment);
        let first = match running.fan_out.next().await {
            Ok(Some(first)) => first,
            Ok(None) => {
                let error = ApiError::internal("the worker answered nothing");
                return Err(Unserved::finally(running.exchange, error));
            }
            Err(error) => return Err(Unserved::by_worker(running.exchange, &error)),
        };
        if let Err(error) = running.note(first.0, &first.1) {
            return Err(Unserved::finally(running.exchange, error));
        }
        if self.parameters.stream {
            Ok(running.stream(first))
        } else {
            running.whole(first).await
        }
    }

    fn running(&self, client: WorkerClient, exchange: Exchange, size: &Size, assignment: &str) -> Running {
        let answers = self.parameters.answers as usize;
        let request_id = exchange.request_id();
        let max_tokens = match (self.parameters.max_tokens, self.parameters.usual_max_tokens) {
            (None, Some(usual)) => Some(size.output_tokens.map_or(usual, |cap| cap.min(usual))),
            _ => size.output_tokens,
        };
        let calls: Vec<_> = self
            .prompts
            .iter()
            .enumerate()
            .flat_map(|(index, prompt)| {
                self.parameters.calls(
                    request_id,
                    prompt,
                    exchange.scope(),
                    index * answers,
                    max_tokens,
                    size.context_tokens,
                )
            })
            .collect();
        let prefix = match self.api {
            Api::Chat => "chatcmpl",
            Api::Completion => "cmpl",
        };
        let wording = Wording {
            api: self.api,
            id: format!("{prefix}-{}", Uuid::new_v4().simple()),
            created: Timestamp::now().as_second(),
            model: self.model.clone(),
            fingerprint: revision(assignment).to_owned(),
            logprobs: self.parameters.sampling.logprobs.is_some(),
            include_usage: self.parameters.include_usage,
        };
        Running {
            tally: Tally {
                answers_per_prompt: answers,
                prompts: vec![0; self.prompts.len()],
                completions: vec![0; calls.len()],
            },
            choices: vec![Choice::new(self.tools.parser()); calls.len()],
            fan_out: FanOut::new(client, calls),
            exchange,
            wording,
        }
    }
}

impl Running {
    /// Counts what an event tells.
    fn note(&mut self, index: usize, event: &WorkerEvent) -> Result<(), ApiError> {
        match event {
            WorkerEvent::Started { prompt_tokens } => {
                self.tally.prompt(index, *prompt_tokens);
                self.exchange.prompt_read(*prompt_tokens)?;
            }
            WorkerEvent::Text { tokens, .. } => {
                self.exchange.piece();
                let count = u32::try_from(tokens.len()).unwrap_or(u32::MAX).max(1);
                if let Some(completion) = self.tally.completions.get_mut(index) {
                    *completion = completion.saturating_add(count);
                }
            }
            WorkerEvent::Finished {
                prompt_tokens,
                completion_tokens,
                ..
            } => {
                self.tally.prompt(index, *prompt_tokens);
                if let Some(completion) = self.tally.completions.get_mut(index) {
                    *completion = *completion_tokens;
                }
            }
            WorkerEvent::Failed { message } => {
                warn!(
                    request = self.exchange.request_id(),
                    "A worker failed in the middle of an answer"
                );
                return Err(ApiError::internal(message.clone()));
            }
        }
        let usage = self.tally.usage();
        self.exchange.used(usage.prompt_tokens, usage.completion_tokens);
        Ok(())
    }

    /// Collects the answer.
    async fn whole(mut self, first: (usize, WorkerEvent)) -> Result<Response, Unserved> {
        let mut next = Some(first);
        while let Some((index, event)) = next {
            if let Some(choice) = self.choices.get_mut(index) {
                match event {
                    WorkerEvent::Text { text, tokens } => {
                        choice.tokens.extend(tokens);
                        choice.add(&text);
                    }
                    WorkerEvent::Finished { reason, .. } => choice.end(reason),
                    WorkerEvent::Started { .. } | WorkerEvent::Failed { .. } => {}
                }
            }
            next = match self.fan_out.next().await {
                Ok(next) => next,
                Err(error) => return Err(Unserved::by_worker(self.exchange, &error)),
            };
            if let Some((index, event)) = &next
                && let Err(error) = self.note(*index, event)
            {
                return Err(Unserved::finally(self.exchange, error));
            }
        }
        let answer = self.wording.whole(&self.choices, self.tally.usage());
        self.exchange.end(StatusCode::OK.as_u16());
        // The record is closed before the client has its answer.
        drop(self.exchange);
        Ok(Json(answer).into_response())
    }

    /// Answers with a stream that a task of its own feeds: the worker never waits for the client.
    fn stream(self, first: (usize, WorkerEvent)) -> Response {
        let (sender, receiver) = mpsc::channel(BUFFERED_CHUNKS);
        tokio::spawn(pump(self, first, sender));
        let body = Body::from_stream(ReceiverStream::new(receiver).map(Ok::<_, Infallible>));
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
            (header::CACHE_CONTROL, "no-cache"),
            // Reverse proxies that would collect the stream.
            (HeaderName::from_static("x-accel-buffering"), "no"),
        ];
        (headers, body).into_response()
    }
}

/// Why a stream ends before its end.
enum Broken {
    /// The client is gone.
    Left,
    /// The client takes nothing.
    Stalled,
    /// The answer cannot go on; the client is told.
    Failed(ApiError),
}

async fn pump(mut running: Running, first: (usize, WorkerEvent), sender: mpsc::Sender<Bytes>) {
    let sink = Sink {
        limit: running.exchange.gateway().inner.options.write_stall_limit,
        sender,
    };
    let result = tokio::select! {
        // Dropping it drops nothing that is still wanted: the request ends here either way.
        result = feed(&mut running, first, &sink) => result,
        () = sink.sender.closed() => Err(Broken::Left),
    };
    let Running {
        fan_out,
        mut exchange,
        wording: _,
        tally: _,
        choices: _,
    } = running;
    // Closes the connections to the worker: slots that are still busy become free now.
    drop(fan_out);
    let last = match result {
        Ok(()) => {
            exchange.end(StatusCode::OK.as_u16());
            Some(Bytes::from_static(b"data: [DONE]\n\n"))
        }
        Err(Broken::Left) => None,
        Err(Broken::Stalled) => {
            info!(
                request = exchange.request_id(),
                "Cut off a client that takes nothing of its answer"
            );
            exchange.stalled();
            None
        }
        Err(Broken::Failed(error)) => {
            let error = error.in_terms_of(exchange.endpoint());
            exchange.fail(&error);
            Some(event_of(&error.body()))
        }
    };
    drop(exchange);
    if let Some(last) = last {
        // The client may have left by now; there is nobody else to tell.
        let _ = sink.send(last).await;
    }
}

/// Sends the events of a running generation, all but the end of the stream.
async fn feed(running: &mut Running, first: (usize, WorkerEvent), sink: &Sink) -> Result<(), Broken> {
    for index in 0..running.choices.len() {
        if let Some(opening) = running.wording.opening(index) {
            sink.send(event_of(&opening)).await?;
        }
    }
    let mut next = Some(first);
    while let Some((index, event)) = next {
        let chunks = match (event, running.choices.get_mut(index)) {
            (WorkerEvent::Text { text, tokens }, Some(choice)) => {
                running.wording.pieces(index, choice, text, tokens)
            }
            (WorkerEvent::Finished { reason, .. }, Some(choice)) => {
                running.wording.ending(index, choice, reason)
            }
            _ => Vec::new(),
        };
        for chunk in chunks {
            sink.send(event_of(&chunk)).await?;
        }
        next = running.fan_out.next().await.map_err(|error| {
            if !matches!(error, CallWorker::Refused(_)) {
                warn!(request = running.exchange.request_id(), %error, "Lost a worker in the middle of an answer");
            }
            Broken::Failed(ApiError::from_worker(&error))
        })?;
        if let Some((index, event)) = &next {
            running.note(*index, event).map_err(Broken::Failed)?;
        }
    }
    if let Some(usage) = running.wording.usage(running.tally.usage()) {
        sink.send(event_of(&usage)).await?;
    }
    Ok(())
}

/// The way to the client.
struct Sink {
    sender: mpsc::Sender<Bytes>,
    limit: Duration,
}

impl Sink {
    async fn send(&self, chunk: Bytes) -> Result<(), Broken> {
        match self.sender.send_timeout(chunk, self.limit).await {
            Ok(()) => Ok(()),
            Err(SendTimeoutError::Timeout(_)) => Err(Broken::Stalled),
            Err(SendTimeoutError::Closed(_)) => Err(Broken::Left),
        }
    }
}

fn event_of(value: &Value) -> Bytes {
    // JSON in one line, so one `data` field; numbers and strings only, so this does not fail.
    let mut event = b"data: ".to_vec();
    event.extend(serde_json::to_vec(value).unwrap_or_default());
    event.extend_from_slice(b"\n\n");
    Bytes::from(event)
}
