//! Asking an engine, and waiting for what comes back with a deadline instead of for ever.

use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use freehold_engine::{
    Engine, Finished, GenerateEvent, GenerateRequest, GenerationHandle, Prompt, Reject, SamplingParams,
    Special, TokenLogprob,
};

/// Longer than anything here takes on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(180);

/// A plain request: greedy, with the logprob of each token.
pub fn request(prompt: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        id: "test".into(),
        prompt: Prompt::Tokens(prompt),
        max_tokens: Some(max_tokens),
        max_context: None,
        scope: String::new(),
        constraint: None,
        stop: Vec::new(),
        sampling: SamplingParams {
            logprobs: Some(1),
            ..SamplingParams::default()
        },
    }
}

/// The tokens of a text, with what the model wants at its beginning.
pub fn tokens(engine: &Engine, text: &str) -> Vec<u32> {
    let special = Special {
        add: true,
        parse: false,
    };
    engine.tokenizer().encode(text, special)
}

/// A request that was taken.
pub struct Asked {
    pub handle: GenerationHandle,
    pub events: Receiver<GenerateEvent>,
}

/// All that came of a request.
#[derive(Debug)]
pub struct Answer {
    pub text: String,
    pub tokens: Vec<TokenLogprob>,
    pub finished: Finished,
}

impl Answer {
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.token).collect()
    }
}

/// Hands a request in.
pub fn ask(engine: &Engine, request: GenerateRequest) -> Result<Asked, Reject> {
    let (sender, events) = channel();
    let sink = Box::new(move |event| {
        let _ = sender.send(event);
        ControlFlow::Continue(())
    });
    let handle = engine.generate(request, sink)?;
    Ok(Asked { handle, events })
}

/// Hands a request in and waits for its end.
pub fn answer(engine: &Engine, request: GenerateRequest) -> Answer {
    ask(engine, request).expect("the request is taken").wait()
}

impl Asked {
    /// The next event.
    pub fn next(&self) -> GenerateEvent {
        self.events
            .recv_timeout(DEADLINE)
            .expect("an event comes before the deadline, and every request is told its end")
    }

    /// Waits until it writes.
    pub fn wait_for_text(&self) {
        while !matches!(self.next(), GenerateEvent::Text { .. }) {}
    }

    /// Waits for the end.
    pub fn wait(&self) -> Answer {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        loop {
            match self.next() {
                GenerateEvent::Started { .. } => {}
                GenerateEvent::Text {
                    text: more,
                    tokens: its,
                } => {
                    text.push_str(&more);
                    tokens.extend(its);
                }
                GenerateEvent::Finished(finished) => {
                    return Answer {
                        text,
                        tokens,
                        finished,
                    };
                }
            }
        }
    }
}

/// Waits until something holds.
pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} never came true");
        std::thread::sleep(Duration::from_millis(1));
    }
}
