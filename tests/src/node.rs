//! One node of a cluster: containerd, kubelet and kube-proxy in a network namespace of their own.
//!
//! No container registry is asked: images come as OCI archives, see [`Node::import`].

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::child::Program;
use crate::network::Space;
use crate::parts::part;

/// A part that does not listen by then will not.
const START: Duration = Duration::from_secs(60);

/// A running node. Dropping it ends all of it, containers included.
#[derive(Debug)]
pub struct Node {
    /// Its name in the cluster.
    pub name: String,
    /// Its network.
    pub space: Space,
    folder: PathBuf,
    /// A path that leads to another folder on every node, as every path does on machines.
    host_folder: PathBuf,
    kubeconfig: PathBuf,
    /// First two numbers of its pods' addresses, and the third.
    pods: String,
    kubelet: Option<Program>,
    others: Vec<Program>,
    groups: Vec<PathBuf>,
}

impl Node {
    /// Starts one, whose pods get addresses of 10.99.`number`.0/24. It is not ready yet.
    ///
    /// # Errors
    /// When a part is missing or does not start.
    pub fn start(
        name: &str,
        number: u8,
        space: &Space,
        kubeconfig: &Path,
        proxy_kubeconfig: &Path,
        folder: &Path,
        host_folder: &Path,
    ) -> Result<Self> {
        std::fs::create_dir_all(folder.join("host"))?;
        let mut node = Self {
            name: name.to_owned(),
            space: space.clone(),
            folder: folder.to_owned(),
            host_folder: host_folder.to_owned(),
            kubeconfig: kubeconfig.to_owned(),
            pods: format!("10.99.{number}"),
            kubelet: None,
            others: Vec::new(),
            groups: Vec::new(),
        };
        for setting in ["net/ipv4/ip_forward", "net/bridge/bridge-nf-call-iptables"] {
            space.set(setting, "1")?;
        }
        node.make_groups()?;
        node.start_containerd()?;
        node.import(&part("node/pause.tar")?)?;
        node.start_proxy(proxy_kubeconfig)?;
        node.masquerade()?;
        node.start_kubelet()?;
        Ok(node)
    }

    /// The subnet of its pods.
    #[must_use]
    pub fn pod_subnet(&self) -> String {
        format!("{}.0/24", self.pods)
    }

    /// Makes a folder in the node's own folder for volumes of the host, and says where this machine sees it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make_host_folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join("host").join(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn socket(&self) -> String {
        self.path("containerd.sock")
    }

    fn group(&self) -> String {
        self.space.name.clone()
    }

    /// The control groups under which its pods lie: kubelets that share them would end each other's pods.
    fn make_groups(&mut self) -> Result<()> {
        for root in group_roots() {
            let group = root.join(self.group());
            std::fs::create_dir_all(&group).with_context(|| format!("failed to make {}", group.display()))?;
            // A group of processors and memory has none until it is told.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(all) = std::fs::read(root.join(file)) {
                    std::fs::write(group.join(file), all)?;
                }
            }
            self.groups.push(group);
        }
        Ok(())
    }

    /// Starts a program within the node's network, and its mounts once containerd has made them.
    fn program(
        &self,
        name: &str,
        environment: &[String],
        program: &Path,
        arguments: &[String],
    ) -> Result<Program> {
        let [nsenter, space, end] = self.space.enter();
        let mut all = vec![space];
        match self.others.first() {
            Some(containerd) => all.extend([format!("--mount=/proc/{}/ns/mnt", containerd.id()), end]),
            None => {
                let script = "mount --bind \"$1\" \"$2\" && shift 2 && exec \"$@\"";
                let unshare = [
                    "unshare",
                    "--mount",
                    "--propagation",
                    "private",
                    "sh",
                    "-c",
                    script,
                    "node",
                ];
                all.push(end);
                all.extend(unshare.map(str::to_owned));
                all.extend([self.path("host"), self.host_folder.display().to_string()]);
            }
        }
        all.push("env".to_owned());
        all.extend_from_slice(environment);
        all.push(program.display().to_string());
        all.extend_from_slice(arguments);
        let nsenter = PathBuf::from("/usr/bin").join(nsenter);
        Program::start(name, &nsenter, &all, &self.folder)
    }

    fn start_containerd(&mut self) -> Result<()> {
        let parts = unpacked()?;
        let network = self.folder.join("network");
        std::fs::create_dir_all(&network)?;
        let list = serde_json::json!({"cniVersion": "0.4.0", "name": "freehold", "plugins": [
            {"type": "bridge", "bridge": "pods0", "isGateway": true, "hairpinMode": true, "ipam": {
                "type": "host-local", "ranges": [[{"subnet": self.pod_subnet()}]],
                "routes": [{"dst": "0.0.0.0/0"}], "dataDir": self.path("addresses"),
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
# In the folder of the test, and gone with it.
netns_mounts_under_state_dir = true
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
        let arguments = [format!("--config={}", file.display())];
        let mut containerd = self.program(
            "containerd",
            &[search_path(&parts)],
            &program(&parts, "containerd"),
            &arguments,
        )?;
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
        self.others.push(containerd);
        Ok(())
    }

    /// What pods send to others than pods goes out under the node's address, as most networks of clusters have it:
    /// who is asked need not know the way to a pod.
    fn masquerade(&self) -> Result<()> {
        let parts = unpacked()?;
        let rules = format!(
            "add table ip freehold-tests
add chain ip freehold-tests out {{ type nat hook postrouting priority srcnat; }}
add rule ip freehold-tests out ip saddr {} ip daddr != 10.99.0.0/16 masquerade
",
            self.pod_subnet()
        );
        let file = self.folder.join("masquerade.nft");
        std::fs::write(&file, rules)?;
        let output = Command::new("nsenter")
            .args(&self.space.enter()[1..])
            .args(["env", &libraries(&parts)?])
            .arg(program(&parts, "nft"))
            .arg("--file")
            .arg(&file)
            .output()
            .context("failed to start nft")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "nft: {}", errors.trim());
        Ok(())
    }

    /// Services become rules of nftables in the node's namespace.
    fn start_proxy(&mut self, kubeconfig: &Path) -> Result<()> {
        let parts = unpacked()?;
        let configuration = serde_json::json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "nftables",
            "clientConnection": {"kubeconfig": kubeconfig}, "hostnameOverride": self.name,
            "clusterCIDR": "10.99.0.0/16", "healthzBindAddress": "127.0.0.1:10256", "metricsBindAddress": "127.0.0.1:10249",
            // The whole machine's, not this namespace's.
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        });
        let file = self.folder.join("kube-proxy.json");
        std::fs::write(&file, configuration.to_string())?;
        let environment = [search_path(&parts), libraries(&parts)?];
        let arguments = [format!("--config={}", file.display())];
        let proxy = self.program("kube-proxy", &environment, &part("kube-proxy")?, &arguments)?;
        self.others.push(proxy);
        Ok(())
    }

    /// NetworkPolicies become rules of the node's packet filter.
    ///
    /// # Errors
    /// When a part is missing or does not start.
    pub fn start_router(&mut self, kubeconfig: &Path) -> Result<()> {
        let parts = unpacked()?;
        let libraries = libraries(&parts)?;
        let extensions = libraries.replacen("LD_LIBRARY_PATH", "XTABLES_LIBDIR", 1) + "/xtables";
        let lock = format!("XTABLES_LOCKFILE={}", self.path("xtables.lock"));
        let environment = [search_path(&parts), libraries, extensions, lock];
        let arguments = [
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--hostname-override={}", self.name),
            "--run-firewall=true".to_owned(),
            "--run-router=false".to_owned(),
            "--run-service-proxy=false".to_owned(),
            "--run-loadbalancer=false".to_owned(),
            "--service-cluster-ip-range=10.43.0.0/24".to_owned(),
            // Nobody reads them.
            "--health-port=0".to_owned(),
            "--metrics-port=0".to_owned(),
        ];
        let router = self.program("kube-router", &environment, &part("kube-router")?, &arguments)?;
        self.others.push(router);
        Ok(())
    }

    /// Starts the kubelet, at first or after [`Self::kill_kubelet`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_kubelet(&mut self) -> Result<()> {
        let configuration = serde_json::json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs", "cgroupRoot": format!("/{}", self.group()),
            "failCgroupV1": false, "failSwapOn": false, "enforceNodeAllocatable": [],
            "containerRuntimeEndpoint": format!("unix://{}", self.socket()),
            "resolvConf": "", "podLogsDir": self.path("logs"), "evictionHard": {"memory.available": "50Mi"},
            "nodeStatusUpdateFrequency": "5s",
        });
        let file = self.folder.join("kubelet.json");
        std::fs::write(&file, configuration.to_string())?;
        let arguments = [
            format!("--config={}", file.display()),
            format!("--kubeconfig={}", self.kubeconfig.display()),
            format!("--root-dir={}", self.path("kubelet")),
            format!("--cert-dir={}", self.path("kubelet-certificates")),
            format!("--hostname-override={}", self.name),
            format!("--node-ip={}", self.space.address),
        ];
        self.kubelet = Some(self.program("kubelet", &[], &part("kubelet")?, &arguments)?);
        Ok(())
    }

    /// Kills the kubelet; containers stay.
    pub fn kill_kubelet(&mut self) {
        self.kubelet = None;
    }

    /// Process ids of its programs by name.
    #[must_use]
    pub fn process_ids(&self) -> Vec<u32> {
        self.kubelet.iter().chain(&self.others).map(Program::id).collect()
    }

    /// The ends of its logs.
    #[must_use]
    pub fn last_words(&self) -> String {
        let programs = self.kubelet.iter().chain(&self.others);
        programs.map(Program::last_words).collect::<Vec<_>>().join("\n")
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
    ///
    /// # Errors
    /// What it complains of.
    pub fn containerd(&self, arguments: &[&str]) -> Result<String> {
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
        self.kubelet = None;
        for task in self.containerd(&["task", "ls", "-q"]).unwrap_or_default().lines() {
            let _ = self.containerd(&["task", "rm", "--force", task]);
        }
        self.others.clear();
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
        // Shims outlive containerd, and each has the folder in its arguments.
        end_shims(&self.folder);
        for group in &self.groups {
            remove_groups(group);
        }
    }
}

fn end_shims(folder: &Path) {
    let inside = folder.display().to_string();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(words) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let words = String::from_utf8_lossy(&words);
        if words.contains("containerd-shim") && words.contains(&inside) {
            let process = entry.file_name().to_string_lossy().into_owned();
            let _ = Command::new("kill").args(["-KILL", &process]).output();
        }
    }
}

/// Folders in which control groups lie, one a controller with the older kind.
fn group_roots() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect()
}

/// Ends what runs in the control groups of tests that were killed, and removes them.
pub(crate) fn sweep_groups() {
    for root in group_roots() {
        for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
            if crate::network::is_left(&entry.file_name().to_string_lossy()) {
                kill_group(&entry.path());
                // What was killed leaves its group a moment later.
                for _ in 0..40 {
                    remove_groups(&entry.path());
                    if !entry.path().exists() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }
}

fn kill_group(path: &Path) {
    for process in std::fs::read_to_string(path.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
    {
        let _ = Command::new("kill").args(["-KILL", process]).output();
    }
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            kill_group(&entry.path());
        }
    }
}

/// A control group goes only when those in it are gone; its files cannot be removed.
pub(crate) fn remove_groups(path: &Path) {
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(path);
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

/// Where nft finds its libraries.
fn libraries(parts: &Path) -> Result<String> {
    let folder = std::fs::read_dir(parts.join("usr/lib"))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.join("libnftables.so.1").exists())
        .context("libnftables is missing: python3 tests/cluster/parts.py CACHE node")?;
    Ok(format!("LD_LIBRARY_PATH={}", folder.display()))
}

/// containerd looks for its shim where the shell would.
fn search_path(parts: &Path) -> String {
    let inherited = std::env::var("PATH").unwrap_or_default();
    let (one, other) = (parts.join("usr/bin"), parts.join("usr/sbin"));
    format!("PATH={}:{}:{inherited}", one.display(), other.display())
}
