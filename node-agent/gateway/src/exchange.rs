//! One request from its first byte to its last: who asks, what the rules say, and what is left on record.
//!
//! [`Intake`] is a request that is not admitted yet; [`Intake::admit`] turns it into an [`Exchange`],
//! which holds everything that the request takes (its audit record, its share of the limits, its place
//! in the counts) and gives it back when it is dropped, however the request ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use freehold_crds::Enforcement;
use freehold_crds::governance_policy::AuditFailure;
use freehold_crds::inference_node::{CompiledPolicy, Route};
use freehold_rules::govern::limits::{Reservation, Subject};
use freehold_rules::govern::request::{self, KeyDigest, Refusal, RequestViolation, Size};
use http::{HeaderMap, header};
use tracing::{debug, warn};

use crate::audit::{OpenRecord, Outcome, Record, Request};
use crate::bus::{ActivityGuard, Snapshot, deployment_key, lock};
use crate::error::ApiError;
use crate::gateway::Gateway;
use crate::metrics::{Endpoint, InFlight, Observation};

/// Set by a gateway that passes a request on; a request that has it is not passed on again.
pub(crate) const HOP_HEADER: &str = "x-freehold-hop";
/// Code of a request whose client left, as nginx writes it.
pub(crate) const CLIENT_LEFT: u16 = 499;
/// Tokens that an answer is taken to need where the client names no limit.
const USUAL_ANSWER_TOKENS: u64 = 256;
/// Bytes of text that are taken to make a token.
const BYTES_PER_TOKEN: u64 = 4;

/// The key that came with a request.
pub(crate) fn key_of(headers: &HeaderMap) -> Option<KeyDigest> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    let key = key.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then(|| KeyDigest::of(key))
}

/// The names that a caller may use, in the order of the routes; an error if no key, or no known one,
/// came and every name asks for one.
pub(crate) fn visible<'a>(
    snapshot: &'a Snapshot,
    key: Option<&KeyDigest>,
) -> Result<Vec<&'a Route>, ApiError> {
    let mut routes = Vec::new();
    let mut unauthenticated = None;
    let mut otherwise_refused = false;
    for route in &snapshot.state.routes {
        let access = request::access(&snapshot.policies(route), key, &route.name, &route.deployment);
        match access.refusal {
            None => routes.push(route),
            Some(refusal @ (Refusal::NoKey { .. } | Refusal::UnknownKey { .. })) => {
                unauthenticated = unauthenticated.or(Some(refusal));
            }
            Some(_) => otherwise_refused = true,
        }
    }
    match unauthenticated {
        Some(refusal) if routes.is_empty() && !otherwise_refused => Err(ApiError::refused(&refusal)),
        _ => Ok(routes),
    }
}

/// A request that is not admitted yet.
pub(crate) struct Intake {
    gateway: Gateway,
    snapshot: Arc<Snapshot>,
    about: Request,
    key: Option<KeyDigest>,
    refused_by: Option<RequestViolation>,
    started: Instant,
}

/// What a request asks for, as far as rules care.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask<'a> {
    /// The name that is called.
    pub(crate) model: &'a str,
    /// `max_tokens`, where the client named one.
    pub(crate) output_tokens: Option<u32>,
    /// Bytes of the prompt's text, or four for each token of it.
    pub(crate) prompt_bytes: usize,
    /// How many answers.
    pub(crate) answers: u32,
    /// Whether there are answers at all, rather than embeddings.
    pub(crate) generates: bool,
}

impl Ask<'_> {
    fn tokens(&self, output_tokens: Option<u32>) -> u64 {
        let prompt = self.prompt_bytes as u64 / BYTES_PER_TOKEN + 1;
        let answer = output_tokens.map_or(USUAL_ANSWER_TOKENS, u64::from);
        let answers = if self.generates {
            u64::from(self.answers)
        } else {
            0
        };
        prompt + answer.saturating_mul(answers)
    }
}

impl Intake {
    pub(crate) fn new(gateway: Gateway, endpoint: Endpoint, request_id: String, headers: &HeaderMap) -> Self {
        Self {
            snapshot: gateway.snapshot(),
            gateway,
            about: Request {
                request: request_id,
                endpoint,
                model: None,
                deployment: None,
                key: None,
                violations: Vec::new(),
            },
            key: key_of(headers),
            refused_by: None,
            started: Instant::now(),
        }
    }

    /// Turns callers away who may call nothing at all, before their body is read.
    pub(crate) fn authenticate(&mut self) -> Result<(), ApiError> {
        visible(&self.snapshot, self.key.as_ref()).map(|_| ())
    }

    fn refuse(&mut self, refusal: &Refusal) -> ApiError {
        self.refused_by = Some(refusal.as_violation());
        ApiError::refused(refusal)
    }

    /// Decides by the rules, opens the audit record and takes a share of the limits.
    pub(crate) async fn admit(&mut self, ask: Ask<'_>) -> Result<(Exchange, Size), ApiError> {
        // The body took its time to come: what holds now decides.
        self.snapshot = self.gateway.snapshot();
        let snapshot = Arc::clone(&self.snapshot);
        if !snapshot.applied {
            return Err(ApiError::not_ready(
                ask.model,
                "this machine has not received what it shall serve",
            ));
        }
        let Some(route) = snapshot.route(ask.model) else {
            let known = visible(&snapshot, self.key.as_ref())?;
            let names: Vec<_> = known.iter().map(|route| route.name.as_str()).collect();
            return Err(ApiError::unknown_model(ask.model, &names));
        };
        let policies = snapshot.policies(route);
        self.about.model = Some(route.name.clone());
        self.about.deployment = Some(deployment_key(route));

        let access = request::access(&policies, self.key.as_ref(), &route.name, &route.deployment);
        self.about.key = access.key_name;
        self.about.violations = access.violations;
        if let Some(refusal) = access.refusal {
            return Err(self.refuse(&refusal));
        }
        if let Some(reason) = &route.refusal {
            return Err(ApiError::held_back(&route.name, reason));
        }
        let size = if ask.generates {
            request::size(&policies, ask.output_tokens)
        } else {
            Size::default()
        };
        self.about.violations.extend(size.violations.iter().cloned());
        if let Some(refusal) = &size.refusal {
            return Err(self.refuse(refusal));
        }
        let subject = match &self.about.key {
            Some(name) => Subject::Key(name.clone()),
            None => Subject::Deployment(deployment_key(route)),
        };
        let tokens = ask.tokens(size.output_tokens);
        let admitted =
            lock(&self.gateway.inner.limiter).admit(&policies, &subject, tokens, self.gateway.now());
        let share = match admitted {
            Ok((reservation, violations)) => {
                self.about.violations.extend(violations);
                Share {
                    gateway: self.gateway.clone(),
                    reservation,
                    used: 0,
                }
            }
            Err(refusal) => return Err(self.refuse(&refusal)),
        };
        let record = match self.gateway.inner.audit.open_record(&self.about).await {
            Ok(record) => Some(record),
            Err(error) => {
                self.gateway.inner.metrics.audit_failures.inc();
                let request = &self.about.request;
                let denied = !passes_unrecorded(&policies);
                if denied {
                    warn!(%request, %error, "Refused a request that cannot be recorded");
                } else {
                    warn!(%request, %error, "Served a request without an audit record");
                }
                let late = match error {
                    OpenRecord::TooSlow(late) => late,
                    OpenRecord::Write(_) | OpenRecord::Stopped => None,
                };
                if denied {
                    let refused = ApiError::audit_failed();
                    if let Some(late) = late {
                        late.close(&Outcome {
                            code: refused.status.as_u16(),
                            error: refused.code.map(ToOwned::to_owned),
                            ..Outcome::default()
                        });
                    }
                    return Err(refused);
                }
                late
            }
        };
        let exchange = Exchange {
            in_flight: self.gateway.inner.metrics.enter(&route.name),
            gateway: self.gateway.clone(),
            snapshot: Arc::clone(&snapshot),
            about: self.about.clone(),
            record,
            share,
            activity: None,
            started: self.started,
            first_token: None,
            prompt_tokens: 0,
            completion_tokens: 0,
            served_by: None,
            code: CLIENT_LEFT,
            error: Some("client_left".to_owned()),
        };
        Ok((exchange, size))
    }

    /// Leaves on record that the request was turned away.
    pub(crate) fn turn_away(self, error: &ApiError) {
        let outcome = Outcome {
            code: error.status.as_u16(),
            error: error.code.map(ToOwned::to_owned),
            duration_ms: millis(self.started.elapsed()),
            ..Outcome::default()
        };
        let metrics = &self.gateway.inner.metrics;
        let audit = &self.gateway.inner.audit;
        if !audit.note_refused(&self.about, &outcome, self.refused_by.as_ref()) {
            metrics.audit_dropped.inc();
        }
        debug!(request = %self.about.request, code = outcome.code, error = ?error.code, "Turned a request away");
        metrics.observe(&Observation {
            model: self.about.model.as_deref().unwrap_or_default(),
            endpoint: self.about.endpoint,
            code: outcome.code,
            duration_seconds: self.started.elapsed().as_secs_f64(),
            first_token_seconds: None,
            prompt_tokens: 0,
            completion_tokens: 0,
            tokens_per_second: None,
        });
    }
}

/// Whether a request passes that cannot be recorded: not if a policy that enforces says so.
fn passes_unrecorded(policies: &[&CompiledPolicy]) -> bool {
    !policies.iter().any(|policy| {
        let denies =
            |rules: &freehold_crds::governance_policy::AuditRules| rules.on_failure == AuditFailure::Deny;
        policy.enforcement == Enforcement::Enforce && policy.rules.audit.as_ref().is_some_and(denies)
    })
}

/// What a request took out of the limits; settled when it ends, however early.
struct Share {
    gateway: Gateway,
    reservation: Reservation,
    /// Tokens that it turned out to need.
    used: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        let reservation = std::mem::take(&mut self.reservation);
        lock(&self.gateway.inner.limiter).settle(reservation, self.used, self.gateway.now());
    }
}

/// A request that is being served.
pub(crate) struct Exchange {
    gateway: Gateway,
    snapshot: Arc<Snapshot>,
    about: Request,
    record: Option<Record>,
    share: Share,
    in_flight: InFlight,
    activity: Option<ActivityGuard>,
    started: Instant,
    first_token: Option<Duration>,
    prompt_tokens: u64,
    completion_tokens: u64,
    served_by: Option<String>,
    /// How it ends; until it is said otherwise, the client left.
    code: u16,
    error: Option<String>,
}

impl Exchange {
    pub(crate) fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    pub(crate) fn request_id(&self) -> &str {
        &self.about.request
    }

    /// Who shares what is known of a prompt: the callers of one key.
    pub(crate) fn scope(&self) -> &str {
        self.about.key.as_deref().unwrap_or_default()
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        self.about.endpoint
    }

    /// The name that was called.
    pub(crate) fn model(&self) -> &str {
        self.about.model.as_deref().unwrap_or_default()
    }

    /// Counts the request in at the worker that takes it.
    pub(crate) fn taken_by(&mut self, served_by: &str, activity: Option<ActivityGuard>) {
        self.served_by = Some(served_by.to_owned());
        self.activity = activity;
    }

    /// The worker has read a prompt. An error where a rule finds it too long: the last guard, for a
    /// worker that does not hold `max_context` itself.
    pub(crate) fn prompt_read(&mut self, prompt_tokens: u32) -> Result<(), ApiError> {
        let refusal = self
            .snapshot
            .route(self.model())
            .and_then(|route| request::prompt_refusal(&self.snapshot.policies(route), prompt_tokens));
        match refusal {
            Some(refusal) => Err(ApiError::refused(&refusal)),
            None => Ok(()),
        }
    }

    /// A piece of an answer came.
    pub(crate) fn piece(&mut self) {
        self.in_flight.begun();
        self.first_token.get_or_insert_with(|| self.started.elapsed());
    }

    /// Tokens so far, over all answers.
    pub(crate) fn used(&mut self, prompt_tokens: u64, completion_tokens: u64) {
        self.prompt_tokens = prompt_tokens;
        self.completion_tokens = completion_tokens;
    }

    /// The request ends well, or as another gateway said.
    pub(crate) fn end(&mut self, code: u16) {
        self.code = code;
        self.error = None;
    }

    /// The request ends with an error.
    pub(crate) fn fail(&mut self, error: &ApiError) {
        self.code = error.status.as_u16();
        self.error = error.code.map(ToOwned::to_owned);
    }

    /// The client takes its answer too slowly and is cut off.
    pub(crate) fn stalled(&mut self) {
        self.code = CLIENT_LEFT;
        self.error = Some("client_stalled".to_owned());
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let duration = self.started.elapsed();
        let total = self.prompt_tokens + self.completion_tokens;
        let inner = &self.gateway.inner;
        self.share.used = total;

        let tokens_per_second = self.first_token.and_then(|first| {
            let seconds = duration.saturating_sub(first).as_secs_f64();
            (self.completion_tokens > 1 && seconds > 0.0)
                .then(|| (self.completion_tokens - 1) as f64 / seconds)
        });
        inner.metrics.observe(&Observation {
            model: self.about.model.as_deref().unwrap_or_default(),
            endpoint: self.about.endpoint,
            code: self.code,
            duration_seconds: duration.as_secs_f64(),
            first_token_seconds: self.first_token.map(|first| first.as_secs_f64()),
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            tokens_per_second,
        });
        let violations = self
            .snapshot
            .route(self.model())
            .map(|route| {
                let tokens = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
                request::afterwards(
                    &self.snapshot.policies(route),
                    tokens(self.prompt_tokens),
                    tokens(self.completion_tokens),
                )
            })
            .unwrap_or_default();
        if let Some(record) = self.record.take() {
            record.close(&Outcome {
                code: self.code,
                error: self.error.take(),
                served_by: self.served_by.take(),
                prompt_tokens: self.prompt_tokens,
                completion_tokens: self.completion_tokens,
                duration_ms: millis(duration),
                first_token_ms: self.first_token.map(millis),
                violations,
            });
        }
        debug!(
            request = %self.about.request,
            code = self.code,
            completion_tokens = self.completion_tokens,
            "Ended a request"
        );
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
