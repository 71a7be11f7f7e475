//! The owner's own rules, as CEL with a bounded cost.

use std::sync::LazyLock;

use freehold_crds::ModelDeployment;
use kube::ResourceExt;
use kube_cel::KubeCelExt;
use kube_cel::cel::{Context, Program, Value};

/// Loops inside loops multiply; two levels over a spec's short lists stay well under a millisecond.
const MAX_LOOPS: usize = 2;

/// Reads an expression.
///
/// # Errors
/// What is wrong with it, for a person.
pub fn compile(expression: &str) -> Result<Program, String> {
    static LOOPS: LazyLock<Option<regex::Regex>> =
        LazyLock::new(|| regex::Regex::new(r"\b(all|exists|exists_one|map|filter)\s*\(").ok());
    let count = LOOPS
        .as_ref()
        .map_or(0, |loops| loops.find_iter(expression).count());
    if count > MAX_LOOPS {
        return Err(format!(
            "it has {count} loops and at most {MAX_LOOPS} are allowed; split it into several rules"
        ));
    }
    // The parser is another project's: a panic in it must not stop the operator.
    std::panic::catch_unwind(|| Program::compile(expression))
        .map_err(|_| "not a CEL expression".to_owned())?
        .map_err(|error| format!("not a CEL expression: {error}"))
}

/// Whether the expression is true of the deployment.
///
/// # Errors
/// Why it is not, or cannot be told.
pub fn holds(expression: &str, deployment: &ModelDeployment, source: &str) -> Result<(), String> {
    let program = compile(expression)?;
    let mut context = Context::default().with_all();
    let mut object = serde_json::to_value(deployment).map_err(|error| error.to_string())?;
    if let Some(object) = object.as_object_mut() {
        object.remove("status");
    }
    let namespace = deployment.namespace().unwrap_or_default();
    let variables = context
        .add_variable("object", object)
        .and_then(|()| context.add_variable("namespace", namespace))
        .and_then(|()| context.add_variable("source", source.to_owned()));
    variables.map_err(|error| error.to_string())?;
    match program.execute(&context) {
        Ok(Value::Bool(true)) => Ok(()),
        Ok(Value::Bool(false)) => Err(format!("{expression} is false")),
        Ok(other) => Err(format!(
            "{expression} gives {other:?} and must give true or false"
        )),
        Err(error) => Err(format!("{expression} cannot be evaluated: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freehold_crds::ModelDeploymentSpec;

    #[test]
    fn expressions_see_the_object_and_its_source() {
        let mut deployment = ModelDeployment::new("d", ModelDeploymentSpec::default());
        deployment.metadata.namespace = Some("team".into());
        for yes in [
            "object.spec.replicas <= 1",
            "namespace == 'team' && source.startsWith('hf://')",
        ] {
            assert_eq!(holds(yes, &deployment, "hf://a/b"), Ok(()), "{yes}");
        }
        for no in [
            "object.spec.replicas > 1",
            "object.spec.nothing == 1",
            "1 + 1",
            "(((",
        ] {
            assert!(holds(no, &deployment, "hf://a/b").is_err(), "{no}");
        }
    }

    #[test]
    fn costly_expressions_are_refused() {
        for costly in [
            "[1].all(a, [1].all(b, [1].all(c, true)))",
            "[1].all (a, [1].all (b, [1].all (c, true)))",
        ] {
            assert!(compile(costly).is_err(), "{costly}");
        }
    }
}
