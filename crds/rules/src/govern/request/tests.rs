//! Tests of access and size.

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
