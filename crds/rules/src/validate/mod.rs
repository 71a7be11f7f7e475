//! From a spec as it was written to one that can be planned. Every error names the field, what was
//! found, what is allowed and what to do.

use std::fmt;

use freehold_crds::common::Quantity;
use freehold_crds::model_deployment::{DraftModel, EngineSettings, ModelSource};
use freehold_crds::{GovernancePolicy, HealthProbe, ModelDeployment, ObjectKey};
use kube::ResourceExt;

/// One field that cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// Path of the field.
    pub field: String,
    /// What was found.
    pub found: String,
    /// What is allowed, and what to do.
    pub advice: String,
    /// True when the field is right and this version does not carry it out.
    pub not_supported: bool,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {}: {}", self.field, self.found, self.advice)
    }
}

fn invalid(field: &str, found: impl fmt::Display, advice: impl Into<String>) -> FieldError {
    FieldError {
        field: field.to_owned(),
        found: found.to_string(),
        advice: advice.into(),
        not_supported: false,
    }
}

fn not_supported(field: &str, advice: &str) -> FieldError {
    let advice = format!("this version does not carry it out; {advice}");
    FieldError {
        field: field.to_owned(),
        found: "set".to_owned(),
        advice,
        not_supported: true,
    }
}

/// A model that may run: the only one, or one of several variants, best first.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Name of the variant; None when there is just one model.
    pub variant: Option<String>,
    /// Field of its source, such as `spec.model`.
    pub field: String,
    /// Where its bytes come from.
    pub model: ModelSource,
    /// Bytes of the file, where the spec says so.
    pub size_bytes: Option<u64>,
}

/// Field of the model that guesses.
pub(crate) const DRAFT_FIELD: &str = "spec.engine.draft";

/// A draft model as policies see models.
pub(crate) fn draft_source(draft: &DraftModel) -> ModelSource {
    ModelSource {
        path: Some(draft.path.clone()),
        sha256: draft.sha256.clone(),
        licence: draft.licence.clone(),
        ..ModelSource::default()
    }
}

/// A deployment whose fields are sound.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidatedDeployment {
    /// Its namespace and name.
    pub key: ObjectKey,
    /// What may run, best first; never empty.
    pub candidates: Vec<Candidate>,
    /// How it runs.
    pub engine: EngineSettings,
    /// What `spec.placement.memory` says, in bytes.
    pub memory_override: Option<u64>,
    /// Its names on the bus, the object's own first.
    pub names: Vec<String>,
}

/// Namespace and name of an object.
#[must_use]
pub fn key_of(object: &impl ResourceExt) -> ObjectKey {
    ObjectKey::new(object.namespace().unwrap_or_default(), object.name_any())
}

/// Checks a deployment.
///
/// # Errors
/// Every field that is wrong, not only the first.
pub fn validate_deployment(deployment: &ModelDeployment) -> Result<ValidatedDeployment, Vec<FieldError>> {
    let spec = &deployment.spec;
    let mut errors = Vec::new();
    let mut candidates = Vec::new();
    let set = [
        spec.model.is_some(),
        !spec.variants.is_empty(),
        spec.external.is_some(),
    ];
    if set.iter().filter(|&&set| set).count() != 1 {
        let found = ["model", "variants", "external"]
            .iter()
            .zip(set)
            .filter(|(_, set)| *set)
            .map(|(name, _)| *name);
        let found: Vec<&str> = found.collect();
        let found = if found.is_empty() {
            "without a model".to_owned()
        } else {
            format!("with {}", found.join(" and "))
        };
        errors.push(invalid(
            "spec",
            found,
            "set exactly one of model, variants and external",
        ));
    }
    if spec.external.is_some() {
        errors.push(not_supported(
            "spec.external",
            "run the model on a machine of your own with spec.model",
        ));
    }
    if let Some(model) = &spec.model {
        candidates.push(candidate(None, "spec.model".to_owned(), model, &mut errors));
    }
    for variant in &spec.variants {
        let field = format!("spec.variants[{}].model", variant.name);
        candidates.push(candidate(
            Some(variant.name.clone()),
            field,
            &variant.model,
            &mut errors,
        ));
    }
    if let Some(draft) = &spec.engine.draft {
        candidate(None, DRAFT_FIELD.to_owned(), &draft_source(draft), &mut errors);
        if let Some(Err(error)) = draft.memory.as_ref().map(Quantity::bytes) {
            errors.push(invalid(
                &format!("{DRAFT_FIELD}.memory"),
                format!("{:?}", error.found),
                error.to_string(),
            ));
        }
    }
    let memory = spec.placement.memory.as_ref().map(|quantity| quantity.bytes());
    let memory_override = memory.transpose().unwrap_or_else(|error| {
        errors.push(invalid(
            "spec.placement.memory",
            format!("{:?}", error.found),
            error.to_string(),
        ));
        None
    });
    let own = deployment.name_any();
    let mut names = vec![own.clone()];
    for (index, alias) in spec.aliases.iter().enumerate() {
        let field = format!("spec.aliases[{index}]");
        let sound = !alias.is_empty() && alias.len() <= 128 && alias.chars().all(|c| c.is_ascii_graphic());
        if !sound {
            errors.push(invalid(
                &field,
                format!("{alias:?}"),
                "use 1 to 128 visible ASCII characters without spaces",
            ));
        } else if names.contains(alias) {
            errors.push(invalid(
                &field,
                format!("{alias:?}"),
                "the name stands there already; remove it",
            ));
        }
        names.push(alias.clone());
    }
    if errors.is_empty() {
        Ok(ValidatedDeployment {
            key: key_of(deployment),
            candidates,
            engine: spec.engine.clone(),
            memory_override,
            names,
        })
    } else {
        Err(errors)
    }
}

fn candidate(
    variant: Option<String>,
    field: String,
    model: &ModelSource,
    errors: &mut Vec<FieldError>,
) -> Candidate {
    let sources = [
        ("path", model.path.is_some()),
        ("url", model.url.is_some()),
        ("huggingFace", model.hugging_face.is_some()),
        ("oci", model.oci.is_some()),
        ("persistentVolumeClaim", model.persistent_volume_claim.is_some()),
    ];
    let found: Vec<&str> = sources
        .iter()
        .filter(|(_, set)| *set)
        .map(|(name, _)| *name)
        .collect();
    if found.len() != 1 {
        let text = if found.is_empty() {
            "without a source".to_owned()
        } else {
            format!("with {}", found.join(" and "))
        };
        errors.push(invalid(
            &field,
            text,
            "set exactly one of path, url, huggingFace, oci and persistentVolumeClaim",
        ));
    }
    for (name, set) in [
        ("oci", model.oci.is_some()),
        ("persistentVolumeClaim", model.persistent_volume_claim.is_some()),
        ("signature", model.signature.is_some()),
    ] {
        if set {
            let advice = if name == "signature" {
                "pin the bytes with sha256 instead"
            } else {
                "use path, url or huggingFace"
            };
            errors.push(not_supported(&format!("{field}.{name}"), advice));
        }
    }
    if let Some(path) = model.path.as_ref().filter(|path| !path.starts_with('/')) {
        errors.push(invalid(
            &format!("{field}.path"),
            format!("{path:?}"),
            "it must be an absolute path on the machine that runs the model",
        ));
    }
    if let Some(url) = model
        .url
        .as_ref()
        .filter(|url| !(url.starts_with("https://") || url.starts_with("http://")))
    {
        errors.push(invalid(
            &format!("{field}.url"),
            format!("{url:?}"),
            "it must begin with https:// or http://",
        ));
    }
    let climbs = |text: &str| text.split('/').any(|part| part == "..");
    let places = [
        ("path", model.path.as_deref()),
        (
            "huggingFace.file",
            model.hugging_face.as_ref().map(|hub| hub.file.as_str()),
        ),
    ];
    for (name, place) in places {
        if let Some(place) = place.filter(|place| climbs(place)) {
            errors.push(invalid(
                &format!("{field}.{name}"),
                format!("{place:?}"),
                "write the place itself, without ..; policies go by it",
            ));
        }
    }
    let digest =
        |text: &str| text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if let Some(sha256) = model.sha256.as_ref().filter(|sha256| !digest(sha256)) {
        errors.push(invalid(
            &format!("{field}.sha256"),
            format!("{sha256:?}"),
            "it must be 64 lower-case hexadecimal digits, as sha256sum prints them",
        ));
    }
    let size = model.size.as_ref().map(|quantity| quantity.bytes());
    let size_bytes = size.transpose().unwrap_or_else(|error| {
        errors.push(invalid(
            &format!("{field}.size"),
            format!("{:?}", error.found),
            error.to_string(),
        ));
        None
    });
    Candidate {
        variant,
        field,
        model: model.clone(),
        size_bytes,
    }
}

/// Checks a policy. Its rules that this version cannot hold are not errors: see [`crate::govern::gaps`].
///
/// # Errors
/// Every field that is wrong.
pub fn validate_policy(policy: &GovernancePolicy) -> Result<(), Vec<FieldError>> {
    let mut errors = Vec::new();
    for (field, selector) in [
        ("spec.namespaceSelector", &policy.spec.namespace_selector),
        ("spec.selector", &policy.spec.selector),
    ] {
        if selector
            .as_ref()
            .is_some_and(|selector| !crate::labels::is_sound(selector))
        {
            errors.push(invalid(
                field,
                "with an unknown operator",
                "use In, NotIn, Exists or DoesNotExist; until then the policy covers everything",
            ));
        }
    }
    for rule in &policy.spec.rules.expressions {
        if let Err(why) = crate::govern::expression::compile(&rule.expression) {
            errors.push(invalid(
                &format!("spec.expressions[{}].expression", rule.name),
                format!("{:?}", rule.expression),
                why,
            ));
        }
    }
    for rule in policy
        .spec
        .rules
        .content
        .iter()
        .flat_map(|content| &content.rules)
    {
        if let Err(error) = regex::Regex::new(&rule.pattern) {
            errors.push(invalid(
                &format!("spec.content.rules[{}].pattern", rule.name),
                format!("{:?}", rule.pattern),
                format!("not a regular expression: {error}"),
            ));
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// Checks a probe.
///
/// # Errors
/// Every field that is wrong.
pub fn validate_probe(probe: &HealthProbe) -> Result<(), Vec<FieldError>> {
    let mut errors = Vec::new();
    if probe.spec.checks.is_empty() {
        errors.push(invalid("spec.checks", "empty", "name at least one check"));
    }
    for check in &probe.spec.checks {
        let field = format!("spec.checks[{}]", check.name);
        let expect = check
            .inference
            .as_ref()
            .and_then(|inference| inference.expect.as_ref());
        if let Some(Err(error)) = expect.map(|pattern| regex::Regex::new(pattern)) {
            errors.push(invalid(
                &format!("{field}.inference.expect"),
                format!("{expect:?}"),
                format!("not a regular expression: {error}"),
            ));
        }
        let quantities = [
            ("memory.maximum", check.memory.as_ref().map(|m| &m.maximum)),
            ("disk.minimumFree", check.disk.as_ref().map(|d| &d.minimum_free)),
        ];
        for (name, quantity) in quantities {
            if let Some(Err(error)) = quantity.map(freehold_crds::Quantity::bytes) {
                errors.push(invalid(
                    &format!("{field}.{name}"),
                    format!("{:?}", error.found),
                    error.to_string(),
                ));
            }
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freehold_crds::ModelDeploymentSpec;

    fn deployment(edit: impl FnOnce(&mut ModelDeploymentSpec)) -> ModelDeployment {
        let model = ModelSource {
            path: Some("/m.gguf".into()),
            ..ModelSource::default()
        };
        let mut spec = ModelDeploymentSpec {
            model: Some(model),
            ..ModelDeploymentSpec::default()
        };
        edit(&mut spec);
        let mut deployment = ModelDeployment::new("d", spec);
        deployment.metadata.namespace = Some("default".into());
        deployment
    }

    fn message(deployment: &ModelDeployment) -> String {
        validate_deployment(deployment)
            .unwrap_err()
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("; ")
    }

    #[test]
    fn two_sources_are_named_both() {
        let error = message(&deployment(|spec| {
            spec.model.as_mut().unwrap().url = Some("https://x/y".into())
        }));
        assert_eq!(
            error,
            "spec.model is with path and url: set exactly one of path, url, huggingFace, oci and persistentVolumeClaim"
        );
    }

    #[test]
    fn what_this_version_cannot_do_is_said_so() {
        let errors = validate_deployment(&deployment(|spec| {
            spec.model.as_mut().unwrap().signature =
                Some(freehold_crds::model_deployment::ModelSignature::default());
        }))
        .unwrap_err();
        assert!(errors.iter().all(|error| error.not_supported), "{errors:?}");
    }

    #[test]
    fn every_wrong_field_is_told_at_once() {
        let error = message(&deployment(|spec| {
            spec.model.as_mut().unwrap().sha256 = Some("ABC".into());
            spec.placement.memory = Some("lots".into());
            spec.aliases = vec!["d".into()];
        }));
        for field in ["spec.model.sha256", "spec.placement.memory", "spec.aliases[0]"] {
            assert!(error.contains(field), "{error}");
        }
    }
}
