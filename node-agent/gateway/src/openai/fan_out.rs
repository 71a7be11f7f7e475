//! Several generations for one request: `n` answers, several prompts, or simply one.

use std::collections::VecDeque;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;

use crate::worker::{CallWorker, GenerateCall, Generation, WorkerClient, WorkerErrorKind, WorkerEvent};

/// Most generations of one request at once, so that one client does not take every slot.
const WIDTH: usize = 4;

/// Generations on one worker, their events merged. Dropping it cancels all of them.
pub(crate) struct FanOut {
    client: WorkerClient,
    pending: VecDeque<(usize, Box<GenerateCall>)>,
    active: FuturesUnordered<BoxFuture<'static, Step>>,
    width: usize,
    /// Whether any generation was taken on.
    begun: bool,
}

enum Step {
    Opened(usize, Box<GenerateCall>, Result<Generation, CallWorker>),
    Event(usize, Generation, Result<Option<WorkerEvent>, CallWorker>),
}

impl FanOut {
    pub(crate) fn new(client: WorkerClient, calls: Vec<(usize, GenerateCall)>) -> Self {
        Self {
            client,
            pending: calls
                .into_iter()
                .map(|(index, call)| (index, Box::new(call)))
                .collect(),
            active: FuturesUnordered::new(),
            width: WIDTH,
            begun: false,
        }
    }

    /// The next event of any generation, with its index; `None` when all are complete.
    ///
    /// Cancel safety: safe, what is under way stays in `active`.
    pub(crate) async fn next(&mut self) -> Result<Option<(usize, WorkerEvent)>, CallWorker> {
        loop {
            self.fill();
            match self.active.next().await {
                None => return Ok(None),
                Some(Step::Opened(index, _, Ok(generation))) => {
                    self.begun = true;
                    self.active.push(Box::pin(advance(index, generation)));
                }
                Some(Step::Opened(index, call, Err(error))) => {
                    if !is_queue_full(&error) || !self.begun || self.active.is_empty() {
                        return Err(error);
                    }
                    // The worker is busy, partly with this very request: go on with what it took, and
                    // try the rest as that ends.
                    self.width = self.active.len();
                    self.pending.push_front((index, call));
                }
                Some(Step::Event(_, _, Err(error))) => return Err(error),
                Some(Step::Event(_, _, Ok(None))) => {}
                Some(Step::Event(index, generation, Ok(Some(event)))) => {
                    self.active.push(Box::pin(advance(index, generation)));
                    return Ok(Some((index, event)));
                }
            }
        }
    }

    fn fill(&mut self) {
        while self.active.len() < self.width {
            let Some((index, call)) = self.pending.pop_front() else {
                return;
            };
            let client = self.client.clone();
            self.active.push(Box::pin(async move {
                let opened = client.generate(&call).await;
                Step::Opened(index, call, opened)
            }));
        }
    }
}

async fn advance(index: usize, mut generation: Generation) -> Step {
    let event = generation.next().await;
    Step::Event(index, generation, event)
}

fn is_queue_full(error: &CallWorker) -> bool {
    matches!(error, CallWorker::Refused(refusal) if refusal.kind == WorkerErrorKind::QueueFull)
}
