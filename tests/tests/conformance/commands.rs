//! kubectl and helm do the asking: what they print and how they end must be the same on both.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use freehold_tests::parts::{kubectl, part};
use regex::Regex;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::both::Both;

/// A command that has not ended by then never will.
const PATIENCE: Duration = Duration::from_secs(60);

/// A command, and what it reads. `$ns` is the namespace.
struct Asked {
    arguments: &'static str,
    input: &'static str,
    /// Whether it must fail.
    refused: bool,
}

const fn ask(arguments: &'static str) -> Asked {
    tell(arguments, "")
}

const fn tell(arguments: &'static str, input: &'static str) -> Asked {
    Asked {
        arguments,
        input,
        refused: false,
    }
}

impl Asked {
    const fn refused(self) -> Self {
        Self {
            refused: true,
            ..self
        }
    }
}

const GADGET: &str = "apiVersion: test.example.com/v1\nkind: Gadget\nmetadata: {name: g, labels: {a: b}}\nspec: {color: red, size: 5, tags: [k]}\n";
const CHANGED: &str =
    "apiVersion: test.example.com/v1\nkind: Gadget\nmetadata: {name: g}\nspec: {color: blue, tags: [l]}\n";
const WRONG: &str =
    "apiVersion: test.example.com/v1\nkind: Gadget\nmetadata: {name: w}\nspec: {color: pink}\n";
const MISSPELT: &str =
    "apiVersion: test.example.com/v1\nkind: Gadget\nmetadata: {name: w}\nspec: {colour: red, color: red}\n";
const MODEL: &str = "apiVersion: freehold.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {name: m}\nspec: {model: {path: /m.gguf}, replicas: 1}\n";

const KUBECTL: &[Asked] = &[
    tell("apply -f -", GADGET),
    tell("apply -f -", GADGET),
    ask("get gadgets"),
    ask("get gd g -o wide"),
    ask("get gadgets -o name"),
    ask("get gadgets -l a=b --no-headers"),
    ask("get gadgets --field-selector spec.color=red -o name"),
    tell("diff -f -", CHANGED).refused(),
    tell("apply -f -", CHANGED),
    ask("get gadget g -o jsonpath={.spec}"),
    tell("apply --server-side -f -", GADGET).refused(),
    tell("apply --server-side --force-conflicts -f -", GADGET),
    tell("apply -f -", WRONG).refused(),
    tell("apply -f -", MISSPELT).refused(),
    tell("apply --validate=false -f -", MISSPELT),
    tell("create -f -", GADGET).refused(),
    tell("replace -f -", CHANGED),
    ask("label gadget g tier=front"),
    ask("label gadget g tier=back").refused(),
    ask("label gadget g tier=back --overwrite"),
    ask("annotate gadget g note=hello"),
    ask("patch gadget g --type merge -p {\"spec\":{\"size\":7}}"),
    ask("patch gadget g --type json -p [{\"op\":\"replace\",\"path\":\"/spec/size\",\"value\":8}]"),
    ask("patch gadget g -p {\"spec\":{\"size\":7}}").refused(),
    ask("patch gadget g --subresource status --type merge -p {\"status\":{\"phase\":\"Good\"}}"),
    ask("get gadget g -o jsonpath={.status.phase}/{.spec.size}/{.metadata.generation}"),
    ask("wait --for=jsonpath={.status.phase}=Good gadget/g --timeout=5s"),
    ask("explain gadget.spec.color"),
    ask("api-resources --api-group=freehold.dev"),
    ask("api-resources --api-group=test.example.com -o wide"),
    ask("create configmap c --from-literal=a=b"),
    ask("create configmap c --from-literal=a=b").refused(),
    ask("get configmap c"),
    ask("create secret generic s --from-literal=a=b"),
    ask("get secret s"),
    ask("get secret s -o jsonpath={.data.a}"),
    ask("get configmap nothing").refused(),
    ask("get nothings").refused(),
    ask("delete configmap c"),
    ask("delete configmap c").refused(),
    ask("delete configmap c --ignore-not-found"),
    tell("apply -f -", MODEL),
    ask("scale modeldeployment m --replicas=3"),
    ask("get md m -o jsonpath={.spec.replicas}"),
    ask("get md"),
    ask("get freehold -o name"),
    ask("auth can-i create gadgets"),
    tell("delete -f -", GADGET),
    ask("delete gadgets --all"),
    ask("get gadgets"),
];

const HELM: &[Asked] = &[
    ask("install demo $chart --set color=red"),
    ask("list -q"),
    ask("status demo"),
    ask("upgrade demo $chart --set color=blue"),
    ask("upgrade demo $chart --set color=pink").refused(),
    ask("rollback demo 1"),
    ask("get manifest demo"),
    ask("uninstall demo"),
    ask("list -q"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_and_helm_see_no_difference() {
    let both = Both::start().await;
    let namespace = both.namespace("commands").await;
    let (server, folder) = both.serve_embedded().await;
    let chart = folder.path().join("chart");
    write_chart(&chart);
    let kubeconfigs = [both.server.kubeconfig(), server.kubeconfig()];
    let mut differences = Vec::new();
    let suites = [(kubectl().unwrap(), KUBECTL), (part("helm").unwrap(), HELM)];
    for (program, suite) in suites {
        for asked in suite {
            let chart = chart.display().to_string();
            let arguments: Vec<String> = asked
                .arguments
                .split(' ')
                .map(|argument| argument.replace("$ns", &namespace).replace("$chart", &chart))
                .collect();
            let run = |kubeconfig| {
                run(
                    &program,
                    &arguments,
                    asked.input,
                    kubeconfig,
                    &namespace,
                    folder.path(),
                )
            };
            let (real, embedded) = (run(kubeconfigs[0]).await, run(kubeconfigs[1]).await);
            // A command that fails where it should not would compare nothing.
            let meant = if asked.refused { real.0 != 0 } else { real.0 == 0 };
            if real != embedded || !meant {
                let text = format!(
                    "{}\n  real:     {real:?}\n  embedded: {embedded:?}",
                    asked.arguments
                );
                println!("== {text}");
                differences.push(text);
            }
        }
    }
    println!("{} commands", KUBECTL.len() + HELM.len());
    server.shutdown().await;
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// Exit code, output and errors of a command, without times and uids.
async fn run(
    program: &Path,
    arguments: &[String],
    input: &str,
    kubeconfig: &Path,
    namespace: &str,
    home: &Path,
) -> (i32, String, String) {
    let home: PathBuf = home.join(kubeconfig.display().to_string().replace('/', "_"));
    std::fs::create_dir_all(&home).unwrap();
    let mut child = Command::new(program)
        .args(["--namespace", namespace])
        .args(arguments)
        .env("KUBECONFIG", kubeconfig)
        .env("HOME", &home)
        .env("KUBECTL_EXTERNAL_DIFF", "diff -u -N -L before -L after")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).await.unwrap();
    drop(stdin);
    let ended = tokio::time::timeout(PATIENCE, child.wait_with_output()).await;
    let output = ended
        .unwrap_or_else(|_| panic!("{arguments:?} did not end"))
        .unwrap();
    let text = |bytes: &[u8]| settled(&String::from_utf8_lossy(bytes));
    (
        output.status.code().unwrap_or(-1),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// Without what no two servers and no two moments share.
fn settled(text: &str) -> String {
    let patterns = [
        (
            r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
            "<uid>",
        ),
        (r"\d{4}-\d\d-\d\dT[0-9:.]+(Z|[+-]\d\d:\d\d)", "<time>"),
        (
            r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2} +\d+ [0-9:]+ \d{4}",
            "<time>",
        ),
        (r"resourceVersion: .*", "resourceVersion: <revision>"),
        (r" +\d+(s|m\d*s?)\b", " <age>"),
        (r"(/tmp|/var)/[^ \n]*", "<file>"),
    ];
    let text = patterns.iter().fold(text.to_owned(), |text, (pattern, name)| {
        Regex::new(pattern)
            .unwrap()
            .replace_all(&text, *name)
            .into_owned()
    });
    // helm status walks over a map of Go's: kinds come in any order.
    let text = text.replace("RESOURCES:\n==>", "RESOURCES:\n\n==>");
    let (mut kinds, mut others) = (Vec::new(), Vec::new());
    for part in text.split("\n\n") {
        let part = part.trim_matches('\n');
        if part.starts_with("==>") {
            kinds.push(part);
        } else {
            others.push(part);
        }
    }
    if kinds.is_empty() {
        return text;
    }
    kinds.sort_unstable();
    others.append(&mut kinds);
    others.join("\n\n")
}

fn write_chart(folder: &Path) {
    let files = [
        ("Chart.yaml", "apiVersion: v2\nname: demo\nversion: 0.1.0\n"),
        ("values.yaml", "color: red\n"),
        (
            "templates/all.yaml",
            "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {{ .Release.Name }}\ndata:\n  color: {{ .Values.color }}\n---\napiVersion: test.example.com/v1\nkind: Gadget\nmetadata:\n  name: {{ .Release.Name }}\nspec:\n  color: {{ .Values.color }}\n",
        ),
    ];
    std::fs::create_dir_all(folder.join("templates")).unwrap();
    for (name, text) in files {
        std::fs::write(folder.join(name), text).unwrap();
    }
}
