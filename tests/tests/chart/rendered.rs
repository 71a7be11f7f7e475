//! What the chart renders over a matrix of values, before anything is installed.

use std::collections::{BTreeMap, BTreeSet};

use freehold_tests::api_server::{ApiServer, Storage, install};
use freehold_tests::named::is_named;
use freehold_tests::parts::part;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

use freehold_tests::person::{Person, chart, objects};

/// Values by what they are about.
const MATRIX: &[(&str, &str)] = &[
    ("default", ""),
    ("two replicas", "operator: {replicas: 2}"),
    (
        "one operator without election",
        "operator: {leaderElection: false}",
    ),
    ("restricted", "nodeAgent: {store: {type: ephemeral}}"),
    ("no agents", "nodeAgent: {enabled: false}"),
    (
        "hosts only",
        "nodeAgent: {enabled: false}\nhostAgents: [mac-mini, old-gamer]",
    ),
    (
        "a pool with GPUs",
        "nodeAgent: {pools: {default: {}, gpu: {runtimeClassName: nvidia, memoryLimit: 6Gi, labels: {gpu: rtx}, tolerations: [{key: gpu, operator: Exists}], resources: {limits: {memory: 8Gi}}}}}",
    ),
    (
        "air-gapped",
        "image: {registry: registry.lan:5000}\nnetworkPolicy: {modelSources: []}\nnodeAgent: {hub: {endpoint: http://mirror.lan}}",
    ),
    (
        "everything",
        "operator: {replicas: 3, priorityClassName: system-cluster-critical}\nmonitoring: {enabled: true, dashboard: {enabled: true}}\nhostAgents: [mac]\nnodeAgent: {hub: {tokenSecret: {name: hub}}, hostNetwork: true}\nnetworkPolicy: {clients: [{namespaceSelector: {}}]}\ngateway: {service: {type: LoadBalancer, trafficDistribution: PreferClose}}",
    ),
    (
        "nothing that can be left out",
        "crds: {install: false}\nrbac: {aggregate: false}\nadmissionPolicy: {enabled: false}\nnetworkPolicy: {enabled: false}\noperator: {podDisruptionBudget: {enabled: false}}",
    ),
];

/// What breaks Pod Security `restricted`, and the rules that it breaks: the table in docs/install.md.
const EXCEPTIONS: &[(&str, &str, &[&str])] = &[
    ("nothing", "nodeAgent: {store: {type: ephemeral}}", &[]),
    (
        "models in a folder of the machine",
        "",
        &["restricted volume types", "runAsNonRoot != true", "runAsUser=0"],
    ),
    (
        "the machine's own address",
        "nodeAgent: {store: {type: ephemeral}, hostNetwork: true}",
        &["host namespaces", "hostPort"],
    ),
    (
        "energy counters",
        "nodeAgent: {store: {type: ephemeral}, energy: {counters: true}}",
        &["restricted volume types"],
    ),
    (
        "folders of the machine with models",
        "nodeAgent: {store: {type: ephemeral}, extraVolumes: [{name: mine, hostPath: {path: /models}}], extraVolumeMounts: [{name: mine, mountPath: /models, readOnly: true}]}",
        &["restricted volume types"],
    ),
];

/// Kinds of tools, which the tests install to hold objects to them.
fn foreign_kinds() -> Vec<CustomResourceDefinition> {
    std::fs::read_dir(part("tools/modules.json").unwrap().with_file_name(""))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .map(|path| serde_yaml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap())
        .collect()
}

const MONITORING: &str = "monitoring.coreos.com";

/// The pod that an object is or makes.
fn pod(object: &Value) -> Option<&Value> {
    if kind(object) == "Pod" {
        return object.get("spec");
    }
    object.pointer("/spec/template/spec")
}

fn kind(object: &Value) -> &str {
    object["kind"].as_str().unwrap()
}

fn render(person: &Person, values: &str) -> Vec<Value> {
    let chart = chart();
    let arguments = [
        "template",
        "freehold",
        chart.to_str().unwrap(),
        "--namespace",
        "freehold-system",
        "--include-crds",
    ];
    objects(&person.helm(&arguments, values).unwrap())
}

#[test]
fn renders_whatever_the_values_and_grants_no_more_than_is_named() {
    let person = Person::new(None);
    for (about, values) in MATRIX {
        let chart = chart();
        person
            .helm(&["lint", "--strict", chart.to_str().unwrap()], values)
            .unwrap();
        let objects = render(&person, values);
        assert!(objects.len() > 8, "{about}: {} objects", objects.len());
        for object in &objects {
            let name = object["metadata"]["name"].as_str().unwrap();
            for rule in object["rules"].as_array().into_iter().flatten() {
                for list in ["verbs", "resources", "apiGroups"] {
                    let words = rule[list].as_array().unwrap();
                    assert!(!words.contains(&json!("*")), "{about}: {name}: {rule}");
                    let secret = list == "resources"
                        && words
                            .iter()
                            .any(|word| word.as_str().unwrap().starts_with("secrets"));
                    assert!(!secret, "{about}: {name} reads secrets: {rule}");
                }
            }
            if let Some(pod) = pod(object) {
                for container in pod["containers"].as_array().unwrap() {
                    let security = &container["securityContext"];
                    assert_eq!(security["readOnlyRootFilesystem"], true, "{about}: {name}");
                    assert_eq!(
                        security["capabilities"]["drop"],
                        json!(["ALL"]),
                        "{about}: {name}"
                    );
                    assert!(
                        container["resources"]["requests"]["memory"].is_string(),
                        "{about}: {name}"
                    );
                }
            }
        }
    }
}

#[test]
fn wrong_values_are_refused_with_their_place() {
    let person = Person::new(None);
    let chart = chart();
    for (values, words) in [
        ("operator: {replica: 2}", "replica"),
        ("operator: {replicas: two}", "replicas"),
        (
            "operator: {replicas: 2, leaderElection: false}",
            "undo each other's work",
        ),
        ("nodeAgent: {store: {type: nfs}}", "type"),
        ("networkPolicy: {modelSources: [{cdir: 0.0.0.0/0}]}", "cdir"),
        ("hostAgents: [Not_A_Name]", "hostAgents"),
        ("gateway: {service: {port: 0}}", "port"),
        ("nodeAgent: {heartbeatSeconds: 0}", "heartbeatSeconds"),
        ("networkPolicy: {gatewayPeers: {cidrs: [house]}}", "gatewayPeers"),
    ] {
        let arguments = ["template", "freehold", chart.to_str().unwrap()];
        let said = person.helm(&arguments, values).unwrap_err();
        assert!(said.contains(words), "{values}: {said}");
    }
}

#[test]
fn the_kinds_in_the_chart_are_those_of_the_code() {
    let ours = chart().join("../../crds/yaml");
    let theirs = chart().join("files/crds");
    let names = |folder: &std::path::Path| {
        let mut names: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name != "kustomization.yaml")
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(&ours), names(&theirs));
    for name in names(&ours) {
        let [a, b] = [&ours, &theirs].map(|folder| std::fs::read_to_string(folder.join(&name)).unwrap());
        assert!(a == b, "{name:?} differs: run `just crds`");
    }
}

/// A namespace where Pod Security `restricted` is enforced.
fn lock(person: &Person) {
    let locked = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "locked",
        "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
    person
        .kubectl(&["apply", "-f", "-"], &locked.to_string())
        .unwrap();
}

/// Where no controller runs, nobody makes them.
fn make_accounts(person: &Person, namespaces: &[&str]) {
    for namespace in namespaces {
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": "default", "namespace": namespace}});
        let apply = ["apply", "--server-side", "-f", "-"];
        person.kubectl(&apply, &account.to_string()).unwrap();
    }
}

/// The rules of Pod Security `restricted` that a pod breaks, as the API server tells them.
fn broken(person: &Person, spec: &Value) -> BTreeSet<String> {
    let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "spec": spec,
        "metadata": {"name": "probe", "namespace": "locked"}});
    pod["spec"]["serviceAccountName"] = json!("default");
    // A pod of its own may not be of a system's class in any namespace, and of a runtime class only where there is one.
    pod["spec"].as_object_mut().unwrap().remove("priorityClassName");
    pod["spec"].as_object_mut().unwrap().remove("runtimeClassName");
    let said = person.kubectl(&["create", "--dry-run=server", "-f", "-"], &pod.to_string());
    if said.good {
        return BTreeSet::new();
    }
    let (_, told) = said
        .errors
        .split_once("violates PodSecurity \"restricted:latest\": ")
        .unwrap_or_else(|| panic!("{}", said.errors));
    let rules = told.trim().split("), ");
    rules
        .map(|rule| rule.split(" (").next().unwrap().to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_api_server_takes_every_object_strictly() {
    let server = ApiServer::start(Storage::Etcd).await.unwrap();
    let client = server.client().await.unwrap();
    install(&client, &freehold_crds::all()).await.unwrap();
    // On a named cluster they may be in use, in another version.
    let monitors = !is_named();
    if monitors {
        let mut kinds = foreign_kinds();
        kinds.retain(|kind| kind.spec.group == MONITORING);
        install(&client, &kinds).await.unwrap();
    }
    let person = Person::new(Some(server.kubeconfig()));
    person
        .kubectl(&["create", "namespace", "freehold-system"], "")
        .unwrap();
    lock(&person);
    make_accounts(&person, &["locked", "freehold-system"]);
    let mut kinds = BTreeSet::new();
    for (about, values) in MATRIX {
        for object in render(&person, values) {
            let foreign = object["apiVersion"].as_str().unwrap().starts_with(MONITORING);
            if foreign && !monitors {
                continue;
            }
            kinds.insert(kind(&object).to_owned());
            let said = person.kubectl(
                &[
                    "apply",
                    "--server-side",
                    "--force-conflicts",
                    "--dry-run=server",
                    "--validate=strict",
                    "-f",
                    "-",
                ],
                &object.to_string(),
            );
            assert!(
                said.good,
                "{about}: {}: {}",
                object["metadata"]["name"], said.errors
            );
            let Some(pod) = pod(&object) else {
                continue;
            };
            // An agent that uses the machine itself needs a folder or the address of it; nothing else does.
            let hosted = pod["volumes"]
                .as_array()
                .is_some_and(|volumes| volumes.iter().any(|volume| volume.get("hostPath").is_some()));
            let excepted = hosted || pod["hostNetwork"] == true;
            let broken = broken(&person, pod);
            let name = &object["metadata"]["name"];
            assert_eq!(broken.is_empty(), !excepted, "{about}: {name}: {broken:?}");
        }
    }
    let mut expected = vec!["Pod", "Deployment", "DaemonSet"];
    if monitors {
        expected.extend(["ServiceMonitor", "PodMonitor", "PrometheusRule"]);
    }
    for kind in expected {
        assert!(kinds.contains(kind), "no {kind} was rendered: {kinds:?}");
    }
    // Each exception alone breaks these rules and no others, and only the agent does.
    for (about, values, rules) in EXCEPTIONS {
        for object in render(&person, values) {
            let Some(pod) = pod(&object) else { continue };
            let rules = if kind(&object) == "DaemonSet" { *rules } else { &[] };
            let expected: BTreeSet<String> = rules.iter().map(|rule| (*rule).to_owned()).collect();
            let name = &object["metadata"]["name"];
            assert_eq!(broken(&person, pod), expected, "{about}: {name}");
        }
    }
}

#[test]
fn what_breaks_pod_security_stands_in_the_document() {
    let text = std::fs::read_to_string(chart().join("../../docs/install.md")).unwrap();
    for (about, _, rules) in EXCEPTIONS.iter().filter(|(_, _, rules)| !rules.is_empty()) {
        for rule in *rules {
            let told = text
                .lines()
                .any(|line| line.starts_with('|') && line.contains(rule));
            assert!(told, "docs/install.md has no row that names {rule} ({about})");
        }
    }
}

fn manifests() -> std::path::PathBuf {
    chart().join("../../manifests")
}

#[test]
fn the_kustomize_base_is_the_chart_with_its_defaults() {
    let chart = chart();
    let arguments = [
        "template",
        "freehold",
        chart.to_str().unwrap(),
        "--namespace",
        "freehold-system",
        "--no-hooks",
        "--set",
        "crds.install=false",
    ];
    let rendered = Person::new(None).helm(&arguments, "").unwrap();
    let written = std::fs::read_to_string(manifests().join("base/freehold.yaml")).unwrap();
    assert!(
        rendered == written,
        "manifests/base/freehold.yaml differs: run `just manifests`"
    );
}

/// Versions of all that a folder applies.
fn versions(person: &Person, which: &[&str]) -> BTreeMap<String, Value> {
    let objects = person.get(which);
    assert!(!objects.is_empty(), "{which:?}");
    // Where controllers run, they tell a status at any time, and the version moves.
    let version = if is_named() {
        "generation"
    } else {
        "resourceVersion"
    };
    let named = |object: Value| {
        let metadata = &object["metadata"];
        let name = format!(
            "{} {}/{}",
            object["kind"], metadata["namespace"], metadata["name"]
        );
        (name, metadata[version].clone())
    };
    objects.into_iter().map(named).collect()
}

const WAYS: [&[&str]; 2] = [&[], &["--server-side", "--force-conflicts"]];

/// Applies twice, in both ways, and holds that the second time changes nothing.
fn apply_twice(person: &Person, which: &[&str]) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    for way in WAYS {
        let apply = || {
            let said = person.kubectl(&[&["apply"][..], which, way].concat(), "");
            assert!(said.good, "{which:?} {way:?}: {}", said.errors);
            said.out
        };
        apply();
        // The API server itself writes to a new kind until it serves it.
        let established = [
            "wait",
            "--for=condition=Established",
            "crd",
            "--all",
            "--timeout=60s",
        ];
        person.kubectl(&established, "").unwrap();
        found = versions(person, which);
        let said = apply();
        if way.is_empty() {
            // kubectl itself compares then, and has nothing to send. (It compares the lists of one's own kinds whole, so
            // what the API server fills in there is said in the examples.)
            let sent: Vec<_> = said
                .lines()
                .filter(|line| !line.ends_with(" unchanged"))
                .collect();
            assert!(sent.is_empty(), "{which:?}: {sent:?}");
        }
        assert_eq!(found, versions(person, which), "{which:?} {way:?}");
        let diff = person.kubectl(&[&["diff"][..], which, way].concat(), "");
        assert!(diff.good, "{which:?} {way:?} differs from itself: {}", diff.out);
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_overlay_installs_and_the_second_time_changes_nothing() {
    let server = ApiServer::start(Storage::Etcd).await.unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    for overlay in [
        "base",
        "overlays/k3s-home-lab",
        "overlays/air-gapped",
        "overlays/host-agents",
    ] {
        let folder = manifests().join(overlay);
        let found = apply_twice(&person, &["-k", folder.to_str().unwrap()]);
        assert!(found.len() > 20, "{overlay}: {found:?}");
    }
    let mut kinds = BTreeSet::new();
    for example in ["demo", "many-models", "small-firm"] {
        let folder = manifests().join("examples").join(example);
        let found = apply_twice(&person, &["-f", folder.to_str().unwrap()]);
        kinds.extend(
            found
                .keys()
                .map(|name| name.split(' ').next().unwrap().replace('"', "")),
        );
    }
    for kind in ["ModelDeployment", "GovernancePolicy", "HealthProbe"] {
        assert!(kinds.contains(kind), "no example has a {kind}: {kinds:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flux_argo_cd_and_k3s_take_what_is_written_for_them() {
    if is_named() {
        println!("skipped: the kinds of these tools may be in use on a named cluster");
        return;
    }
    let server = ApiServer::start(Storage::Kine).await.unwrap();
    let mut kinds = foreign_kinds();
    kinds.retain(|kind| kind.spec.group != MONITORING);
    install(&server.client().await.unwrap(), &kinds).await.unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    for namespace in ["flux-system", "argocd"] {
        person.kubectl(&["create", "namespace", namespace], "").unwrap();
    }
    let strictly = ["apply", "--server-side", "--validate=strict", "-f"];
    let mut taken = std::collections::BTreeSet::new();
    for file in [
        "k3s/freehold.yaml",
        "flux/freehold.yaml",
        "flux/freehold/release.yaml",
        "argocd/freehold.yaml",
    ] {
        let path = manifests().join(file);
        let mut arguments = strictly.to_vec();
        arguments.push(path.to_str().unwrap());
        let said = person.kubectl(&arguments, "");
        assert!(said.good, "{file}: {}", said.errors);
        for object in objects(&std::fs::read_to_string(&path).unwrap()) {
            taken.insert(kind(&object).to_owned());
        }
    }
    taken.remove("Namespace");
    assert_eq!(taken.len(), kinds.len(), "each kind is used: {taken:?}");
    // That the schemas refuse is no matter of course: a field that is none, and one of another type.
    for wrong in ["spec: {chart: 5}", "spec: {charts: a}"] {
        let object = format!(
            "apiVersion: helm.cattle.io/v1\nkind: HelmChart\nmetadata: {{name: w, namespace: argocd}}\n{wrong}\n"
        );
        let mut arguments = strictly.to_vec();
        arguments.push("-");
        person.kubectl(&arguments, &object).unwrap_err();
    }
}
