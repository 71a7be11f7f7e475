//! What a policy says of one request: who may call which name, and how large it may be.
//!
//! Several policies apply together and each must be met, so the strictest wins. A policy that enforces
//! refuses; one that audits lets pass and leaves a [`RequestViolation`] for the record. What may be
//! asked a minute is in [`super::limits`].

use freehold_crds::Enforcement;
use freehold_crds::inference_node::CompiledPolicy;
use sha2::{Digest, Sha256};

use super::pattern_matches;
pub use super::refusal::{Refusal, RequestViolation, Unit, whole_seconds};

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
                        pattern_matches(pattern, name) || pattern_matches(pattern, deployment)
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

#[cfg(test)]
mod tests;
