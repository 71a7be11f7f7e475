//! Three machines with the chart on them, and what a person sees of it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use freehold_tests::api_server::Storage;
use freehold_tests::cluster::Cluster;
use freehold_tests::machine::Machine;
use freehold_tests::node::Node;
use freehold_tests::parts::cache;
use freehold_tests::person::{Person, chart, previous_chart};
use serde_json::{Value, json};

/// The label by which a namespace takes no pod that asks for more than any needs.
const RESTRICTED: &str = "pod-security.kubernetes.io/enforce=restricted";
pub const PATIENCE: Duration = Duration::from_secs(120);
/// The file that all machines have in a folder of their own.
pub const MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Two pools: the machines of the house, and one in the attic that holds little.
pub const VALUES: &str = "
image: {pullPolicy: Never}
# A lone operator on a machine that is cut off would be cut off with it.
operator: {nodeSelector: {freehold.dev/pool: attic}}
nodeAgent:
  log: info
  store: {hostPath: STORE}
  extraVolumes: [{name: mine, hostPath: {path: MODELS}}]
  extraVolumeMounts: [{name: mine, mountPath: /models, readOnly: true}]
  pools:
    default: {labels: {room: house}}
    attic: {labels: {room: attic}, memoryLimit: 400Mi}
";

/// A file that an agent fetches from a hub into a volume of its own: nothing here needs more than Pod Security
/// `restricted` lets a pod have.
const RESTRICTED_VALUES: &str = "
image: {pullPolicy: Never}
nodeAgent:
  log: info
  store: {type: ephemeral, ephemeral: {storageClassName: by-hand, size: 1Gi}}
  hub: {endpoint: HUB}
  pools: {default: {}, attic: {}}
";

/// The version of the images that are tested, and the one before.
const VERSION: &str = "0.1.0";
const PREVIOUS: &str = "0.0.1";

/// Which chart is installed.
#[derive(Clone, Copy, Debug)]
pub enum Chart {
    /// This tree's.
    Ours,
    /// The version's before.
    Previous,
}

pub struct World {
    // In the order in which they are dropped: the machine's cable leads to the cluster's bridge.
    pub machine: Option<Machine>,
    pub cluster: Cluster,
    pub person: Person,
    values: String,
    /// What the cluster held before anything was installed.
    before: BTreeSet<String>,
}

impl World {
    /// A cluster with the images on every node. Nothing is installed yet.
    pub async fn make(nodes: u8) -> Self {
        let cluster = Cluster::start(Storage::Kine, nodes).await.unwrap();
        let person = Person::new(Some(cluster.server.kubeconfig()));
        let named = std::env::var_os("FREEHOLD_TEST_IMAGES").map(PathBuf::from);
        let folder = named.unwrap_or_else(|| cache().join("images"));
        for image in ["freehold-operator", "freehold-node-agent"] {
            let archive = folder.join(format!("{image}-{VERSION}.tar"));
            assert!(
                archive.is_file(),
                "no {}: python3 manifests/images/build.py",
                archive.display()
            );
            for node in &cluster.nodes {
                node.import(&archive).unwrap();
                // The programs of the version before, of which there are none yet: the same under its name.
                let [now, before] = [VERSION, PREVIOUS].map(|version| format!("localhost/{image}:{version}"));
                node.containerd(&["image", "tag", &now, &before]).unwrap();
            }
        }
        let last = format!("node-{nodes}");
        person
            .kubectl(&["label", "node", &last, "freehold.dev/pool=attic"], "")
            .unwrap();
        let store = cluster.host_folder().join("store");
        let values = VALUES
            .replace("MODELS", cache().join("models").to_str().unwrap())
            .replace("STORE", store.to_str().unwrap());
        // People's own pods, where the models' clients are.
        let restricted = ["label", "namespace", "default", RESTRICTED];
        let mut world = Self {
            machine: None,
            cluster,
            person,
            values,
            before: BTreeSet::new(),
        };
        world
            .until("people's namespace is restricted", || {
                let said = world.person.kubectl(&restricted, "");
                if said.good { Ok(()) } else { Err(said.errors) }
            })
            .await;
        // The cluster fills its namespaces by itself, in its own time.
        let look = || {
            let holds = world.holds();
            let filled = |namespace: &str| {
                let own = ["ServiceAccount NAME default", "ConfigMap NAME kube-root-ca.crt"];
                own.iter()
                    .all(|own| holds.contains(&own.replace("NAME", namespace)))
            };
            let mut namespaces = holds
                .iter()
                .filter_map(|held| held.strip_prefix("Namespace <none> "));
            if namespaces.all(filled) {
                Ok(holds)
            } else {
                Err(format!("{holds:?}"))
            }
        };
        world.before = world.until("the cluster's namespaces are filled", look).await.0;
        world
    }

    /// Everything within Pod Security `restricted`: a namespace that enforces it, and volumes made by hand that
    /// belong to the agents' user. Models come from this hub.
    pub fn restrict(&mut self, hub: &str) {
        self.values = RESTRICTED_VALUES.replace("HUB", hub);
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "freehold-system",
            "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
        self.person
            .kubectl(&["apply", "-f", "-"], &namespace.to_string())
            .unwrap();
        let class = json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "by-hand"},
            "provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "WaitForFirstConsumer"});
        let mut objects = vec![class];
        let path = self.cluster.host_folder().join("volume");
        for node in &self.cluster.nodes {
            node.make_host_folder("volume").unwrap();
            let terms = json!([{"matchExpressions": [
                {"key": "kubernetes.io/hostname", "operator": "In", "values": [node.name]}]}]);
            objects.push(json!({"apiVersion": "v1", "kind": "PersistentVolume",
                "metadata": {"name": format!("volume-of-{}", node.name)},
                "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"],
                    "storageClassName": "by-hand", "persistentVolumeReclaimPolicy": "Retain",
                    "local": {"path": path}, "nodeAffinity": {"required": {"nodeSelectorTerms": terms}}}}));
        }
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.person
            .kubectl(&["apply", "-f", "-"], &list.to_string())
            .unwrap();
    }

    /// What the cluster holds, but for what happened to it and what it finds by itself at any time.
    pub fn holds(&self) -> BTreeSet<String> {
        let kinds = self
            .person
            .kubectl(&["api-resources", "--verbs=list", "--output=name"], "")
            .unwrap();
        let passing = ["events", "events.events.k8s.io", "componentstatuses"];
        let kinds: Vec<&str> = kinds.lines().filter(|kind| !passing.contains(kind)).collect();
        let kinds = kinds.join(",");
        let columns = "--output=custom-columns=KIND:.kind,NAMESPACE:.metadata.namespace,NAME:.metadata.name";
        let arguments = ["get", &kinds, "--all-namespaces", columns, "--no-headers"];
        let said = self.person.kubectl(&arguments, "").unwrap();
        said.lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    }

    /// What it holds more than before anything was installed, and what it lacks.
    pub fn more(&self) -> (Vec<String>, Vec<String>) {
        let now = self.holds();
        let more = now.difference(&self.before).cloned().collect();
        (more, self.before.difference(&now).cloned().collect())
    }

    /// helm install or upgrade, until everything is ready.
    pub fn helm(&self, verb: &str, which: Chart, more: &[&str]) {
        let chart = match which {
            Chart::Ours => chart(),
            Chart::Previous => previous_chart(),
        };
        let mut arguments = vec![
            verb,
            "freehold",
            chart.to_str().unwrap(),
            "--namespace",
            "freehold-system",
        ];
        if verb == "install" {
            arguments.push("--create-namespace");
        }
        arguments.extend(["--wait", "--timeout", "120s"]);
        arguments.extend(more);
        let said = self.person.helm(&arguments, &self.values);
        assert!(said.good, "{}\n{}\n{}", said.out, said.errors, self.pods());
    }

    /// What a person would look at first.
    pub fn pods(&self) -> String {
        let mut text = String::new();
        for words in [
            "get pods -A -o wide",
            "get modeldeployments,inferencenodes -A -o wide",
            "get events -A --field-selector type=Warning",
            "logs -n freehold-system -l app.kubernetes.io/component=node-agent --tail=5 --prefix",
            "logs -n freehold-system -l app.kubernetes.io/component=operator --tail=10",
        ] {
            let words: Vec<&str> = words.split(' ').collect();
            let said = self.person.kubectl(&words, "");
            text.push_str(&said.out);
            text.push_str(&said.errors);
        }
        text
    }

    /// Deploys the model's file under a name.
    pub fn deploy(&self, name: &str, spec: &str) {
        let text = format!(
            "apiVersion: freehold.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {{name: {name}, namespace: default}}\nspec:\n  model: {{path: /models/{MODEL}}}\n  engine: {{contextLength: 1024, concurrency: 2}}\n{spec}"
        );
        self.person.kubectl(&["apply", "-f", "-"], &text).unwrap();
    }

    pub fn model(&self, name: &str) -> Value {
        self.person.get(&["modeldeployment", name]).remove(0)
    }

    pub fn machine(&self, name: &str) -> Value {
        self.person.get(&["inferencenode", name]).remove(0)
    }

    /// Waits for something to be so; a panic with what was last seen if it never is.
    pub async fn until<T>(&self, what: &str, mut look: impl FnMut() -> Result<T, String>) -> (T, Duration) {
        let begun = Instant::now();
        loop {
            match look() {
                Ok(found) => {
                    let took = begun.elapsed();
                    println!("{what}: {took:.1?}");
                    return (found, took);
                }
                Err(last) => assert!(
                    begun.elapsed() < PATIENCE,
                    "{what}: not within {PATIENCE:?}; last seen: {last}\n{}",
                    self.pods()
                ),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Waits until a machine has said that it is ready.
    pub async fn until_reported(&self, name: &str) {
        let look = || {
            let machines = self.person.get(&["inferencenodes"]);
            let here = machines
                .iter()
                .find(|machine| machine["metadata"]["name"] == name);
            here.filter(|machine| condition(machine, "Ready") == "True")
                .map(drop)
                .ok_or_else(|| format!("{machines:?}"))
        };
        self.until(&format!("{name} has reported"), look).await;
    }

    /// Waits until a model answers on so many machines, and on which.
    pub async fn until_ready(&self, what: &str, name: &str, replicas: u64) -> Vec<String> {
        let look = || {
            let model = self.model(name);
            let ready = model["status"]["readyReplicas"] == replicas && condition(&model, "Ready") == "True";
            if ready {
                Ok(places(&model))
            } else {
                Err(model["status"].to_string())
            }
        };
        self.until(what, look).await.0
    }

    pub fn node(&self, name: &str) -> &Node {
        self.cluster.nodes.iter().find(|node| node.name == name).unwrap()
    }

    /// Address of the Service that everybody calls.
    pub fn service(&self) -> String {
        let services = self.person.get(&["services", "-n", "freehold-system"]);
        let gateway = |service: &&Value| service["spec"]["ports"][0]["port"] == 11480;
        let service = services.iter().find(gateway).unwrap();
        format!("http://{}:11480", service["spec"]["clusterIP"].as_str().unwrap())
    }

    /// The pod of a component on a node.
    pub fn pod(&self, component: &str, node: Option<&str>) -> Option<Value> {
        let label = format!("app.kubernetes.io/component={component}");
        let pods = self.person.get(&["pods", "-n", "freehold-system", "-l", &label]);
        let here = |pod: &Value| {
            node.is_none_or(|node| pod["spec"]["nodeName"] == node)
                && pod["metadata"]["deletionTimestamp"].is_null()
        };
        pods.into_iter().find(here)
    }

    /// The names of the release's pods.
    pub fn pod_names(&self) -> Vec<String> {
        let pods = self.person.get(&["pods", "-n", "freehold-system"]);
        let name = |pod: &Value| pod["metadata"]["name"].as_str().map(str::to_owned);
        pods.iter().filter_map(name).collect()
    }

    /// Address of one machine's gateway.
    pub fn gateway(&self, node: &str) -> String {
        let machine = self.machine(node);
        machine["status"]["gatewayAddress"].as_str().unwrap().to_owned()
    }

    /// Process ids on a node whose command line holds these words.
    pub fn processes(&self, node: &str, words: &str) -> Vec<u32> {
        let group = format!("/{}/", self.node(node).space.name);
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Ok(process) = entry.file_name().to_string_lossy().parse::<u32>() else {
                continue;
            };
            let read = |name: &str| std::fs::read(entry.path().join(name)).unwrap_or_default();
            let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
            if line.contains(words) && String::from_utf8_lossy(&read("cgroup")).contains(&group) {
                found.push(process);
            }
        }
        found
    }
}

/// The status of a condition.
pub fn condition(object: &Value, kind: &str) -> String {
    let conditions = object["status"]["conditions"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let found = conditions.iter().find(|condition| condition["type"] == kind);
    found.map_or(String::new(), |found| {
        found["status"].as_str().unwrap_or_default().to_owned()
    })
}

/// The machines that hold it.
pub fn places(model: &Value) -> Vec<String> {
    let instances = model["status"]["instances"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let mut names: Vec<String> = instances
        .iter()
        .map(|instance| instance["node"].as_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

/// Runs in the network of a pod: what stands before the program.
pub fn network_of(node: &Node, address: &str) -> Vec<String> {
    let tasks = node.containerd(&["task", "ls"]).unwrap();
    for line in tasks.lines().skip(1) {
        let process = line.split_whitespace().nth(1).unwrap();
        let space = format!("--net=/proc/{process}/ns/net");
        let said = std::process::Command::new("nsenter")
            .args([&space, "ip", "-4", "-o", "address"])
            .output()
            .unwrap();
        if String::from_utf8_lossy(&said.stdout).contains(&format!(" {address}/")) {
            return vec![space, "--".to_owned()];
        }
    }
    panic!("no pod of {} has {address}:\n{tasks}", node.name);
}
