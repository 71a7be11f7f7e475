//! What the chart renders over a matrix of values, before anything is installed.

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

/// Kinds of the Prometheus operator, which this API server does not know.
const FOREIGN: [&str; 3] = ["ServiceMonitor", "PodMonitor", "PrometheusRule"];

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
            if let Some(pod) = object.pointer("/spec/template/spec") {
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_api_server_takes_every_object_strictly() {
    let server = ApiServer::start(Storage::Etcd).await.unwrap();
    install(&server.client().await.unwrap(), &freehold_crds::all())
        .await
        .unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    person
        .kubectl(&["create", "namespace", "freehold-system"], "")
        .unwrap();
    let locked = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "locked",
        "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
    person
        .kubectl(&["apply", "-f", "-"], &locked.to_string())
        .unwrap();
    // Where no controller runs, nobody makes them.
    for namespace in ["locked", "freehold-system"] {
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": "default", "namespace": namespace}});
        let apply = ["apply", "--server-side", "-f", "-"];
        person.kubectl(&apply, &account.to_string()).unwrap();
    }
    for (about, values) in MATRIX {
        for object in render(&person, values) {
            if FOREIGN.contains(&kind(&object)) {
                continue;
            }
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
            let Some(pod) = object.pointer("/spec/template/spec") else {
                continue;
            };
            let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "spec": pod,
                "metadata": {"name": "probe", "namespace": "locked"}});
            pod["spec"]["serviceAccountName"] = json!("default");
            pod["spec"].as_object_mut().unwrap().remove("priorityClassName");
            pod["spec"].as_object_mut().unwrap().remove("runtimeClassName");
            let said = person.kubectl(&["create", "--dry-run=server", "-f", "-"], &pod.to_string());
            // An agent that keeps models on the machine itself needs a folder of it; nothing else does.
            let hosted = pod["spec"]["volumes"]
                .as_array()
                .is_some_and(|volumes| volumes.iter().any(|volume| volume.get("hostPath").is_some()));
            assert_eq!(
                said.good, !hosted,
                "{about}: {}: {}",
                object["metadata"]["name"], said.errors
            );
            if hosted {
                assert!(said.errors.contains("hostPath"), "{about}: {}", said.errors);
            }
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_overlay_installs_and_the_second_time_changes_nothing() {
    let server = ApiServer::start(Storage::Etcd).await.unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    let versions = |person: &Person| {
        let kinds = "crd,ns,clusterrole,clusterrolebinding,role,rolebinding,sa,svc,deploy,ds,netpol,validatingadmissionpolicy,md,gp";
        person
            .get(&[kinds, "-A"])
            .iter()
            .filter(|object| {
                !object["metadata"]["name"]
                    .as_str()
                    .unwrap()
                    .starts_with("system:")
            })
            .map(|object| {
                let metadata = &object["metadata"];
                // The API server writes conditions of kinds and policies itself, a moment later.
                format!(
                    "{} {} {}",
                    object["kind"], metadata["name"], metadata["generation"]
                )
            })
            .collect::<std::collections::BTreeSet<_>>()
    };
    for overlay in [
        "base",
        "overlays/k3s-home-lab",
        "overlays/air-gapped",
        "overlays/host-agents",
    ] {
        let folder = manifests().join(overlay);
        let folder = folder.to_str().unwrap();
        let apply = |more: &[&str]| {
            let mut arguments = vec!["apply", "-k", folder];
            arguments.extend(more);
            person.kubectl(&arguments, "")
        };
        let server_side = ["--server-side", "--force-conflicts"];
        let first = apply(&server_side);
        assert!(first.good, "{overlay}: {}", first.errors);
        let before = versions(&person);
        apply(&server_side).unwrap();
        assert_eq!(before, versions(&person), "{overlay}");
        assert!(
            person
                .kubectl(&["diff", "--server-side", "--force-conflicts", "-k", folder], "")
                .good,
            "{overlay} differs from itself"
        );
    }
    // Examples, by both ways of applying.
    for example in ["demo", "many-models", "small-firm"] {
        let folder = manifests().join("examples").join(example);
        let folder = folder.to_str().unwrap();
        for more in [&["--server-side"][..], &[][..]] {
            let mut arguments = vec!["apply", "-f", folder];
            arguments.extend(more);
            person.kubectl(&arguments, "").unwrap();
            let before = versions(&person);
            let again = person.kubectl(&arguments, "").unwrap();
            assert_eq!(before, versions(&person), "{example}: {again}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flux_argo_cd_and_k3s_take_what_is_written_for_them() {
    if is_named() {
        println!("skipped: the kinds of these tools may be in use on a named cluster");
        return;
    }
    let server = ApiServer::start(Storage::Kine).await.unwrap();
    let kinds: Vec<CustomResourceDefinition> =
        std::fs::read_dir(part("tools/modules.json").unwrap().with_file_name(""))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
            .map(|path| serde_yaml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap())
            .collect();
    install(&server.client().await.unwrap(), &kinds).await.unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    for namespace in ["flux-system", "argocd"] {
        person.kubectl(&["create", "namespace", namespace], "").unwrap();
    }
    let strictly = ["apply", "--server-side", "--validate=strict", "-f"];
    let mut taken = std::collections::BTreeSet::new();
    for file in ["k3s/freehold.yaml", "flux/freehold.yaml", "argocd/freehold.yaml"] {
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
