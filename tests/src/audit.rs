//! What service accounts are granted, and what they ask for: the API server's roles beside its audit log.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

const POLICY: &str = "audit-policy.yaml";
const LOG: &str = "audit.log";

/// Arguments with which kube-apiserver writes down what service accounts ask for, before it answers.
pub(crate) fn arguments(folder: &Path) -> Result<[String; 3]> {
    let policy = "apiVersion: audit.k8s.io/v1\nkind: Policy\nomitStages: [RequestReceived]\nrules: [{level: Metadata, userGroups: [system:serviceaccounts]}]\n";
    std::fs::write(folder.join(POLICY), policy)?;
    Ok([
        format!("--audit-policy-file={}", folder.join(POLICY).display()),
        format!("--audit-log-path={}", folder.join(LOG).display()),
        "--audit-log-mode=blocking".to_owned(),
    ])
}

/// What was asked, in the order of the answers.
#[derive(Clone, Debug, Default)]
pub struct Log {
    events: Vec<Value>,
}

impl Log {
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(LOG);
        if !path.is_file() {
            // Nobody asked for anything yet.
            return Ok(Self::default());
        }
        let text = std::fs::read_to_string(path).context("failed to read the audit log")?;
        // The last line may be written just now.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let events = whole.lines().map(serde_json::from_str).collect::<Result<_, _>>();
        Ok(Self {
            events: events.context("the audit log holds something else")?,
        })
    }

    /// How much was asked so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing was.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Without what lies between two lengths of the same log: a test asked it itself, with an account's token.
    #[must_use]
    pub fn without(mut self, from: usize, to: usize) -> Self {
        self.events.drain(from..to);
        self
    }

    /// Service accounts of a namespace that asked for anything.
    #[must_use]
    pub fn accounts(&self, namespace: &str) -> BTreeSet<String> {
        let prefix = format!("system:serviceaccount:{namespace}:");
        let names = self
            .events
            .iter()
            .filter_map(|event| event["user"]["username"].as_str());
        names
            .filter_map(|name| name.strip_prefix(&prefix).map(str::to_owned))
            .collect()
    }

    /// Verb and resource of everything that a service account asked for, and how often it was refused.
    #[must_use]
    pub fn used(&self, namespace: &str, account: &str) -> BTreeMap<String, u64> {
        let user = format!("system:serviceaccount:{namespace}:{account}");
        let mut used = BTreeMap::new();
        for event in &self.events {
            let about = &event["objectRef"];
            if event["user"]["username"] != user.as_str() || !about.is_object() {
                continue;
            }
            let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let mut name = format!(
                "{} {}/{}",
                word(&event["verb"]),
                word(&about["apiGroup"]),
                word(&about["resource"])
            );
            if let Some(part) = about["subresource"].as_str() {
                name.push('/');
                name.push_str(part);
            }
            // An apply that makes an object is asked as a patch, and needs create as well.
            if event["verb"] == "patch" && event["responseStatus"]["code"] == 201 {
                used.entry(name.replacen("patch", "create", 1)).or_insert(0);
            }
            let refused = u64::from(event["responseStatus"]["code"] == 403);
            *used.entry(name).or_insert(0) += refused;
        }
        used
    }

    /// Complaints about what the accounts of `namespace` asked for: what they were refused, and what no role among
    /// `objects` grants them.
    #[must_use]
    pub fn beyond_grants(&self, objects: &[Value], namespace: &str) -> Vec<String> {
        let mut beyond = Vec::new();
        for account in self.accounts(namespace) {
            let granted = granted(objects, &account);
            for (verb, refused) in self.used(namespace, &account) {
                if refused > 0 {
                    beyond.push(format!("{account} was refused {verb} {refused} times"));
                }
                if !granted.contains(&verb) {
                    beyond.push(format!(
                        "{account} asked for {verb}, which no role of its own grants"
                    ));
                }
            }
        }
        beyond
    }
}

/// Verb and resource of everything that roles and bindings among `objects` grant a service account by its name.
#[must_use]
pub fn granted(objects: &[Value], account: &str) -> BTreeSet<String> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let is_bound = |binding: &&Value| {
        binding["kind"]
            .as_str()
            .is_some_and(|kind| kind.ends_with("Binding"))
            && list(&binding["subjects"])
                .iter()
                .any(|subject| subject["kind"] == "ServiceAccount" && subject["name"] == account)
    };
    let roles: Vec<&Value> = objects
        .iter()
        .filter(is_bound)
        .map(|binding| &binding["roleRef"])
        .collect();
    let mut granted = BTreeSet::new();
    for object in objects {
        let is_meant =
            |role: &&Value| role["kind"] == object["kind"] && role["name"] == object["metadata"]["name"];
        if !roles.iter().any(|role| is_meant(&role)) {
            continue;
        }
        for rule in list(&object["rules"]) {
            let words = |key: &str| -> Vec<String> {
                let words = list(&rule[key]);
                words
                    .iter()
                    .filter_map(Value::as_str)
                    .map(str::to_owned)
                    .collect()
            };
            for (group, resource) in words("apiGroups").iter().flat_map(|group| {
                words("resources")
                    .into_iter()
                    .map(move |resource| (group.clone(), resource))
            }) {
                for verb in words("verbs") {
                    granted.insert(format!("{verb} {group}/{resource}"));
                }
            }
        }
    }
    granted
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(account: &str, verb: &str, resource: &str, code: u16) -> Value {
        json!({"user": {"username": format!("system:serviceaccount:models:{account}")}, "verb": verb,
            "objectRef": {"apiGroup": "", "resource": resource}, "responseStatus": {"code": code}})
    }

    #[test]
    fn what_is_refused_and_what_is_not_granted_is_told() {
        let roles = [
            json!({"kind": "Role", "metadata": {"name": "reader"}, "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "patch"]}]}),
            json!({"kind": "RoleBinding", "roleRef": {"kind": "Role", "name": "reader"}, "subjects": [{"kind": "ServiceAccount", "name": "agent"}]}),
        ];
        let log = |events: Vec<Value>| Log { events };
        let granted = log(vec![
            event("agent", "get", "pods", 200),
            event("agent", "patch", "pods", 200),
        ]);
        assert_eq!(granted.beyond_grants(&roles, "models"), Vec::<String>::new());
        for (beyond, count) in [
            (event("agent", "get", "pods", 403), 1),
            (event("agent", "get", "secrets", 200), 1),
            (event("agent", "get", "secrets", 403), 2),
            // Made by an apply: create was needed.
            (event("agent", "patch", "pods", 201), 1),
            (event("other", "get", "pods", 200), 1),
        ] {
            let found = log(vec![beyond.clone()]).beyond_grants(&roles, "models");
            assert_eq!(found.len(), count, "{beyond}: {found:?}");
        }
        let own = log(vec![event("agent", "get", "secrets", 403)]).without(0, 1);
        assert!(own.beyond_grants(&roles, "models").is_empty());
    }
}
