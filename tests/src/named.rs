//! A cluster of the reader's own in the place of the one that a test would start: `FREEHOLD_TEST_KUBECONFIG`.
//!
//! The tests install Freehold's kinds, change and delete them, and make namespaces. So the cluster must not hold any of
//! that before, one test has it at a time, and afterwards all of it is taken away again. Everything else stays as it is:
//! machines that tests play bear names that no real one has ([`played`]), and an admission policy keeps the chart's pods
//! from starting on real ones, where they would make folders.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::parts::kubectl;

const VARIABLE: &str = "FREEHOLD_TEST_KUBECONFIG";
/// The groups of the kinds that tests install.
const GROUPS: [&str; 2] = [".freehold.dev", ".test.example.com"];
/// What tests make beside namespaces of their own.
const NAMESPACES: [&str; 3] = ["freehold-system", "models", "locked"];
/// What the names of played machines and of the guarding policy begin with, whichever process made them.
const OURS: &str = "freehold-test-";
/// An admission policy that is not in force by then never will be.
const IN_FORCE: Duration = Duration::from_secs(60);
/// Kinds outside namespaces of which the chart makes some, by its label.
const CHART_KINDS: &str =
    "clusterroles,clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings";

/// One test at a time: they would take each other's kinds away.
static ALONE: LazyLock<Arc<Mutex<()>>> = LazyLock::new(Arc::default);

/// Whether tests run on a cluster of the reader's own.
#[must_use]
pub fn is_named() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// What the names of this process's own namespaces begin with.
#[must_use]
pub fn namespace_prefix() -> String {
    format!("c{}-", std::process::id())
}

/// The name of a Node that a test plays: no machine stands behind it, and no real one is called so. Nodes of such names,
/// and pods bound to them, are all that is deleted of a cluster's own kinds outside the tests' namespaces.
#[must_use]
pub fn played(role: &str) -> String {
    format!("{OURS}{}-{role}", std::process::id())
}

/// The policy that keeps the chart's pods from real machines while a test has the cluster.
fn guard() -> String {
    format!("{OURS}{}", std::process::id())
}

/// That cluster, lent to one test. Dropping it takes away what the tests made there.
#[derive(Debug)]
pub struct NamedCluster {
    /// As the reader gave it, with its paths made absolute.
    pub kubeconfig: Kubeconfig,
    path: PathBuf,
    /// What it holds of the tests' kinds was made by tests, and may be taken away.
    is_ours: bool,
    _alone: OwnedMutexGuard<()>,
}

impl NamedCluster {
    /// The cluster that the environment names, if any, once no other test has it.
    ///
    /// # Errors
    /// When it cannot be reached, or holds already what the tests would delete.
    pub async fn borrow() -> Result<Option<Self>> {
        match std::env::var_os(VARIABLE) {
            Some(path) => Self::of(PathBuf::from(path)).await.map(Some),
            None => Ok(None),
        }
    }

    /// The cluster of this kubeconfig, once no other test has it.
    ///
    /// # Errors
    /// As [`Self::borrow`].
    pub async fn of(path: PathBuf) -> Result<Self> {
        let kubeconfig = Kubeconfig::read_from(&path)
            .with_context(|| format!("{VARIABLE} names {}, which is no kubeconfig", path.display()))?;
        let options = KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(kubeconfig.clone(), &options).await;
        config.with_context(|| format!("the current context of {} is not whole", path.display()))?;
        let mut cluster = Self {
            kubeconfig,
            path,
            is_ours: false,
            _alone: ALONE.clone().lock_owned().await,
        };
        cluster.is_free()?;
        cluster.is_ours = true;
        cluster.keep_pods_off()?;
        Ok(cluster)
    }

    /// Its kubeconfig's file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn is_free(&self) -> Result<()> {
        let mut found = self.names("customresourcedefinitions")?;
        found.retain(|name| GROUPS.iter().any(|group| name.ends_with(group)));
        let mut namespaces = self.names("namespaces")?;
        namespaces.retain(|name| NAMESPACES.contains(&name.as_str()));
        found.extend(namespaces.iter().map(|name| format!("namespace {name}")));
        for (kind, what) in [("nodes", "node"), ("validatingadmissionpolicies", "policy")] {
            let mut left = self.names(kind)?;
            left.retain(|name| name.starts_with(OURS));
            found.extend(left.iter().map(|name| format!("{what} {name}")));
        }
        ensure!(
            found.is_empty(),
            "the cluster of {VARIABLE} ({}) holds {} already. These tests install, change and delete those: name a \
             cluster without Freehold, or take them away first",
            self.path.display(),
            found.join(", ")
        );
        Ok(())
    }

    /// The chart's pods would start on the cluster's own machines, and make folders there. Nothing here needs them to.
    fn keep_pods_off(&self) -> Result<()> {
        let name = guard();
        let message = format!(
            "a test run of Freehold keeps its chart's pods off real machines; if none is under way, delete \
             validatingadmissionpolicybinding and validatingadmissionpolicy {name}"
        );
        let group = "admissionregistration.k8s.io/v1";
        let policy = json!({"apiVersion": group, "kind": "ValidatingAdmissionPolicy", "metadata": {"name": name}, "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}]},
            "matchConditions": [
                {"name": "of-the-chart",
                    "expression": "object.metadata.?labels['app.kubernetes.io/name'].orValue('') == 'freehold'"},
                // What is only tried starts nowhere; the pod below finds out whether the policy is in force.
                {"name": "made-for-good", "expression": format!(
                    "!has(request.dryRun) || !request.dryRun || object.metadata.?name.orValue('') == '{name}'")},
            ],
            "validations": [{"message": message,
                "expression": format!("object.spec.?nodeName.orValue('').startsWith('{OURS}')")}],
        }});
        let binding = json!({"apiVersion": group, "kind": "ValidatingAdmissionPolicyBinding", "metadata": {"name": name},
            "spec": {"policyName": name, "validationActions": ["Deny"]}});
        for object in [&policy, &binding] {
            self.told(&["apply", "--server-side", "-f", "-"], object)?;
        }
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [{"name": "a", "image": "a"}]},
            "metadata": {"name": name, "namespace": "default", "labels": {"app.kubernetes.io/name": "freehold"}}});
        let begun = Instant::now();
        loop {
            let last = match self.told(&["create", "--dry-run=server", "-f", "-"], &pod) {
                Err(refused) if format!("{refused:#}").contains(&message) => return Ok(()),
                Err(other) => format!("{other:#}"),
                Ok(said) => said,
            };
            ensure!(
                begun.elapsed() < IN_FORCE,
                "the policy {name} is not in force after {IN_FORCE:?}; last seen: {last}"
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn clean(&self) -> Result<()> {
        // No kubelet ends the pods of a played machine.
        let mut nodes = self.names("nodes")?;
        nodes.retain(|name| name.starts_with(&played("")));
        for node in &nodes {
            let field = format!("--field-selector=spec.nodeName={node}");
            self.kubectl(&["delete", "pods", "-A", &field, "--grace-period=0", "--force"])?;
        }
        self.delete("nodes", &nodes)?;
        let chart = ["delete", CHART_KINDS, "-l", "app.kubernetes.io/name=freehold"];
        self.kubectl(&chart)?;
        let mut kinds = self.names("customresourcedefinitions")?;
        kinds.retain(|name| GROUPS.iter().any(|group| name.ends_with(group)));
        for kind in &kinds {
            self.release(kind, "--all-namespaces")?;
        }
        self.delete("customresourcedefinitions", &kinds)?;
        let mut namespaces = self.names("namespaces")?;
        let prefix = namespace_prefix();
        namespaces.retain(|name| NAMESPACES.contains(&name.as_str()) || name.starts_with(&prefix));
        for namespace in &namespaces {
            let place = format!("--namespace={namespace}");
            self.release("configmaps,secrets,services,leases", &place)?;
        }
        // A case's own name comes never again: it need not be gone yet.
        let (ours, cases): (Vec<_>, Vec<_>) = namespaces
            .into_iter()
            .partition(|name| NAMESPACES.contains(&name.as_str()));
        if !cases.is_empty() {
            let mut arguments = vec!["delete", "namespaces", "--wait=false"];
            arguments.extend(cases.iter().map(String::as_str));
            self.kubectl(&arguments)?;
        }
        self.delete("namespaces", &ours)?;
        // Last: nothing is left that would make pods.
        for kind in ["validatingadmissionpolicybindings", "validatingadmissionpolicies"] {
            self.delete(kind, &[guard()])?;
        }
        Ok(())
    }

    /// Nobody is left who would end what finalizers hold.
    fn release(&self, kinds: &str, place: &str) -> Result<()> {
        let columns = "jsonpath={range .items[?(@.metadata.finalizers)]}{.metadata.namespace}/{.kind}/{.metadata.name} {end}";
        let held = self.kubectl(&["get", kinds, place, "-o", columns])?;
        for held in held.split_whitespace() {
            let mut parts = held.splitn(3, '/');
            let (Some(namespace), Some(kind), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
                continue;
            };
            let mut arguments = vec!["patch", kind, name, "--type=merge", "-p"];
            arguments.push(r#"{"metadata":{"finalizers":null}}"#);
            let namespace = format!("--namespace={namespace}");
            if namespace != "--namespace=" {
                arguments.push(&namespace);
            }
            self.kubectl(&arguments)?;
        }
        Ok(())
    }

    fn delete(&self, kind: &str, names: &[String]) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let mut arguments = vec!["delete", kind, "--ignore-not-found", "--timeout=120s"];
        arguments.extend(names.iter().map(String::as_str));
        self.kubectl(&arguments).map(drop)
    }

    fn names(&self, kind: &str) -> Result<Vec<String>> {
        let said = self.kubectl(&["get", kind, "-o", "jsonpath={.items[*].metadata.name}"])?;
        Ok(said.split_whitespace().map(str::to_owned).collect())
    }

    fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.told(arguments, &Value::Null)
    }

    /// kubectl, with this object to read.
    fn told(&self, arguments: &[&str], object: &Value) -> Result<String> {
        let mut command = Command::new(kubectl()?);
        command.args(arguments).env("KUBECONFIG", &self.path);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("failed to start kubectl")?;
        if let Some(mut input) = child.stdin.take() {
            // One that reads nothing may end before this is written.
            let _ = input.write_all(object.to_string().as_bytes());
        }
        let output = child.wait_with_output().context("failed to hear kubectl")?;
        ensure!(
            output.status.success(),
            "on the cluster of {VARIABLE} ({}), kubectl {} failed: {}",
            self.path.display(),
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for NamedCluster {
    fn drop(&mut self) {
        if !self.is_ours {
            return;
        }
        if let Err(error) = self.clean() {
            eprintln!("{error:#}");
        }
    }
}
