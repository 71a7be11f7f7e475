//! The cluster's side of a machine: an account that may speak for this machine alone.
//!
//! The rights come from the chart: its role for agents, and its ValidatingAdmissionPolicy, which reads the machine's name
//! out of the account's. Without that policy an account could write for every machine, so there is no joining then.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use freehold_crds::{InferenceNode, SYSTEM_NAMESPACE};
use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Admin;

/// Who these objects' fields belong to.
const FIELD_MANAGER: &str = "freehold-node-join";
/// Tells what was made here from what a chart made.
const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", FIELD_MANAGER);

/// Where an API server is, and how it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) server: String,
    /// Certificates in PEM; the system's own if absent.
    pub(super) authority: Option<String>,
    /// The name in its certificate, if not that of the address.
    pub(super) tls_server_name: Option<String>,
}

/// The chart's release in the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Release {
    name: String,
    namespace: String,
}

/// The account of one machine.
#[derive(Clone, Debug)]
pub(super) struct Account {
    pub(super) name: String,
    pub(super) namespace: String,
    /// Helm or kustomize made it, and takes it away.
    pub(super) of_chart: bool,
}

impl Admin {
    /// A client with the administrator's rights, and the address as the machine shall use it.
    pub(super) async fn connect(&self) -> Result<(Client, Address)> {
        let named = self
            .kubeconfig
            .clone()
            .or_else(|| std::env::var_os("KUBECONFIG").map(PathBuf::from));
        let kubeconfig = match &named {
            Some(path) => {
                Kubeconfig::read_from(path).with_context(|| format!("failed to read {}", path.display()))?
            }
            None => Kubeconfig::read().context(
                "no kubeconfig is known: name one with --kubeconfig, or join with a token that `freehold node token` made elsewhere",
            )?,
        };
        let mut address = Address::of(&kubeconfig)?;
        if let Some(server) = &self.server {
            address.server.clone_from(server);
        }
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .context("failed to use the kubeconfig")?;
        Ok((Client::try_from(config)?, address))
    }
}

impl Address {
    fn of(kubeconfig: &Kubeconfig) -> Result<Self> {
        let current = kubeconfig.current_context.clone().unwrap_or_default();
        let context = kubeconfig.contexts.iter().find(|named| named.name == current);
        let context = context
            .and_then(|named| named.context.as_ref())
            .with_context(|| format!("the kubeconfig has no context {current:?}"))?;
        let cluster = kubeconfig
            .clusters
            .iter()
            .find(|named| named.name == context.cluster)
            .and_then(|named| named.cluster.as_ref())
            .with_context(|| format!("the kubeconfig has no cluster {:?}", context.cluster))?;
        ensure!(
            !cluster.insecure_skip_tls_verify.unwrap_or_default(),
            "this kubeconfig does not check who the API server is (insecure-skip-tls-verify): the machine would show its token to anybody; put the certificate authority into it"
        );
        let authority = match (
            &cluster.certificate_authority_data,
            &cluster.certificate_authority,
        ) {
            (Some(data), _) => {
                let bytes =
                    decode(data).context("certificate-authority-data of the kubeconfig is no base64")?;
                Some(String::from_utf8(bytes).context("the certificate authority is no PEM")?)
            }
            (None, Some(path)) => {
                Some(std::fs::read_to_string(path).with_context(|| format!("failed to read {path}"))?)
            }
            (None, None) => None,
        };
        Ok(Self {
            server: cluster
                .server
                .clone()
                .context("the kubeconfig names no API server")?,
            authority,
            tls_server_name: cluster.tls_server_name.clone(),
        })
    }

    /// A kubeconfig that shows this: a token, or the file that holds one.
    pub(super) fn kubeconfig(&self, user: &Value) -> Result<String> {
        let mut cluster = json!({"server": self.server});
        if let Some(authority) = &self.authority {
            cluster["certificate-authority-data"] = json!(encode(authority.as_bytes()));
        }
        if let Some(name) = &self.tls_server_name {
            cluster["tls-server-name"] = json!(name);
        }
        let whole = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "freehold",
            "clusters": [{"name": "freehold", "cluster": cluster}],
            "users": [{"name": "freehold", "user": user}],
            "contexts": [{"name": "freehold", "context": {"cluster": "freehold", "user": "freehold", "namespace": SYSTEM_NAMESPACE}}],
        });
        serde_yaml::to_string(&whole).context("failed to write a kubeconfig")
    }

    /// A client that shows this token.
    pub(super) async fn client(&self, token: &str) -> Result<Client> {
        let kubeconfig = Kubeconfig::from_yaml(&self.kubeconfig(&json!({"token": token}))?)?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        Ok(Client::try_from(config)?)
    }
}

fn encode(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn decode(text: &str) -> Result<Vec<u8>> {
    use base64::Engine;
    Ok(base64::engine::general_purpose::STANDARD.decode(text.trim())?)
}

impl Release {
    /// The release whose operator this cluster runs.
    pub(super) async fn find(client: &Client) -> Result<Self> {
        let roles: Api<ClusterRole> = Api::all(client.clone());
        let ours = ListParams::default().labels("app.kubernetes.io/name=freehold");
        let roles = roles.list(&ours).await.context(
            "failed to look for Freehold's roles; joining needs an administrator's rights in the cluster",
        )?;
        let names: Vec<String> = roles.iter().map(ResourceExt::name_any).collect();
        let role = names
            .iter()
            .find_map(|name| name.strip_suffix("-node-agent"))
            .context(
                "this cluster has no role for agents, so Freehold's chart is not installed there: helm install freehold charts/freehold --namespace freehold-system --create-namespace (see docs/install.md)",
            )?;
        let agents = format!("{role}-node-agent");
        let bindings: Api<ClusterRoleBinding> = Api::all(client.clone());
        let binding = bindings
            .get_opt(&agents)
            .await?
            .with_context(|| format!("ClusterRoleBinding {agents} is missing: upgrade the chart"))?;
        let subjects = binding.subjects.unwrap_or_default();
        let namespace = subjects
            .iter()
            .find_map(|subject| subject.namespace.clone())
            .with_context(|| format!("ClusterRoleBinding {agents} binds no account: upgrade the chart"))?;
        let policies: Api<ValidatingAdmissionPolicy> = Api::all(client.clone());
        let in_force: Api<ValidatingAdmissionPolicyBinding> = Api::all(client.clone());
        ensure!(
            policies.get_opt(&agents).await?.is_some() && in_force.get_opt(&agents).await?.is_some(),
            "the ValidatingAdmissionPolicy {agents} is not in force, and without it this machine could write for every other: helm upgrade with admissionPolicy.enabled=true"
        );
        Ok(Self {
            name: role.to_owned(),
            namespace,
        })
    }

    fn account_name(&self, node: &str) -> String {
        format!("{}-host-{node}", self.name)
    }

    /// What the account of a machine consists of.
    pub(super) fn objects(&self, node: &str) -> Vec<Value> {
        let name = self.account_name(node);
        let metadata = |namespace: Option<&str>| {
            let mut metadata = json!({"name": name, "labels": {
                "app.kubernetes.io/name": "freehold",
                "app.kubernetes.io/component": "host-agent",
                MANAGED_BY.0: MANAGED_BY.1,
            }});
            if let Some(namespace) = namespace {
                metadata["namespace"] = json!(namespace);
            }
            metadata
        };
        let subjects = json!([{"kind": "ServiceAccount", "name": name, "namespace": self.namespace}]);
        let role = |kind: &str, name: &str| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name});
        let rbac = "rbac.authorization.k8s.io/v1";
        let agents = format!("{}-node-agent", self.name);
        vec![
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(Some(&self.namespace)),
                "automountServiceAccountToken": false}),
            json!({"apiVersion": rbac, "kind": "Role", "metadata": metadata(Some(&self.namespace)), "rules": [
                {"apiGroups": [""], "resources": ["serviceaccounts/token"], "resourceNames": [name], "verbs": ["create"]},
            ]}),
            json!({"apiVersion": rbac, "kind": "RoleBinding", "metadata": metadata(Some(&self.namespace)),
                "roleRef": role("Role", &name), "subjects": subjects}),
            json!({"apiVersion": rbac, "kind": "RoleBinding", "metadata": {
                    "name": format!("{name}-heartbeat"), "namespace": SYSTEM_NAMESPACE, "labels": metadata(None)["labels"]},
                "roleRef": role("Role", &agents), "subjects": subjects}),
            json!({"apiVersion": rbac, "kind": "ClusterRoleBinding", "metadata": metadata(None),
                "roleRef": role("ClusterRole", &agents), "subjects": subjects}),
        ]
    }

    /// The account of a machine, made if it is not there.
    pub(super) async fn make_account(&self, client: &Client, node: &str) -> Result<Account> {
        let name = self.account_name(node);
        let account = Account {
            name: name.clone(),
            namespace: self.namespace.clone(),
            of_chart: false,
        };
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), &self.namespace);
        let there = accounts.get_opt(&name).await?;
        if there.as_ref().is_some_and(|there| !is_ours(there)) {
            return Ok(Account {
                of_chart: true,
                ..account
            });
        }
        if there.is_none() {
            let machines: Api<InferenceNode> = Api::all(client.clone());
            ensure!(
                machines.get_opt(node).await?.is_none(),
                "there is a machine {node:?} in this cluster, and it is not this one: choose another name with --node, or delete it first: kubectl delete inferencenode {node}"
            );
        }
        for object in self.objects(node) {
            let kind = object["kind"].as_str().unwrap_or_default();
            let namespace = object["metadata"]["namespace"].as_str();
            match (kind, namespace) {
                ("ServiceAccount", Some(namespace)) => {
                    apply::<ServiceAccount>(&Api::namespaced(client.clone(), namespace), &object).await
                }
                ("Role", Some(namespace)) => {
                    apply::<Role>(&Api::namespaced(client.clone(), namespace), &object).await
                }
                ("RoleBinding", Some(namespace)) => {
                    apply::<RoleBinding>(&Api::namespaced(client.clone(), namespace), &object).await
                }
                _ => apply::<ClusterRoleBinding>(&Api::all(client.clone()), &object).await,
            }?;
        }
        Ok(account)
    }

    /// Takes away all that stands for a machine. What there was.
    pub(super) async fn forget(&self, client: &Client, node: &str) -> Result<Vec<String>> {
        let name = self.account_name(node);
        let within = |namespace: &str| (client.clone(), namespace.to_owned());
        let mut gone = Vec::new();
        // The rights first: an agent that still runs somewhere could bring the rest back.
        let (of_release, of_system) = (within(&self.namespace), within(SYSTEM_NAMESPACE));
        let bindings: Api<ClusterRoleBinding> = Api::all(client.clone());
        gone.extend(delete_ours(&bindings, &name).await?);
        let bindings: Api<RoleBinding> = Api::namespaced(of_system.0.clone(), &of_system.1);
        gone.extend(delete_ours(&bindings, &format!("{name}-heartbeat")).await?);
        let bindings: Api<RoleBinding> = Api::namespaced(of_release.0.clone(), &of_release.1);
        gone.extend(delete_ours(&bindings, &name).await?);
        let roles: Api<Role> = Api::namespaced(of_release.0.clone(), &of_release.1);
        gone.extend(delete_ours(&roles, &name).await?);
        let accounts: Api<ServiceAccount> = Api::namespaced(of_release.0, &of_release.1);
        gone.extend(delete_ours(&accounts, &name).await?);
        // Before its InferenceNode: the operator makes that from the Lease.
        let leases: Api<Lease> = Api::namespaced(of_system.0, &of_system.1);
        gone.extend(delete(&leases, node).await?);
        let machines: Api<InferenceNode> = Api::all(client.clone());
        gone.extend(delete(&machines, node).await?);
        Ok(gone)
    }
}

/// A token of an account, for so long.
pub(super) async fn token(client: &Client, namespace: &str, account: &str, life: Duration) -> Result<String> {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let seconds = i64::try_from(life.as_secs()).unwrap_or(i64::MAX);
    let request = TokenRequest {
        spec: TokenRequestSpec {
            expiration_seconds: Some(seconds),
            ..TokenRequestSpec::default()
        },
        ..TokenRequest::default()
    };
    let answer = accounts
        .create_token_request(account, &PostParams::default(), &request)
        .await;
    match answer {
        Ok(answer) => Ok(answer
            .status
            .context("the API server gave a token request without a token")?
            .token),
        Err(kube::Error::Api(status)) if status.code == 401 => {
            bail!(
                "the cluster does not know the token: it has ended, or its account was deleted; make a new one with `freehold node token`"
            )
        }
        Err(error) => Err(error).with_context(|| format!("failed to get a token of {namespace}/{account}")),
    }
}

fn is_ours(object: &impl ResourceExt) -> bool {
    object.labels().get(MANAGED_BY.0).map(String::as_str) == Some(MANAGED_BY.1)
}

async fn apply<K>(api: &Api<K>, object: &Value) -> Result<()>
where
    K: Resource + Clone + std::fmt::Debug + DeserializeOwned,
{
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let parameters = PatchParams::apply(FIELD_MANAGER).force();
    api.patch(name, &parameters, &Patch::Apply(object))
        .await
        .with_context(|| {
            format!(
                "failed to make {} {name}; joining needs an administrator's rights in the cluster",
                object["kind"]
            )
        })?;
    Ok(())
}

async fn delete_ours<K>(api: &Api<K>, name: &str) -> Result<Option<String>>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned,
{
    match api.get_opt(name).await? {
        Some(there) if is_ours(&there) => delete(api, name).await,
        _ => Ok(None),
    }
}

async fn delete<K>(api: &Api<K>, name: &str) -> Result<Option<String>>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned,
{
    let title = format!("{} {name}", K::kind(&()));
    match api.delete(name, &DeleteParams::default()).await {
        Ok(_) => Ok(Some(title)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(error).with_context(|| {
            format!("failed to delete {title}; leaving needs an administrator's rights in the cluster")
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kubeconfig(cluster: &str) -> Kubeconfig {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\nclusters: [{{name: k, cluster: {cluster}}}]\n"
        );
        Kubeconfig::from_yaml(&text).expect("it reads")
    }

    #[test]
    fn an_api_server_that_nobody_checks_gets_no_token() {
        let found = Address::of(&kubeconfig(
            "{server: \"https://a\", insecure-skip-tls-verify: true}",
        ));
        assert!(found.expect_err("refused").to_string().contains("to anybody"));
        let found = Address::of(&kubeconfig(
            "{server: \"https://a\", certificate-authority-data: YQ==}",
        ));
        assert_eq!(found.expect("an address").authority.as_deref(), Some("a"));
    }

    #[test]
    fn the_account_bears_the_machines_name_and_gets_the_charts_roles() {
        let release = Release {
            name: "freehold".into(),
            namespace: "models".into(),
        };
        let objects = release.objects("attic");
        assert_eq!(objects.len(), 5);
        for object in &objects {
            let name = object["metadata"]["name"].as_str().expect("a name");
            assert!(name.starts_with("freehold-host-attic"), "{name}");
            assert_eq!(object["metadata"]["labels"][MANAGED_BY.0], MANAGED_BY.1);
        }
        let rules = objects[1]["rules"].to_string();
        assert!(
            rules.contains("\"resourceNames\":[\"freehold-host-attic\"]"),
            "{rules}"
        );
    }
}
