//! Why a request is not served, in words for its client and for the record.

use std::time::Duration;

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Requests.
    Requests,
    /// Tokens of prompts and answers.
    Tokens,
}

impl Unit {
    /// The word, in the plural.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Tokens => "tokens",
        }
    }
}

/// Why a request is not served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No key came with the request.
    #[error(
        "policy {policy} asks for an API key and the request has none; send it as \"Authorization: Bearer KEY\""
    )]
    NoKey {
        /// The policy.
        policy: String,
    },
    /// The key is not among those of the policy, nor of any other that applies.
    #[error(
        "the API key is not known to policy {policy}; check it, or ask the owner of this machine for one"
    )]
    UnknownKey {
        /// The policy.
        policy: String,
    },
    /// The key is known, and not for this name.
    #[error("the API key {key:?} may not call {name:?} under policy {policy}")]
    NameNotAllowed {
        /// The policy.
        policy: String,
        /// Name of the key.
        key: String,
        /// The name that was called.
        name: String,
    },
    /// A longer answer is asked for than allowed.
    #[error(
        "an answer of {asked} tokens is asked for and policy {policy} allows {allowed}; ask for {allowed} or less"
    )]
    OutputTooLong {
        /// The policy.
        policy: String,
        /// Tokens that were asked for.
        asked: u32,
        /// Tokens that are allowed.
        allowed: u32,
    },
    /// Prompt and answer together are longer than allowed.
    #[error(
        "prompt and answer come to {asked} tokens and policy {policy} allows {allowed} together; shorten the prompt or ask for less"
    )]
    ContextTooLong {
        /// The policy.
        policy: String,
        /// Tokens of both.
        asked: u32,
        /// Tokens that are allowed.
        allowed: u32,
    },
    /// The minute's worth is used up.
    #[error(
        "policy {policy} allows {limit} {} a minute and they are used up; try again in {} s",
        .unit.as_str(),
        whole_seconds(*.retry_after)
    )]
    TooMuch {
        /// The policy.
        policy: String,
        /// What is counted.
        unit: Unit,
        /// How many a minute.
        limit: u32,
        /// When the request would pass.
        retry_after: Duration,
    },
}

/// Seconds until a wait is surely over, at least one: the value of `Retry-After`.
#[must_use]
pub fn whole_seconds(wait: Duration) -> u64 {
    (wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1)
}

impl Refusal {
    /// The policy that refuses.
    #[must_use]
    pub fn policy(&self) -> &str {
        match self {
            Self::NoKey { policy }
            | Self::UnknownKey { policy }
            | Self::NameNotAllowed { policy, .. }
            | Self::OutputTooLong { policy, .. }
            | Self::ContextTooLong { policy, .. }
            | Self::TooMuch { policy, .. } => policy,
        }
    }

    /// Path of the rule in the policy.
    #[must_use]
    pub fn rule(&self) -> &'static str {
        match self {
            Self::NoKey { .. } | Self::UnknownKey { .. } => "spec.access.requireKey",
            Self::NameNotAllowed { .. } => "spec.access.keys",
            Self::OutputTooLong { .. } => "spec.limits.maxOutputTokens",
            Self::ContextTooLong { .. } => "spec.limits.maxContextTokens",
            Self::TooMuch { unit, .. } => match unit {
                Unit::Requests => "spec.limits.requestsPerMinute",
                Unit::Tokens => "spec.limits.tokensPerMinute",
            },
        }
    }

    /// The same, for a record where the policy only audits.
    #[must_use]
    pub fn as_violation(&self) -> RequestViolation {
        RequestViolation {
            policy: self.policy().to_owned(),
            rule: self.rule(),
            evidence: self.to_string(),
        }
    }
}

/// A rule that a request broke and that was only recorded.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RequestViolation {
    /// The policy.
    pub policy: String,
    /// Path of the rule in it.
    pub rule: &'static str,
    /// What was found, without content.
    pub evidence: String,
}
