//! Facts times policies gives decisions, with the reasons.
//!
//! [`deployment`] decides whether a deployment may be placed; `request` whether a request may be served.

pub mod expression;
pub mod limits;
mod refusal;
pub mod request;

use std::collections::BTreeMap;

use freehold_crds::common::Violation;
use freehold_crds::governance_policy::{ModelFormat, SupplyChainRules};
use freehold_crds::model_deployment::ModelSource;
use freehold_crds::{Enforcement, GovernancePolicy, ModelDeployment};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::ResourceExt;

use crate::labels;
use crate::validate::{Candidate, DRAFT_FIELD, draft_source, key_of};

/// What the policies say of one candidate of one deployment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// Every rule that is broken, enforced or not.
    pub violations: Vec<Violation>,
    /// Formats that may be loaded; None: every one.
    pub allowed_formats: Option<Vec<ModelFormat>>,
    /// Labels that a machine must have, with the policy that asks for them.
    pub node_selectors: Vec<(String, LabelSelector)>,
    /// Labels that a machine should have, with the policy that only records where it has not.
    pub recorded_selectors: Vec<(String, LabelSelector)>,
}

impl Decision {
    /// Whether the candidate may be placed: no rule that is enforced is broken.
    #[must_use]
    pub fn allowed(&self) -> bool {
        self.violations
            .iter()
            .all(|violation| violation.enforcement == Enforcement::Audit)
    }
}

/// Whether a policy selects a deployment.
#[must_use]
pub fn selects(
    policy: &GovernancePolicy,
    deployment: &ModelDeployment,
    namespaces: &BTreeMap<String, BTreeMap<String, String>>,
) -> bool {
    // A selector that does not read could mean anything, so the rule holds: closed, not open.
    let selectors = [&policy.spec.namespace_selector, &policy.spec.selector];
    if selectors
        .into_iter()
        .flatten()
        .any(|selector| !labels::is_sound(selector))
    {
        return true;
    }
    let none = BTreeMap::new();
    let namespace = deployment.namespace().unwrap_or_default();
    let mut namespace_labels = namespaces.get(&namespace).cloned().unwrap_or_default();
    namespace_labels
        .entry("kubernetes.io/metadata.name".to_owned())
        .or_insert(namespace);
    let labels = deployment.metadata.labels.as_ref().unwrap_or(&none);
    policy
        .spec
        .namespace_selector
        .as_ref()
        .is_none_or(|selector| labels::matches(selector, &namespace_labels))
        && policy
            .spec
            .selector
            .as_ref()
            .is_none_or(|selector| labels::matches(selector, labels))
}

/// Rules of a policy that are set and that this version cannot hold. With `Enforce` they hold back what
/// they select, because a rule that is silently not kept is worse than a model that does not run.
#[must_use]
pub fn gaps(policy: &GovernancePolicy) -> Vec<String> {
    let rules = &policy.spec.rules;
    let mut gaps = Vec::new();
    if rules
        .content
        .as_ref()
        .is_some_and(|content| !content.rules.is_empty())
    {
        gaps.push("spec.content".to_owned());
    }
    if rules
        .supply_chain
        .as_ref()
        .is_some_and(|rules| rules.require_signature)
    {
        gaps.push("spec.supplyChain.requireSignature".to_owned());
    }
    gaps
}

/// The source of a model as policies name it: `file:///srv/m.gguf`, `https://…`, `hf://owner/name/file`.
#[must_use]
pub fn source_name(model: &ModelSource) -> String {
    if let Some(path) = &model.path {
        format!("file://{path}")
    } else if let Some(url) = &model.url {
        url.clone()
    } else if let Some(hub) = &model.hugging_face {
        // A mirror is another place: it is named by its own address and not as the hub.
        match &hub.endpoint {
            Some(endpoint) => format!(
                "{}/{}/{}",
                endpoint.trim_end_matches('/'),
                hub.repository,
                hub.file
            ),
            None => format!("hf://{}/{}", hub.repository, hub.file),
        }
    } else if let Some(oci) = &model.oci {
        format!("oci://{}", oci.reference)
    } else if let Some(volume) = &model.persistent_volume_claim {
        format!("pvc://{}/{}", volume.claim_name, volume.path)
    } else {
        String::new()
    }
}

/// Whether `text` is what `pattern` describes; `*` stands for any run of characters, also none.
#[must_use]
pub fn pattern_matches(pattern: &str, text: &str) -> bool {
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

/// Decides whether `candidate` of `deployment` may be placed under `policies`, which are those that
/// select it. The strictest wins: each of them must be met.
#[must_use]
pub fn deployment(
    deployment: &ModelDeployment,
    candidate: &Candidate,
    policies: &[&GovernancePolicy],
) -> Decision {
    let mut decision = Decision::default();
    for policy in policies {
        let mut report = Report {
            policy,
            object: key_of(deployment).to_string(),
            violations: Vec::new(),
        };
        let rules = &policy.spec.rules;
        if let Some(rules) = &rules.supply_chain {
            supply_chain(&mut report, &candidate.model, &candidate.field, rules);
            if let Some(draft) = &deployment.spec.engine.draft {
                supply_chain(&mut report, &draft_source(draft), DRAFT_FIELD, rules);
            }
            if policy.spec.enforcement == Enforcement::Enforce && !rules.allowed_formats.is_empty() {
                let allowed = decision.allowed_formats.take();
                let both =
                    |format: &&ModelFormat| allowed.as_ref().is_none_or(|formats| formats.contains(format));
                decision.allowed_formats = Some(rules.allowed_formats.iter().filter(both).copied().collect());
            }
        }
        if let Some(residency) = &rules.residency
            && let Some(selector) = &residency.node_selector
        {
            let selectors = match policy.spec.enforcement {
                Enforcement::Enforce => &mut decision.node_selectors,
                Enforcement::Audit => &mut decision.recorded_selectors,
            };
            selectors.push((policy.name_any(), selector.clone()));
        }
        for gap in gaps(policy) {
            let remedy = "remove the rule, set spec.enforcement: Audit, or wait for a version that holds it";
            report.violation(&gap, "", "this version cannot hold the rule".to_owned(), remedy);
        }
        for rule in &rules.expressions {
            if let Err(why) = expression::holds(&rule.expression, deployment, &source_name(&candidate.model))
            {
                let evidence = rule.message.clone().unwrap_or(why);
                let remedy = format!("change the deployment so that {} holds", rule.expression);
                report.violation(
                    &format!("spec.expressions[{}]", rule.name),
                    "spec",
                    evidence,
                    &remedy,
                );
            }
        }
        if decision.allowed_formats.as_ref().is_some_and(Vec::is_empty) {
            let evidence = "together the policies allow no format at all".to_owned();
            report.violation(
                "spec.supplyChain.allowedFormats",
                &candidate.field,
                evidence,
                "make the lists of the policies overlap",
            );
            decision.allowed_formats = None;
        }
        decision.violations.append(&mut report.violations);
    }
    decision
}

struct Report<'a> {
    policy: &'a GovernancePolicy,
    object: String,
    violations: Vec<Violation>,
}

impl Report<'_> {
    fn violation(&mut self, rule: &str, field: &str, evidence: String, remedy: &str) {
        self.violations.push(Violation {
            policy: self.policy.name_any(),
            rule: rule.to_owned(),
            object: self.object.clone(),
            field: field.to_owned(),
            evidence,
            remedy: remedy.to_owned(),
            enforcement: self.policy.spec.enforcement,
        });
    }
}

fn supply_chain(report: &mut Report<'_>, model: &ModelSource, field: &str, rules: &SupplyChainRules) {
    let rule = |name: &str| format!("spec.supplyChain.{name}");
    let digest_field = format!("{field}.sha256");
    match &model.sha256 {
        None if rules.require_digest || !rules.allowed_digests.is_empty() => {
            let name = if rules.require_digest {
                "requireDigest"
            } else {
                "allowedDigests"
            };
            report.violation(
                &rule(name),
                &digest_field,
                "no digest".to_owned(),
                "set sha256 to the digest that sha256sum prints for the file",
            );
        }
        Some(sha256) if !rules.allowed_digests.is_empty() && !rules.allowed_digests.contains(sha256) => {
            let remedy = "use a file whose digest is on the list, or add this one to the policy";
            report.violation(&rule("allowedDigests"), &digest_field, sha256.clone(), remedy);
        }
        _ => {}
    }
    let source = source_name(model);
    if let Some(pattern) = rules
        .denied_sources
        .iter()
        .find(|pattern| pattern_matches(pattern, &source))
    {
        let evidence = format!("{source} fits the denied {pattern}");
        report.violation(
            &rule("deniedSources"),
            field,
            evidence,
            "take the model from a source that is not denied",
        );
    }
    if !rules.allowed_sources.is_empty()
        && !rules
            .allowed_sources
            .iter()
            .any(|pattern| pattern_matches(pattern, &source))
    {
        let remedy = format!("take the model from one of {}", rules.allowed_sources.join(", "));
        report.violation(&rule("allowedSources"), field, source, &remedy);
    }
    if !rules.allowed_licences.is_empty() {
        let licence = model.licence.clone();
        if licence
            .as_ref()
            .is_none_or(|licence| !rules.allowed_licences.contains(licence))
        {
            let remedy = format!(
                "use a model under one of {}, and say so in {field}.licence",
                rules.allowed_licences.join(", ")
            );
            report.violation(
                &rule("allowedLicences"),
                &format!("{field}.licence"),
                licence.unwrap_or_else(|| "no licence".to_owned()),
                &remedy,
            );
        }
    }
    let format = if model
        .path
        .as_ref()
        .is_some_and(|path| !path.to_lowercase().ends_with(".gguf"))
    {
        None
    } else {
        Some(ModelFormat::Gguf)
    };
    // A path without the ending may hold either format: the agent checks what it finds before it loads.
    if let Some(format) = format.filter(|_| !rules.allowed_formats.is_empty())
        && !rules.allowed_formats.contains(&format)
    {
        report.violation(
            &rule("allowedFormats"),
            field,
            format!("{format:?}"),
            "use a model in an allowed format",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_supply_chain_of_a_draft_model_counts_too() {
        let policy: GovernancePolicy = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "house"},
            "spec": {"supplyChain": {"requireDigest": true}},
        }))
        .unwrap();
        let digest = "a".repeat(64);
        let deployed: ModelDeployment = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "chat", "namespace": "default"},
            "spec": {
                "model": {"path": "/m/large.gguf", "sha256": digest},
                "engine": {"draft": {"path": "/m/small.gguf"}},
            },
        }))
        .unwrap();
        let validated = crate::validate::validate_deployment(&deployed).unwrap();
        let decided = deployment(&deployed, &validated.candidates[0], &[&policy]);
        let fields: Vec<&str> = decided.violations.iter().map(|v| v.field.as_str()).collect();
        assert_eq!(fields, ["spec.engine.draft.sha256"]);
    }

    #[test]
    fn patterns_match_whole_texts() {
        for (pattern, text) in [
            ("*", "x"),
            ("hf://a/*", "hf://a/b/c"),
            ("https://*.lan/*.gguf", "https://m.lan/x.gguf"),
            ("abc", "abc"),
            ("a*a", "aba"),
            ("*", ""),
            ("*mini", "gpt-mini"),
            ("a*b*c", "a-b-b-c"),
        ] {
            assert!(pattern_matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("hf://a/*", "hf://ab/c"),
            ("abc", "abcd"),
            ("a*a", "a"),
            ("", "x"),
            ("*.gguf", "x.gguf.exe"),
            ("gpt-*", "my-gpt-4"),
            ("a*b*c", "a-c-b"),
            ("ab*ba", "aba"),
        ] {
            assert!(!pattern_matches(pattern, text), "{pattern} {text}");
        }
    }
}
