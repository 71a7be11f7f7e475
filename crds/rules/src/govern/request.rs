//! What a policy says of one request: who may call which name, and how large it may be.
//!
//! Several policies apply together and each must be met, so the strictest wins. A policy that enforces
//! refuses; one that audits lets pass and leaves a [`RequestViolation`] for the record. What may be
//! asked a minute is in [`super::limits`].

use std::time::Duration;

use freehold_crds::Enforcement;
use freehold_crds::inference_node::CompiledPolicy;
use sha2::{Digest, Sha256};

/// What a client's key is known by. The key itself is kept nowhere.
#[derive(Clone, Copy)]
pub struct KeyDigest([u8; 32]);

impl KeyDigest {
    /// SHA-256 of a key as the client sent it.
    #[must_use]
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// Whether this is the digest that a policy states. Takes the same time wherever they differ.
    fn is(&self, stated_hex: &str) -> bool {
        let mut stated = [0; 32];
        if hex::decode_to_slice(stated_hex, &mut stated).is_err() {
            return false;
        }
        let difference = self
            .0
            .iter()
            .zip(stated)
            .fold(0_u8, |seen, (ours, theirs)| seen | (ours ^ theirs));
        std::hint::black_box(difference) == 0
    }
}

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

/// Whether a caller may call a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Name of the caller's key, where a policy knows it.
    pub key_name: Option<String>,
    /// Why not.
    pub refusal: Option<Refusal>,
    /// What was only recorded.
    pub violations: Vec<RequestViolation>,
}

/// Decides whether a caller may call `name`, which stands for the deployment called `deployment`. A
/// key's patterns are held against both, so a key for a deployment also works for its aliases.
#[must_use]
pub fn access(policies: &[&CompiledPolicy], key: Option<&KeyDigest>, name: &str, deployment: &str) -> Access {
    let mut decision = Access {
        key_name: known_name(policies, key),
        ..Access::default()
    };
    for policy in policies {
        let Some(rules) = &policy.rules.access else {
            continue;
        };
        // Every key is compared, so the time tells nothing of which one matched.
        let known = key.and_then(|digest| {
            rules.keys.iter().fold(None, |found, candidate| {
                if digest.is(&candidate.sha256) {
                    Some(candidate)
                } else {
                    found
                }
            })
        });
        let refusal = match known {
            Some(known) => {
                let allowed = known.models.is_empty()
                    || known.models.iter().any(|pattern| {
                        matches_pattern(pattern, name) || matches_pattern(pattern, deployment)
                    });
                (!allowed).then(|| Refusal::NameNotAllowed {
                    policy: policy.name.clone(),
                    key: known.name.clone(),
                    name: name.to_owned(),
                })
            }
            None if !rules.require_key => None,
            None => Some(match (key, &decision.key_name) {
                (None, _) => Refusal::NoKey {
                    policy: policy.name.clone(),
                },
                (Some(_), None) => Refusal::UnknownKey {
                    policy: policy.name.clone(),
                },
                (Some(_), Some(key)) => Refusal::NameNotAllowed {
                    policy: policy.name.clone(),
                    key: key.clone(),
                    name: name.to_owned(),
                },
            }),
        };
        if let Some(refusal) = refusal {
            match policy.enforcement {
                Enforcement::Audit => decision.violations.push(refusal.as_violation()),
                Enforcement::Enforce => {
                    decision.refusal.get_or_insert(refusal);
                }
            }
        }
    }
    decision
}

/// The name under which any of the policies knows the key.
fn known_name(policies: &[&CompiledPolicy], key: Option<&KeyDigest>) -> Option<String> {
    let digest = key?;
    policies
        .iter()
        .filter_map(|policy| policy.rules.access.as_ref())
        .flat_map(|access| &access.keys)
        .fold(None, |found, candidate| {
            let matches = digest.is(&candidate.sha256);
            if matches && found.is_none() {
                Some(candidate.name.clone())
            } else {
                found
            }
        })
}

/// How large a request may be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Longest answer: what was asked for, or the strictest cap where nothing was.
    pub output_tokens: Option<u32>,
    /// Longest prompt and answer together.
    pub context_tokens: Option<u32>,
    /// Why it is refused as it stands.
    pub refusal: Option<Refusal>,
    /// What was only recorded.
    pub violations: Vec<RequestViolation>,
}

/// Decides how large an answer may be, of which the client asked for `output_tokens` (if it said).
#[must_use]
pub fn size(policies: &[&CompiledPolicy], output_tokens: Option<u32>) -> Size {
    let mut decision = Size {
        output_tokens,
        ..Size::default()
    };
    for policy in policies {
        let Some(limits) = &policy.rules.limits else {
            continue;
        };
        let mut refusals = Vec::new();
        if let (Some(allowed), Some(asked)) = (limits.max_output_tokens, output_tokens)
            && asked > allowed
        {
            refusals.push(Refusal::OutputTooLong {
                policy: policy.name.clone(),
                asked,
                allowed,
            });
        }
        if let (Some(allowed), Some(asked)) = (limits.max_context_tokens, output_tokens)
            && asked >= allowed
        {
            refusals.push(Refusal::ContextTooLong {
                policy: policy.name.clone(),
                // The prompt has one token at least.
                asked: asked.saturating_add(1),
                allowed,
            });
        }
        match policy.enforcement {
            Enforcement::Audit => decision
                .violations
                .extend(refusals.iter().map(Refusal::as_violation)),
            Enforcement::Enforce => {
                if decision.refusal.is_none() {
                    decision.refusal = refusals.into_iter().next();
                }
                if output_tokens.is_none() {
                    decision.output_tokens = strictest(decision.output_tokens, limits.max_output_tokens);
                }
                decision.context_tokens = strictest(decision.context_tokens, limits.max_context_tokens);
            }
        }
    }
    decision
}

fn strictest(one: Option<u32>, other: Option<u32>) -> Option<u32> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// Whether the prompt, once counted, leaves no room for an answer under a policy that enforces.
#[must_use]
pub fn prompt_refusal(policies: &[&CompiledPolicy], prompt_tokens: u32) -> Option<Refusal> {
    policies
        .iter()
        .filter(|policy| policy.enforcement == Enforcement::Enforce)
        .filter_map(|policy| Some((policy, policy.rules.limits.as_ref()?.max_context_tokens?)))
        .filter(|(_, allowed)| prompt_tokens >= *allowed)
        .min_by_key(|(_, allowed)| *allowed)
        .map(|(policy, allowed)| Refusal::ContextTooLong {
            policy: policy.name.clone(),
            asked: prompt_tokens.saturating_add(1),
            allowed,
        })
}

/// What a finished request turned out to break under policies that only audit.
#[must_use]
pub fn afterwards(
    policies: &[&CompiledPolicy],
    prompt_tokens: u32,
    completion_tokens: u32,
) -> Vec<RequestViolation> {
    let total = prompt_tokens.saturating_add(completion_tokens);
    let mut violations = Vec::new();
    for policy in policies {
        let (Enforcement::Audit, Some(limits)) = (policy.enforcement, &policy.rules.limits) else {
            continue;
        };
        let mut record = |rule, found, allowed: Option<u32>| {
            if let Some(allowed) = allowed.filter(|allowed| found > *allowed) {
                violations.push(RequestViolation {
                    policy: policy.name.clone(),
                    rule,
                    evidence: format!("{found} tokens where {allowed} are allowed"),
                });
            }
        };
        record(
            "spec.limits.maxOutputTokens",
            completion_tokens,
            limits.max_output_tokens,
        );
        record("spec.limits.maxContextTokens", total, limits.max_context_tokens);
    }
    violations
}

/// Whether `text` is what `pattern` describes; `*` stands for any run of characters, also none.
#[must_use]
pub fn matches_pattern(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    // `split` yields at least one part.
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    // The leftmost place for each middle part leaves the most for those after it.
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = rest.get(at + part.len()..).unwrap_or_default(),
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use freehold_crds::governance_policy::{AccessRules, ApiKey, LimitRules, PolicyRules};

    fn key(name: &str, secret: &str, models: &[&str]) -> ApiKey {
        ApiKey {
            name: name.to_owned(),
            sha256: hex::encode(Sha256::digest(secret)),
            models: models.iter().map(ToString::to_string).collect(),
        }
    }

    fn access_policy(name: &str, require_key: bool, keys: Vec<ApiKey>) -> CompiledPolicy {
        CompiledPolicy {
            name: name.to_owned(),
            rules: PolicyRules {
                access: Some(AccessRules { require_key, keys }),
                ..PolicyRules::default()
            },
            ..CompiledPolicy::default()
        }
    }

    fn limit_policy(name: &str, output: Option<u32>, context: Option<u32>) -> CompiledPolicy {
        CompiledPolicy {
            name: name.to_owned(),
            rules: PolicyRules {
                limits: Some(LimitRules {
                    max_output_tokens: output,
                    max_context_tokens: context,
                    ..LimitRules::default()
                }),
                ..PolicyRules::default()
            },
            ..CompiledPolicy::default()
        }
    }

    fn call(policies: &[&CompiledPolicy], key: Option<&str>, name: &str) -> Access {
        access(policies, key.map(KeyDigest::of).as_ref(), name, "chat")
    }

    #[test]
    fn a_name_without_access_rules_is_open() {
        assert_eq!(call(&[], None, "chat"), Access::default());
        assert_eq!(
            call(&[&limit_policy("l", Some(1), None)], Some("x"), "chat").refusal,
            None
        );
    }

    #[test]
    fn a_known_key_passes_and_is_named() {
        let policy = access_policy(
            "p",
            true,
            vec![key("ann", "secret-a", &[]), key("bob", "secret-b", &[])],
        );
        let decision = call(&[&policy], Some("secret-b"), "chat");
        assert_eq!(decision.refusal, None);
        assert_eq!(decision.key_name.as_deref(), Some("bob"));
    }

    #[test]
    fn missing_and_unknown_keys_are_told_apart() {
        let policy = access_policy("p", true, vec![key("ann", "secret-a", &[])]);
        assert!(matches!(
            call(&[&policy], None, "chat").refusal,
            Some(Refusal::NoKey { .. })
        ));
        let refusal = call(&[&policy], Some("guess"), "chat").refusal;
        assert!(matches!(refusal, Some(Refusal::UnknownKey { .. })));
        assert!(
            !refusal
                .map(|refusal| refusal.to_string())
                .unwrap_or_default()
                .contains("guess")
        );
    }

    #[test]
    fn a_key_calls_only_its_names() {
        let policy = access_policy("p", true, vec![key("ann", "s", &["gpt-*", "chat"])]);
        assert_eq!(call(&[&policy], Some("s"), "gpt-4o").refusal, None);
        assert_eq!(
            call(&[&policy], Some("s"), "an-alias").refusal,
            None,
            "the deployment is allowed"
        );
        let narrow = access_policy("p", true, vec![key("ann", "s", &["gpt-*"])]);
        assert!(matches!(
            call(&[&narrow], Some("s"), "other").refusal,
            Some(Refusal::NameNotAllowed { .. })
        ));
    }

    #[test]
    fn without_require_key_any_caller_passes_and_known_ones_are_still_named() {
        let policy = access_policy("p", false, vec![key("ann", "s", &[])]);
        assert_eq!(
            call(&[&policy], Some("whatever a client sends"), "chat").refusal,
            None
        );
        assert_eq!(
            call(&[&policy], Some("s"), "chat").key_name.as_deref(),
            Some("ann")
        );
    }

    #[test]
    fn every_policy_must_know_the_key() {
        let one = access_policy("one", true, vec![key("ann", "s", &[])]);
        let two = access_policy("two", true, vec![key("bob", "t", &[])]);
        let refusal = call(&[&one, &two], Some("s"), "chat").refusal;
        assert!(matches!(refusal, Some(Refusal::NameNotAllowed { policy, .. }) if policy == "two"));
    }

    #[test]
    fn audit_records_what_enforce_refuses() {
        let mut policy = access_policy("p", true, vec![]);
        policy.enforcement = Enforcement::Audit;
        let decision = call(&[&policy], None, "chat");
        assert_eq!(decision.refusal, None);
        assert_eq!(decision.violations.len(), 1);
        assert_eq!(decision.violations[0].rule, "spec.access.requireKey");
    }

    #[test]
    fn a_stated_digest_that_is_not_hexadecimal_matches_nothing() {
        let mut bad = key("ann", "s", &[]);
        bad.sha256 = "zz".repeat(32);
        let policy = access_policy("p", true, vec![bad]);
        assert!(call(&[&policy], Some("s"), "chat").refusal.is_some());
    }

    #[test]
    fn the_strictest_size_wins() {
        let (wide, narrow) = (
            limit_policy("w", Some(100), Some(1000)),
            limit_policy("n", Some(10), Some(500)),
        );
        let silent = size(&[&wide, &narrow], None);
        assert_eq!(
            (silent.output_tokens, silent.context_tokens),
            (Some(10), Some(500))
        );
        assert_eq!(silent.refusal, None);
        let modest = size(&[&wide, &narrow], Some(5));
        assert_eq!((modest.output_tokens, modest.refusal), (Some(5), None));
        let greedy = size(&[&wide, &narrow], Some(11));
        assert!(
            matches!(greedy.refusal, Some(Refusal::OutputTooLong { policy, allowed: 10, .. }) if policy == "n")
        );
    }

    #[test]
    fn audited_sizes_cap_nothing_and_are_recorded() {
        let mut policy = limit_policy("p", Some(10), Some(20));
        policy.enforcement = Enforcement::Audit;
        let asked = size(&[&policy], Some(50));
        assert_eq!((asked.output_tokens, asked.refusal), (Some(50), None));
        assert_eq!(asked.violations.len(), 2);
        assert_eq!(size(&[&policy], None).output_tokens, None);
        let found = afterwards(&[&policy], 15, 11);
        assert_eq!(
            found.iter().map(|violation| violation.rule).collect::<Vec<_>>(),
            ["spec.limits.maxOutputTokens", "spec.limits.maxContextTokens"]
        );
        assert_eq!(afterwards(&[&policy], 10, 10), []);
    }

    #[test]
    fn a_prompt_that_fills_the_allowed_context_is_refused() {
        let policy = limit_policy("p", None, Some(64));
        assert_eq!(prompt_refusal(&[&policy], 63), None);
        assert!(matches!(
            prompt_refusal(&[&policy], 64),
            Some(Refusal::ContextTooLong { allowed: 64, .. })
        ));
    }

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, text, expected) in [
            ("chat", "chat", true),
            ("chat", "chatty", false),
            ("*", "", true),
            ("gpt-*", "gpt-4", true),
            ("gpt-*", "my-gpt-4", false),
            ("*mini", "gpt-mini", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("ab*ba", "aba", false),
            ("", "x", false),
        ] {
            assert_eq!(matches_pattern(pattern, text), expected, "{pattern} {text}");
        }
    }
}
