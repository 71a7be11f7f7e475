//! A whole cluster: a real API server, controllers and scheduler on this machine, and nodes behind a bridge.
//!
//! ```text
//!  API server, controllers ── bridge ─┬─ namespace: kubelet, containerd, kube-proxy ── pods 10.99.1.0/24
//!                                     └─ namespace: kubelet, containerd, kube-proxy ── pods 10.99.2.0/24
//! ```
//! Needs root, and what `tests/cluster/parts.py` puts into the cache for `control` and `node`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::Api;
use kube::api::ListParams;

use crate::api_server::{ApiServer, Storage, User};
use crate::child::Program;
use crate::network::Network;
use crate::node::Node;
use crate::parts::part;

/// A node that is not ready by then will not be.
const START: Duration = Duration::from_secs(120);

/// As whom NetworkPolicies are read.
const ROUTER: &str = "kube-router";

/// A running cluster. Dropping it ends all of it.
#[derive(Debug)]
pub struct Cluster {
    // In the order in which they are dropped: who would start containers again goes first.
    controllers: Vec<Program>,
    /// Its nodes, `node-1` and on.
    pub nodes: Vec<Node>,
    /// Its API server.
    pub server: ApiServer,
    /// The bridge between them.
    pub network: Network,
}

impl Cluster {
    /// Starts one and waits until every node is ready.
    ///
    /// # Errors
    /// When a part is missing, this is not root, or a node does not become ready.
    pub async fn start(storage: Storage, nodes: u8) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "a real cluster needs root: it makes namespaces, control groups and bridges"
        );
        let user = |name: &str, group: &str| User {
            name: name.to_owned(),
            groups: vec![group.to_owned()],
        };
        let controllers = user("system:kube-controller-manager", "system:masters");
        // Bound by the API server's own roles.
        let proxy = user("system:kube-proxy", "system:node-proxier");
        let router = user(ROUTER, "system:masters");
        let names: Vec<String> = (1..=nodes).map(|number| format!("node-{number}")).collect();
        let mut users = vec![controllers.clone(), proxy.clone(), router];
        let kubelets: Vec<User> = names
            .iter()
            .map(|name| user(&format!("system:node:{name}"), "system:nodes"))
            .collect();
        users.extend(kubelets.clone());
        let arguments = [
            "--allow-privileged=true".to_owned(),
            // Pods reach the API server through its Service.
            "--endpoint-reconciler-type=master-count".to_owned(),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
        ];
        let mut network = Network::new()?;
        let server = ApiServer::start_at(network.address(), storage, &users, &arguments).await?;
        let proxy = server.kubeconfig_as(&proxy)?;
        let spaces = names
            .iter()
            .map(|_| network.space())
            .collect::<Result<Vec<_>>>()?;
        let mut cluster = Self {
            controllers: Vec::new(),
            nodes: Vec::new(),
            server,
            network,
        };
        cluster.start_controllers(&controllers)?;
        for (index, name) in names.iter().enumerate() {
            let kubeconfig = cluster.server.kubeconfig_as(&kubelets[index])?;
            let folder = cluster.server.folder().join(name);
            let number = u8::try_from(index + 1)?;
            let host_folder = cluster.host_folder();
            std::fs::create_dir_all(&host_folder)?;
            let node = Node::start(
                name,
                number,
                &spaces[index],
                &kubeconfig,
                &proxy,
                &folder,
                &host_folder,
            )?;
            cluster.nodes.push(node);
        }
        cluster.route()?;
        cluster.until_ready().await?;
        Ok(cluster)
    }

    /// Has every node keep NetworkPolicies from now on, as k3s does: with kube-router.
    ///
    /// # Errors
    /// When it is missing (`tests/cluster/parts.py CACHE policies`) or does not start.
    pub fn keep_policies(&mut self) -> Result<()> {
        let kubeconfig = self.server.kubeconfig_as(&User {
            name: ROUTER.to_owned(),
            groups: vec!["system:masters".to_owned()],
        })?;
        for node in &mut self.nodes {
            node.start_router(&kubeconfig)?;
        }
        Ok(())
    }

    /// Process ids of the controller manager and the scheduler, in this order.
    #[must_use]
    pub fn process_ids(&self) -> Vec<u32> {
        self.controllers.iter().map(Program::id).collect()
    }

    /// A path that leads to another folder on every node, for volumes of the host. Other paths are this machine's.
    #[must_use]
    pub fn host_folder(&self) -> PathBuf {
        self.server.folder().join("host")
    }

    /// Every node and this machine know on which node a pod's address is.
    fn route(&self) -> Result<()> {
        for to in &self.nodes {
            let (subnet, via) = (to.pod_subnet(), to.space.address.to_string());
            for from in self.nodes.iter().filter(|from| from.name != to.name) {
                from.space.ip(&["route", "add", &subnet, "via", &via])?;
            }
            self.network.route(&subnet, &via)?;
        }
        Ok(())
    }

    fn start_controllers(&mut self, user: &User) -> Result<()> {
        let kubeconfig = self.server.kubeconfig_as(user)?;
        let server = |name: &str| self.server.folder().join(name).display().to_string();
        let shared = [
            format!("--kubeconfig={}", kubeconfig.display()),
            "--leader-elect=false".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
            // Nobody reads them: the probes of these two.
            "--secure-port=0".to_owned(),
        ];
        let mut controllers = shared.to_vec();
        controllers.push(format!(
            "--service-account-private-key-file={}",
            server("service-account.key")
        ));
        controllers.push(format!("--root-ca-file={}", server("certificates/apiserver.crt")));
        for (name, arguments) in [
            ("kube-controller-manager", controllers),
            ("kube-scheduler", shared.to_vec()),
        ] {
            let folder = self.server.folder();
            self.controllers
                .push(Program::start(name, &part(name)?, &arguments, folder)?);
        }
        Ok(())
    }

    /// Waits until every node is ready.
    ///
    /// # Errors
    /// When one does not become so; the last words of its programs are in the error.
    pub async fn until_ready(&self) -> Result<()> {
        let nodes: Api<NodeObject> = Api::all(self.server.client().await?);
        let begun = Instant::now();
        loop {
            let found = nodes.list(&ListParams::default()).await?.items;
            let is_ready = |node: &NodeObject| {
                let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
                conditions.is_some_and(|list| list.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
            };
            if found.iter().filter(|node| is_ready(node)).count() == self.nodes.len() {
                return Ok(());
            }
            if begun.elapsed() > START {
                let words: Vec<String> = self.nodes.iter().map(Node::last_words).collect();
                anyhow::bail!("the nodes were not ready within {START:?}:\n{}", words.join("\n"));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
