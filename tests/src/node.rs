//! A whole cluster of one node: controllers, a scheduler, and a kubelet with containerd and a bridge.
//!
//! Needs root, and what `tests/cluster/parts.py` puts into the cache for `control` and `node`. No container
//! registry is asked: images come as OCI archives, see [`Node::import`].

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::Api;
use kube::runtime::wait::await_condition;

use crate::api_server::{ApiServer, Storage, User};
use crate::child::Program;
use crate::parts::part;

/// A node that is not ready by then will not be.
const START: Duration = Duration::from_secs(90);
/// Its name.
pub const NAME: &str = "node-1";

/// A running node with its control plane. Dropping it ends all of it, containers included.
#[derive(Debug)]
pub struct Node {
    // In the order in which they are dropped: who would start containers again goes first.
    programs: Vec<Program>,
    folder: PathBuf,
    /// The API server that it belongs to.
    pub server: ApiServer,
}

impl Node {
    /// Starts everything and waits until the node is ready.
    ///
    /// # Errors
    /// When a part is missing, this is not root, or the node does not become ready.
    pub async fn start(storage: Storage) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "a real node needs root: it makes namespaces, control groups and a bridge"
        );
        let user = |name: &str, group: &str| User {
            name: name.to_owned(),
            groups: vec![group.to_owned()],
        };
        let controllers = user("system:kube-controller-manager", "system:masters");
        let kubelet = user(&format!("system:node:{NAME}"), "system:nodes");
        let allow = ["--allow-privileged=true".to_owned()];
        let server = ApiServer::start_with(storage, &[controllers.clone(), kubelet.clone()], &allow).await?;
        let folder = server.folder().join("node");
        std::fs::create_dir_all(&folder)?;
        let mut node = Self {
            programs: Vec::new(),
            folder,
            server,
        };
        node.start_controllers(&controllers)?;
        node.start_containerd()?;
        node.import(&part("node/pause.tar")?)?;
        node.start_kubelet(&kubelet)?;
        let client = node.server.client().await?;
        let nodes: Api<NodeObject> = Api::all(client);
        let ready = await_condition(nodes.clone(), NAME, |node: Option<&NodeObject>| {
            let conditions = node.and_then(|node| node.status.as_ref()?.conditions.as_ref());
            conditions.is_some_and(|list| list.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
        });
        if tokio::time::timeout(START, ready).await.is_err() {
            let words: Vec<String> = node.programs.iter().map(Program::last_words).collect();
            anyhow::bail!("the node was not ready within {START:?}:\n{}", words.join("\n"));
        }
        Ok(node)
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn socket(&self) -> String {
        self.path("containerd.sock")
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
            self.programs
                .push(Program::start(name, &part(name)?, &arguments, &self.folder)?);
        }
        Ok(())
    }

    fn start_containerd(&mut self) -> Result<()> {
        let parts = unpacked()?;
        let network = self.folder.join("network");
        std::fs::create_dir_all(&network)?;
        let list = serde_json::json!({"cniVersion": "0.4.0", "name": "freehold", "plugins": [
            {"type": "bridge", "bridge": "freehold0", "isGateway": true, "ipam": {
                "type": "host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]], "dataDir": self.path("addresses"),
            }},
        ]});
        std::fs::write(network.join("10-bridge.conflist"), list.to_string())?;
        let configuration = format!(
            r#"version = 2
root = {root:?}
state = {state:?}
[grpc]
address = {socket:?}
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "localhost/pause:1"
# Without CAP_SYS_RESOURCE, as in many virtual machines, runc cannot lower a score.
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = {plugins:?}
conf_dir = {network:?}
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = {runc:?}
"#,
            root = self.path("containerd"),
            state = self.path("containerd-state"),
            socket = self.socket(),
            plugins = parts.join("usr/lib/cni"),
            runc = program(&parts, "runc"),
        );
        let file = self.folder.join("containerd.toml");
        std::fs::write(&file, configuration)?;
        let arguments = [
            search_path(&parts),
            program(&parts, "containerd").display().to_string(),
            format!("--config={}", file.display()),
        ];
        let mut containerd =
            Program::start("containerd", Path::new("/usr/bin/env"), &arguments, &self.folder)?;
        let begun = Instant::now();
        while !Path::new(&self.socket()).exists() {
            if let Some(why) = containerd.ended() {
                anyhow::bail!("{why}");
            }
            ensure!(
                begun.elapsed() < START,
                "containerd did not listen within {START:?}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        self.programs.push(containerd);
        Ok(())
    }

    fn start_kubelet(&mut self, user: &User) -> Result<()> {
        let configuration = serde_json::json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "address": "127.0.0.1", "port": 0, "healthzPort": 0,
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs", "failCgroupV1": false, "failSwapOn": false, "enforceNodeAllocatable": [],
            "containerRuntimeEndpoint": format!("unix://{}", self.socket()),
            "resolvConf": "", "podLogsDir": self.path("logs"), "evictionHard": {"memory.available": "50Mi"},
        });
        let file = self.folder.join("kubelet.json");
        std::fs::write(&file, configuration.to_string())?;
        let kubeconfig = self.server.kubeconfig_as(user)?;
        let arguments = [
            format!("--config={}", file.display()),
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--root-dir={}", self.path("kubelet")),
            format!("--cert-dir={}", self.path("kubelet-certificates")),
            format!("--hostname-override={NAME}"),
        ];
        let kubelet = Program::start("kubelet", &part("kubelet")?, &arguments, &self.folder)?;
        self.programs.insert(0, kubelet);
        Ok(())
    }

    /// Puts an OCI archive into the node's images. Pods use it with `imagePullPolicy: Never`.
    ///
    /// # Errors
    /// When containerd does not take it.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let archive = archive.display().to_string();
        self.containerd(&["image", "import", &archive]).map(drop)
    }

    /// What containerd's own client says.
    fn containerd(&self, arguments: &[&str]) -> Result<String> {
        let parts = unpacked()?;
        let output = Command::new(program(&parts, "ctr"))
            .args(["--address", &self.socket(), "--namespace", "k8s.io"])
            .args(arguments)
            .output()
            .context("failed to start ctr")?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ctr {arguments:?}: {text}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The kubelet first, or it starts again what is stopped.
        if let Some(kubelet) = self.programs.first_mut() {
            kubelet.kill();
        }
        for task in self.containerd(&["task", "ls", "-q"]).unwrap_or_default().lines() {
            let _ = self.containerd(&["task", "rm", "--force", task]);
        }
        self.programs.clear();
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
        let inside = self.folder.display().to_string();
        let mut inside: Vec<&str> = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            .filter(|path| path.starts_with(&inside))
            .collect();
        inside.sort_unstable();
        for path in inside.into_iter().rev() {
            let _ = Command::new("umount").args(["--lazy", path]).status();
        }
        let _ = Command::new("ip").args(["link", "delete", "freehold0"]).output();
    }
}

fn unpacked() -> Result<PathBuf> {
    let containerd = part("node/usr/bin/containerd")?;
    let root = containerd
        .ancestors()
        .nth(3)
        .context("the parts have no folder")?;
    Ok(root.to_owned())
}

fn program(parts: &Path, name: &str) -> PathBuf {
    let usual = parts.join("usr/bin").join(name);
    if usual.is_file() {
        usual
    } else {
        parts.join("usr/sbin").join(name)
    }
}

/// containerd looks for its shim where the shell would.
fn search_path(parts: &Path) -> String {
    let inherited = std::env::var("PATH").unwrap_or_default();
    let (one, other) = (parts.join("usr/bin"), parts.join("usr/sbin"));
    format!("PATH={}:{}:{inherited}", one.display(), other.display())
}
