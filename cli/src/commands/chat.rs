//! `freehold chat`, and the little client of the OpenAI API behind it.

use std::io::{BufRead, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use futures::StreamExt;
use serde_json::{Value, json};

/// Settings of `freehold chat`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Name on the bus; the only one if there is just one
    pub model: Option<String>,
    /// Ask this one question and end
    #[arg(short, long)]
    pub message: Option<String>,
    /// Base address of the gateway
    #[arg(long, env = "FREEHOLD_BASE_URL", default_value = "http://127.0.0.1:11480/v1")]
    pub base_url: String,
    /// API key, where a policy asks for one
    #[arg(long, env = "FREEHOLD_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// What the model shall be
    #[arg(long)]
    pub system: Option<String>,
    /// 0 is the most likely answer, higher is more varied
    #[arg(long)]
    pub temperature: Option<f32>,
    /// Longest answer in tokens
    #[arg(long)]
    pub max_tokens: Option<u32>,
}

/// Talks to a model.
///
/// # Errors
/// When the gateway is not there or refuses.
pub async fn run(arguments: Arguments) -> Result<()> {
    let client = Client::new(&arguments.base_url, arguments.api_key.clone())?;
    let model = match &arguments.model {
        Some(model) => model.clone(),
        None => match client.models().await?.as_slice() {
            [] => bail!("no model is deployed; `freehold apply -f FILE` deploys one"),
            [only] => only.clone(),
            several => bail!("name one of {}", several.join(", ")),
        },
    };
    let mut messages: Vec<Value> = arguments
        .system
        .iter()
        .map(|text| json!({"role": "system", "content": text}))
        .collect();
    let mut options = json!({});
    if let Some(temperature) = arguments.temperature {
        options["temperature"] = json!(temperature);
    }
    if let Some(max_tokens) = arguments.max_tokens {
        options["max_tokens"] = json!(max_tokens);
    }
    if let Some(message) = arguments.message {
        messages.push(json!({"role": "user", "content": message}));
        client.stream(&model, &messages, &options, print_piece).await?;
        println!();
        return Ok(());
    }
    let terminal = std::io::stdin().is_terminal();
    if terminal {
        println!("Talking to {model}. End with Ctrl-D.");
    }
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if terminal {
            print!("\n> ");
            std::io::stdout().flush()?;
        }
        let Some(line) = lines.next().transpose()? else {
            break;
        };
        if line.trim().is_empty() {
            continue;
        }
        messages.push(json!({"role": "user", "content": line}));
        let answer = client.stream(&model, &messages, &options, print_piece).await?;
        println!();
        messages.push(json!({"role": "assistant", "content": answer.text}));
    }
    Ok(())
}

/// Shows a piece of an answer as it comes.
pub fn print_piece(piece: &str) {
    print!("{piece}");
    let _ = std::io::stdout().flush();
}

/// An answer that came as a stream.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// Tokens of the answer.
    pub completion_tokens: u64,
    /// From the request to the first piece.
    pub first_piece: Option<Duration>,
    /// From the request to the end.
    pub duration: Duration,
    /// Why it ended.
    pub finish_reason: String,
}

/// A client of the OpenAI API.
pub struct Client {
    base_url: String,
    api_key: Option<String>,
    http: reqwest::Client,
}

impl Client {
    /// For this gateway.
    ///
    /// # Errors
    /// When the HTTP client cannot be made.
    pub fn new(base_url: &str, api_key: Option<String>) -> Result<Self> {
        // A connection for each question: servers close those that rest, and one that closes just as the
        // next question goes out would fail it (seen with llama-server under `freehold bench`).
        let http = reqwest::Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(0)
            .build()?;
        Ok(Self {
            base_url: base_url.trim_end_matches('/').to_owned(),
            api_key,
            http,
        })
    }

    fn authorized(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match &self.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response> {
        let unreachable = || {
            format!(
                "failed to reach the gateway at {}; is `freehold up` running?",
                self.base_url
            )
        };
        let response = self.authorized(request).send().await.with_context(unreachable)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body: Value = response.json().await.unwrap_or_default();
        let message = body
            .pointer("/error/message")
            .and_then(Value::as_str)
            .unwrap_or("no reason was given");
        Err(anyhow!("the gateway answered {status}: {message}"))
    }

    /// Names on the bus.
    ///
    /// # Errors
    /// When the gateway is not there or refuses.
    pub async fn models(&self) -> Result<Vec<String>> {
        let body: Value = self
            .send(self.http.get(format!("{}/models", self.base_url)))
            .await?
            .json()
            .await?;
        let models = body.get("data").and_then(Value::as_array).into_iter().flatten();
        Ok(models
            .filter_map(|model| model.get("id")?.as_str().map(str::to_owned))
            .collect())
    }

    /// Asks and hands over the answer as it comes.
    ///
    /// # Errors
    /// When the gateway refuses or the stream breaks off.
    pub async fn stream(
        &self,
        model: &str,
        messages: &[Value],
        options: &Value,
        mut piece: impl FnMut(&str),
    ) -> Result<Answer> {
        let mut body = json!({"model": model, "messages": messages, "stream": true, "stream_options": {"include_usage": true}});
        for (key, value) in options.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        let started = Instant::now();
        let response = self
            .send(
                self.http
                    .post(format!("{}/chat/completions", self.base_url))
                    .json(&body),
            )
            .await?;
        let (mut answer, mut pending, mut done) = (Answer::default(), Vec::new(), false);
        let mut stream = response.bytes_stream();
        while let Some(bytes) = stream.next().await {
            pending.extend_from_slice(&bytes.context("the answer broke off")?);
            while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let Some(data) = std::str::from_utf8(&line)?.trim().strip_prefix("data: ") else {
                    continue;
                };
                if data == "[DONE]" {
                    done = true;
                    continue;
                }
                let event: Value =
                    serde_json::from_str(data).context("the gateway sent an event that is no JSON")?;
                if let Some(message) = event.pointer("/error/message").and_then(Value::as_str) {
                    bail!("the answer broke off: {message}");
                }
                if let Some(text) = event
                    .pointer("/choices/0/delta/content")
                    .and_then(Value::as_str)
                    .filter(|text| !text.is_empty())
                {
                    answer.first_piece.get_or_insert_with(|| started.elapsed());
                    answer.text.push_str(text);
                    piece(text);
                }
                if let Some(reason) = event.pointer("/choices/0/finish_reason").and_then(Value::as_str) {
                    reason.clone_into(&mut answer.finish_reason);
                }
                if let Some(tokens) = event.pointer("/usage/completion_tokens").and_then(Value::as_u64) {
                    answer.completion_tokens = tokens;
                }
            }
        }
        if !done {
            bail!("the answer broke off before its end");
        }
        answer.duration = started.elapsed();
        Ok(answer)
    }
}
