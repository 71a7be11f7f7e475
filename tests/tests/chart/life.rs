//! From install to uninstall, by helm.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use freehold_tests::api_server::{ApiServer, Storage};
use freehold_tests::named::is_named;
use serde_json::Value;

use freehold_tests::person::{Person, chart, previous_chart};

const KINDS: &str = "customresourcedefinitions,namespaces,clusterroles,clusterrolebindings,roles,rolebindings,serviceaccounts,services,deployments,daemonsets,networkpolicies,poddisruptionbudgets,validatingadmissionpolicies,validatingadmissionpolicybindings";
const RELEASE: [&str; 4] = ["--namespace", "models", "--create-namespace", "--wait=hookOnly"];

/// Versions of the release's objects by name. Status belongs to no release.
fn versions(person: &Person) -> BTreeMap<String, (Value, Value)> {
    let mut kinds = KINDS.to_owned();
    kinds.push_str(",configmaps");
    person
        .get(&[&kinds, "-A", "-l", "app.kubernetes.io/name=freehold"])
        .into_iter()
        .map(|object| {
            let name = format!("{} {}", object["kind"], object["metadata"]["name"]);
            let metadata = &object["metadata"];
            (name, (metadata["generation"].clone(), version(metadata)))
        })
        .collect()
}

/// Where controllers run, they tell a status at any time, and the version moves.
fn version(metadata: &Value) -> Value {
    if is_named() {
        metadata["labels"].clone()
    } else {
        metadata["resourceVersion"].clone()
    }
}

/// The chart of the version before. One field of the kinds has another name in it: between two versions that have
/// the same kinds, nobody could see that they are upgraded.
fn previous(folder: &Path) -> std::path::PathBuf {
    let copy = folder.join("freehold");
    let status = std::process::Command::new("cp")
        .args(["-r", previous_chart().to_str().unwrap(), copy.to_str().unwrap()])
        .status()
        .unwrap();
    assert!(status.success());
    let kind = copy.join("files/crds/modeldeployments.yaml");
    let text = std::fs::read_to_string(&kind).unwrap();
    std::fs::write(kind, text.replace("speculation:", "guessing:")).unwrap();
    copy
}

fn image(person: &Person) -> String {
    let operator = person
        .get(&["deployment", "-n", "models", "freehold-operator"])
        .remove(0);
    operator["spec"]["template"]["spec"]["containers"][0]["image"]
        .as_str()
        .unwrap()
        .to_owned()
}

fn knows(person: &Person, field: &str) -> bool {
    let kind = person.get(&["crd", "modeldeployments.freehold.dev"]).remove(0);
    kind.to_string().contains(&format!("\"{field}\""))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn installs_upgrades_rolls_back_and_leaves_what_the_user_owns() {
    let server = ApiServer::start(Storage::Kine).await.unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    let (chart, old) = (chart(), previous(server.folder()));
    let with = |verb: &'static str, chart: &Path, values: &str| {
        let mut arguments = vec![verb, "freehold", chart.to_str().unwrap()];
        arguments.extend(RELEASE);
        person.helm(&arguments, values)
    };
    let said = with("install", &old, "").unwrap();
    assert!(
        said.contains("kubectl get inferencenodes"),
        "NOTES tell the next step: {said}"
    );
    assert!(image(&person).ends_with(":0.0.1"));
    assert!(knows(&person, "guessing") && !knows(&person, "speculation"));
    let model = "apiVersion: freehold.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {name: mine, namespace: default}\nspec: {model: {path: /m.gguf}}\n";
    person.kubectl(&["apply", "-f", "-"], model).unwrap();

    with("upgrade", &chart, "operator: {replicas: 2}").unwrap();
    assert!(!image(&person).ends_with(":0.0.1"));
    assert!(
        knows(&person, "speculation"),
        "the kinds are upgraded with the chart"
    );
    let budgets = person.get(&["poddisruptionbudgets", "-n", "models"]);
    assert_eq!(budgets.len(), 1);

    // The same again changes nothing.
    let before = versions(&person);
    assert!(before.len() > 20, "{before:?}");
    with("upgrade", &chart, "operator: {replicas: 2}").unwrap();
    assert_eq!(before, versions(&person));

    person
        .helm(&["rollback", "freehold", "1", "--namespace", "models"], "")
        .unwrap();
    assert!(image(&person).ends_with(":0.0.1"));
    assert!(knows(&person, "guessing"));
    person
        .helm(&["rollback", "freehold", "2", "--namespace", "models"], "")
        .unwrap();

    person
        .helm(&["uninstall", "freehold", "--namespace", "models"], "")
        .unwrap();
    let mut left: Vec<String> = versions(&person).into_keys().collect();
    left.retain(|name| !name.starts_with("\"CustomResourceDefinition\""));
    assert_eq!(
        left,
        ["\"Namespace\" \"freehold-system\""],
        "the user's machines may beat there still"
    );
    assert_eq!(
        person.get(&["modeldeployments", "-A"]).len(),
        1,
        "what the user owns stays"
    );

    // What is there already is taken over, and goes when asked.
    with("install", &chart, "crds: {keep: false}").unwrap();
    assert_eq!(person.get(&["modeldeployments", "-A"]).len(), 1);
    person
        .helm(&["uninstall", "freehold", "--namespace", "models"], "")
        .unwrap();
    // The API server empties a kind before it takes it away, and helm does not wait for that.
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let kinds = versions(&person);
        if !kinds.keys().any(|name| name.contains("freehold.dev")) {
            break;
        }
        assert!(Instant::now() < deadline, "{kinds:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
