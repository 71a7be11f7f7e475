//! A machine beside the cluster: joined by the command, run by a real systemd, and gone without a trace.
//!
//! The API server is on the other end of a cable (a veth): the machine reaches nothing else of this one.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, its helpers too"
)]

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use freehold_node_agent::credential::Claims;
use freehold_tests::api_server::{ApiServer, Storage};
use freehold_tests::child::Program;
use freehold_tests::machine::Machine;
use freehold_tests::network::{Network, Space};
use freehold_tests::parts::{cache, own};
use freehold_tests::person::{Person, Said, ask, chart};
use kube::Client;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);
const UNIT: &str = "freehold-node-agent";
const TOKEN: &str = "/var/lib/private/freehold/credential/token";
/// The file that runs, as `freehold node` installed it.
const INSTALLED: &str = "/usr/local/bin/freehold-node-agent";
/// Where docs/host-agents.md sends people with their models.
const MODEL: &str = "/srv/models/SmolLM2-135M-Instruct.Q4_1.gguf";

/// A cluster with the chart and an operator, and a machine beside it.
struct Stage {
    machine: Machine,
    person: Person,
    server: ApiServer,
    programs: PathBuf,
    space: Space,
    _operator: Program,
    _network: Network,
}

impl Stage {
    async fn set() -> Self {
        let programs = own("freehold-node-agent").unwrap();
        own("freehold").unwrap();
        let operator = own("freehold-operator").unwrap();
        let programs = programs.parent().unwrap().to_owned();
        let mut network = Network::new().unwrap();
        let space = network.space().unwrap();
        let server = ApiServer::start_at(network.address(), Storage::Kine, &[], &[])
            .await
            .unwrap();
        let person = Person::new(Some(server.kubeconfig()));
        let chart = chart();
        let arguments = [
            "install",
            "freehold",
            chart.to_str().unwrap(),
            "--namespace",
            "freehold-system",
            "--create-namespace",
        ];
        person.helm(&arguments, "").unwrap();
        // No node runs the chart's operator: this is it, with its owner's rights.
        let arguments = [
            format!("KUBECONFIG={}", server.kubeconfig().display()),
            operator.display().to_string(),
        ];
        let env = Path::new("/usr/bin/env");
        let operator = Program::start("operator", env, &arguments, server.folder()).unwrap();
        let machine = Machine::start(&space, &programs).unwrap();
        Self {
            machine,
            person,
            server,
            programs,
            space,
            _operator: operator,
            _network: network,
        }
    }

    /// A command of the machine's owner.
    fn on(&self, command: &[&str], input: &str) -> Said {
        Said::of(&self.machine.run(command, input).unwrap())
    }

    fn freehold(&self, arguments: &[&str], input: &str) -> Said {
        let mut all = vec!["/opt/freehold/freehold", "node"];
        all.extend(arguments);
        self.on(&all, input)
    }

    /// A property of the unit.
    fn unit(&self, property: &str) -> String {
        let property = format!("--property={property}");
        let shown = self.on(&["systemctl", "show", "--value", &property, UNIT], "");
        shown.unwrap().trim().to_owned()
    }

    fn process(&self) -> u32 {
        self.unit("MainPID").parse().unwrap()
    }

    /// Waits for something to be so, and says what was last seen if it never is.
    async fn until<T>(&self, what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
        let begun = Instant::now();
        loop {
            match look() {
                Ok(found) => return found,
                Err(last) => assert!(
                    begun.elapsed() < PATIENCE,
                    "{what}: not within {PATIENCE:?}; last seen: {last}\n{}",
                    self.log()
                ),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn log(&self) -> String {
        self.on(&["journalctl", "--unit", UNIT, "--lines", "30", "--no-pager"], "")
            .out
    }

    fn token(&self) -> String {
        std::fs::read_to_string(self.machine.path(TOKEN)).unwrap()
    }

    /// The machine as the cluster sees it.
    fn seen(&self) -> Vec<Value> {
        self.person.get(&["inferencenodes"])
    }
}

/// The code of an attempt to apply something.
async fn apply(client: &Client, path: &str, body: &Value) -> u16 {
    let request = http::Request::patch(format!("{path}?fieldManager=test&force=true"))
        .header("Content-Type", "application/apply-patch+yaml")
        .body(body.to_string().into_bytes())
        .unwrap();
    match client.request_text(request).await {
        Ok(_) => 200,
        Err(kube::Error::Api(status)) => status.code,
        Err(other) => panic!("{path}: {other}"),
    }
}

fn lease(name: &str) -> (String, Value) {
    let body = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name},
        "spec": {"holderIdentity": name, "leaseDurationSeconds": 40}});
    let path = format!("/apis/coordination.k8s.io/v1/namespaces/freehold-system/leases/{name}");
    (path, body)
}

fn status(name: &str) -> (String, Value) {
    let body = json!({"apiVersion": "freehold.dev/v1alpha1", "kind": "InferenceNode", "metadata": {"name": name}, "status": {"conditions": []}});
    (
        format!("/apis/freehold.dev/v1alpha1/inferencenodes/{name}/status"),
        body,
    )
}

/// Joins by a join token, as an owner does whose machine never sees the administrator's kubeconfig.
async fn joins(stage: &Stage) {
    let join_token = stage
        .person
        .run(&stage.programs.join("freehold"), &["node", "token", "attic"], "")
        .unwrap();
    let refused = stage
        .freehold(&["join", "--token", "-"], "freehold-join-1.abc")
        .unwrap_err();
    assert!(refused.contains("the join token is damaged"), "{refused}");

    let begun = Instant::now();
    let said = stage.freehold(
        &[
            "join",
            "--token",
            "-",
            "--renew-after",
            "5",
            "--label",
            "room=attic",
        ],
        &join_token,
    );
    println!("{}\njoined in {:.1?}", said.unwrap(), begun.elapsed());
    assert_eq!(stage.unit("ActiveState"), "active");
    let verified = stage.on(&["systemd-analyze", "verify", &format!("{UNIT}.service")], "");
    assert_eq!(
        (verified.good, verified.errors.as_str()),
        (true, ""),
        "{}",
        verified.out
    );
    assert_eq!(stage.unit("UnitFileState"), "enabled");

    let machine = stage
        .until("the cluster sees it ready", || {
            let seen = stage.seen();
            let ready = |machine: &&Value| {
                let conditions = machine["status"]["conditions"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default();
                conditions
                    .iter()
                    .any(|c| c["type"] == "Ready" && c["status"] == "True")
            };
            seen.iter()
                .find(ready)
                .cloned()
                .ok_or_else(|| json!(seen).to_string())
        })
        .await;
    assert_eq!(machine["metadata"]["name"], "attic");
    assert_eq!(machine["metadata"]["labels"]["room"], "attic");
    let address = format!("http://{}:11480", stage.space.address);
    assert_eq!(machine["status"]["gatewayAddress"], address.as_str());
    let status = stage.freehold(&["status"], "").unwrap();
    assert!(
        status.contains("Gateway     answers") && status.contains("Ready=True"),
        "{status}"
    );
    let both = stage.freehold(&["join", "--node", "cellar", "--token", "-"], &join_token);
    assert!(both.unwrap_err().contains("cannot be used with"));

    // Once more, as one does whose token has ended: what was there is replaced, and its owner stays who it was.
    let owner = |name: &str| {
        std::fs::metadata(stage.machine.path(&format!("/var/lib/private/freehold/{name}")))
            .unwrap()
            .uid()
    };
    let before = owner("spec.json");
    stage
        .freehold(
            &[
                "join",
                "--token",
                "-",
                "--renew-after",
                "5",
                "--label",
                "room=attic",
            ],
            &join_token,
        )
        .unwrap();
    assert_eq!(stage.unit("ActiveState"), "active");
    assert_eq!(
        (owner("spec.json"), owner("credential"), owner("credential/token")),
        (before, before, before)
    );
}

/// Its process has no rights on the machine but to its own folder.
fn is_confined(stage: &Stage) {
    let process = stage.machine.path(&format!("/proc/{}/status", stage.process()));
    let facts = std::fs::read_to_string(process).unwrap();
    let fact = |name: &str| -> String {
        let line = facts.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_ne!(fact("Uid:"), "0");
    assert_eq!(fact("NoNewPrivs:"), "1");
    assert_eq!(u64::from_str_radix(&fact("CapBnd:"), 16).unwrap(), 0);
    let mode = std::fs::metadata(stage.machine.path(TOKEN))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// Deploys a file of the machine's under a name.
fn deploy(stage: &Stage, name: &str, path: &str) {
    let model = json!({"apiVersion": "freehold.dev/v1alpha1", "kind": "ModelDeployment",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"model": {"path": path}, "engine": {"contextLength": 1024, "concurrency": 2}}});
    let said = stage.person.kubectl(&["apply", "-f", "-"], &model.to_string());
    said.unwrap();
}

fn status_of(stage: &Stage, name: &str) -> Value {
    stage.person.get(&["modeldeployment", name]).remove(0)["status"].take()
}

fn is_ready(status: &Value) -> bool {
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    let ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    conditions.iter().any(ready)
}

/// The machine's own gateway, asked from another machine. How long it took to answer well.
async fn answers(stage: &Stage, why: &str) {
    let url = format!("http://{}:11480", stage.space.address);
    let begun = Instant::now();
    let said = stage.until(why, || ask(&[], &url, "chat")).await;
    println!("{why}: answers after {:.1?}", begun.elapsed());
    assert!(said.contains("Paris"), "{said}");
}

/// Ready, with so many restarts of its worker, and by the machine's own word too.
async fn is_told_ready(stage: &Stage, why: &str, restarts: u64) {
    stage
        .until(why, || {
            let status = status_of(stage, "chat");
            let instance = &status["instances"][0];
            let told = is_ready(&status) && instance["node"] == "attic" && instance["restarts"] == restarts;
            if told { Ok(()) } else { Err(status.to_string()) }
        })
        .await;
}

/// The process of the model's worker.
fn worker(stage: &Stage) -> u32 {
    let agent = stage.process().to_string();
    let found = stage
        .on(&["pgrep", "--parent", &agent, "--full", "worker"], "")
        .unwrap();
    let found: Vec<u32> = found.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found[0]
}

/// The unit's confinement lets a worker read the owner's file, compute and be started again.
async fn serves_a_model(stage: &Stage) {
    let file = Path::new(MODEL).file_name().unwrap();
    let kept = cache().join("models").join(file);
    stage.machine.put(&kept, MODEL).unwrap();
    let begun = Instant::now();
    deploy(stage, "chat", MODEL);
    is_told_ready(stage, "a joined machine's model is ready", 0).await;
    println!("from kubectl apply to Ready: {:.1?}", begun.elapsed());
    answers(stage, "a joined machine is asked").await;

    let first = worker(stage);
    let facts = stage.machine.path(&format!("/proc/{first}/status"));
    let facts = std::fs::read_to_string(facts).unwrap();
    let fact = |name: &str| {
        let line = facts.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().nth(1))
            .unwrap_or_default()
            .to_owned()
    };
    assert_ne!(fact("Uid:"), "0");
    assert_eq!(
        (fact("NoNewPrivs:"), fact("Seccomp:")),
        ("1".to_owned(), "2".to_owned())
    );
    stage.on(&["kill", "-KILL", &first.to_string()], "").unwrap();
    answers(stage, "its worker was killed").await;
    is_told_ready(stage, "the restart is told", 1).await;
    assert_ne!(worker(stage), first);

    // ProtectHome: what lies in a home is not there for the agent, and that is told.
    stage.machine.put(&kept, "/root/models/home.gguf").unwrap();
    deploy(stage, "home", "/root/models/home.gguf");
    let told = stage
        .until("a file that the unit hides is told", || {
            let status = status_of(stage, "home");
            let message = status["instances"][0]["message"].as_str().unwrap_or_default();
            if message.contains("/root/models/home.gguf") {
                Ok(message.to_owned())
            } else {
                Err(status.to_string())
            }
        })
        .await;
    println!("told: {told}");
    assert!(!is_ready(&status_of(stage, "home")));
    stage
        .person
        .kubectl(&["delete", "modeldeployment", "home"], "")
        .unwrap();
}

async fn renews_its_token(stage: &Stage) {
    let first = Claims::of(&stage.token()).unwrap();
    assert_eq!(first.account, "freehold-host-attic");
    let mut last = first.clone();
    for _ in 0..2 {
        last = stage
            .until("the token is renewed", || {
                let now = Claims::of(&stage.token()).unwrap();
                if now.issued > last.issued {
                    Ok(now)
                } else {
                    Err(format!("{now:?}"))
                }
            })
            .await;
    }
    assert!(last.expires > first.expires);
    let life = |claims: &Claims| claims.expires.as_second() - claims.issued.as_second();
    assert_eq!(
        life(&last),
        life(&first),
        "it does not shrink from one to the next"
    );
    let folder = stage.machine.path("/var/lib/private/freehold/credential");
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["kubeconfig", "node", "token"]);
}

/// Returns the part of the audit log that holds these attempts.
async fn writes_for_itself_alone(stage: &Stage) -> (usize, usize) {
    let asked = || stage.server.asked().unwrap().len();
    let from = asked();
    let client = stage.server.client_of(stage.token().trim()).await.unwrap();
    for (path, body) in [lease("attic"), status("attic")] {
        assert_eq!(apply(&client, &path, &body).await, 200, "{path}");
    }
    let other = json!({"apiVersion": "freehold.dev/v1alpha1", "kind": "InferenceNode", "metadata": {"name": "cellar"}, "spec": {}});
    stage
        .person
        .kubectl(&["apply", "-f", "-"], &other.to_string())
        .unwrap();
    for (path, body) in [lease("cellar"), status("cellar"), lease("freehold-operator")] {
        assert_eq!(apply(&client, &path, &body).await, 403, "{path}");
    }
    stage
        .person
        .kubectl(&["delete", "inferencenode", "cellar"], "")
        .unwrap();
    (from, asked())
}

/// The API server is away for a while: what is wanted after that arrives soon, however long it was.
async fn outlives_an_outage(stage: &mut Stage) {
    stage.server.kill();
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(stage.unit("ActiveState"), "active");
    answers(stage, "the API server is away").await;
    stage.server.start_again().await.unwrap();
    let begun = Instant::now();
    deploy(stage, "lost", "/nowhere.gguf");
    stage
        .until("the machine tells of a model", || {
            let seen = json!(stage.seen()).to_string();
            if seen.contains("/nowhere.gguf") {
                Ok(())
            } else {
                Err(seen)
            }
        })
        .await;
    println!(
        "carried out {:.1?} after the API server was back",
        begun.elapsed()
    );
    assert!(begun.elapsed() < Duration::from_secs(20));
    stage
        .person
        .kubectl(&["delete", "modeldeployment", "lost"], "")
        .unwrap();
}

/// One that crashes and one that hangs are started again.
async fn is_started_again(stage: &Stage) {
    let drop_in = stage
        .machine
        .path("/etc/systemd/system/freehold-node-agent.service.d/test.conf");
    std::fs::create_dir_all(drop_in.parent().unwrap()).unwrap();
    std::fs::write(&drop_in, "[Service]\nWatchdogSec=3\nRestartSec=1\n").unwrap();
    stage.on(&["systemctl", "daemon-reload"], "").unwrap();
    stage.on(&["systemctl", "restart", UNIT], "").unwrap();
    for (signal, why) in [("-KILL", "a crash"), ("-STOP", "a hang")] {
        let before = stage.process();
        stage.on(&["kill", signal, &before.to_string()], "").unwrap();
        stage
            .until(why, || {
                let (now, state) = (stage.process(), stage.unit("ActiveState"));
                let new = now != 0 && now != before && state == "active";
                if new {
                    Ok(())
                } else {
                    Err(format!("process {now}, was {before}, {state}"))
                }
            })
            .await;
    }
    // Without trouble it is left alone: three times the limit.
    let (process, begun) = (stage.process(), Instant::now());
    while begun.elapsed() < Duration::from_secs(9) {
        assert_eq!(stage.process(), process, "{}", stage.log());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    std::fs::remove_file(&drop_in).unwrap();
    stage.on(&["systemctl", "daemon-reload"], "").unwrap();
}

fn upgrades_and_rolls_back(stage: &Stage) {
    let agent = std::fs::read(stage.programs.join("freehold-node-agent")).unwrap();
    let broken = "#!/bin/sh\n[ \"$1\" = --version ] && echo freehold-node-agent 9.9.9 && exit 0\nexit 1\n";
    let put = |name: &str, content: &[u8]| {
        let path = stage.machine.path(&format!("/root/{name}"));
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    put("broken", broken.as_bytes());
    // What follows the program's last byte is never read.
    let newer = [agent.as_slice(), b"newer"].concat();
    put("newer", &newer);
    let installed = || std::fs::read(stage.machine.path(INSTALLED)).unwrap();

    let refused = stage
        .freehold(&["upgrade", "--agent", "/root/broken"], "")
        .unwrap_err();
    assert!(
        refused.contains("9.9.9") && refused.contains("was put back and runs"),
        "{refused}"
    );
    assert!(installed() == agent);
    assert_eq!(stage.unit("ActiveState"), "active");

    let before = stage.process();
    let said = stage
        .freehold(&["upgrade", "--agent", "/root/newer"], "")
        .unwrap();
    assert!(said.contains("attic runs"), "{said}");
    assert!(installed() == newer);
    assert_ne!(stage.process(), before);
    assert!(!stage.machine.path(&format!("{INSTALLED}.previous")).exists());
    let said = stage
        .freehold(&["upgrade", "--agent", "/root/newer"], "")
        .unwrap();
    assert!(said.contains("already"), "{said}");
}

/// Names of all that joining makes in a cluster.
fn accounts(person: &Person) -> Vec<String> {
    let kinds = "serviceaccounts,roles,rolebindings,clusterrolebindings";
    let found = person.get(&[kinds, "-A", "-l", "app.kubernetes.io/component=host-agent"]);
    found
        .iter()
        .map(|object| format!("{} {}", object["kind"], object["metadata"]["name"]))
        .collect()
}

async fn leaves_nothing(stage: &Stage) {
    assert_eq!(accounts(&stage.person).len(), 5);
    let kubeconfig = stage.machine.administers(&stage.server).unwrap();

    let refused = stage.freehold(&["leave"], "").unwrap_err();
    assert!(refused.contains("--local-only"), "{refused}");
    assert_eq!(stage.unit("ActiveState"), "active", "a refusal changes nothing");
    let said = stage
        .freehold(&["leave", "--purge", "--kubeconfig", kubeconfig], "")
        .unwrap();
    println!("{said}");
    assert_eq!(accounts(&stage.person), Vec::<String>::new());
    assert_eq!(stage.unit("LoadState"), "not-found");
    for path in [
        INSTALLED,
        "/usr/local/bin/freehold-node-agent.previous",
        "/etc/freehold",
        "/etc/systemd/system/freehold-node-agent.service",
        "/etc/systemd/system/multi-user.target.wants/freehold-node-agent.service",
        "/var/lib/freehold",
        "/var/lib/private/freehold",
    ] {
        assert!(
            std::fs::symlink_metadata(stage.machine.path(path)).is_err(),
            "{path} is left"
        );
    }
    assert!(
        stage.machine.path(MODEL).is_file(),
        "what the owner put there stays"
    );
    // The operator, which is awake, does not bring it back, though a model waits for a machine.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        assert_eq!(stage.seen(), Vec::<Value>::new());
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(
        stage
            .person
            .get(&[
                "leases",
                "-n",
                "freehold-system",
                "--field-selector=metadata.name=attic"
            ])
            .len(),
        0
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root and systemd's program"]
async fn a_machine_joins_works_is_upgraded_and_leaves() {
    let mut stage = Stage::set().await;
    joins(&stage).await;
    is_confined(&stage);
    serves_a_model(&stage).await;
    renews_its_token(&stage).await;
    let attempts = writes_for_itself_alone(&stage).await;
    outlives_an_outage(&mut stage).await;
    is_started_again(&stage).await;
    answers(&stage, "the agent was started again").await;
    upgrades_and_rolls_back(&stage);
    answers(&stage, "the agent was upgraded").await;
    let beyond = stage.server.beyond_grants(&stage.person, attempts).unwrap();
    assert!(beyond.is_empty(), "{beyond:#?}");
    let idle = stage
        .server
        .idle_grants(&stage.person, "freehold-host-attic")
        .unwrap();
    assert!(idle.is_empty(), "granted by joining and never used: {idle:?}");
    leaves_nothing(&stage).await;
}

/// On a Mac the same files lie elsewhere, and a property list takes the unit's place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the freehold program: tests/e2e"]
async fn a_dry_run_shows_everything_and_does_nothing() {
    let server = ApiServer::start(Storage::Kine).await.unwrap();
    let person = Person::new(Some(server.kubeconfig()));
    let freehold = own("freehold").unwrap();
    let join = |platform: &str| {
        person.run(
            &freehold,
            &[
                "node",
                "join",
                "--dry-run",
                "--node",
                "mac",
                "--platform",
                platform,
                "--label",
                "a=<&>",
            ],
            "",
        )
    };
    let refused = join("launchd").unwrap_err();
    assert!(refused.contains("chart is not installed"), "{refused}");
    let chart = chart();
    let arguments = [
        "install",
        "freehold",
        chart.to_str().unwrap(),
        "--namespace",
        "models",
        "--create-namespace",
    ];
    person
        .helm(&arguments, "admissionPolicy: {enabled: false}")
        .unwrap();
    let refused = join("launchd").unwrap_err();
    assert!(
        refused.contains("without it this machine could write for every other"),
        "{refused}"
    );
    let mut upgrade = arguments;
    upgrade[0] = "upgrade";
    person.helm(&upgrade, "admissionPolicy: {enabled: true}").unwrap();

    let shown = join("launchd").unwrap();
    assert!(
        shown.contains("name: freehold-host-mac") && shown.contains("namespace: models"),
        "{shown}"
    );
    let begin = shown.find("<?xml").unwrap();
    let end = shown.find("</plist>").unwrap() + "</plist>".len();
    let read = "import json, plistlib, sys; print(json.dumps(plistlib.loads(sys.stdin.buffer.read())))";
    let plist = person
        .run(
            Path::new("/usr/bin/env"),
            &["python3", "-c", read],
            &shown[begin..end],
        )
        .unwrap();
    let plist: Value = serde_json::from_str(&plist).unwrap();
    assert_eq!(plist["Label"], "dev.freehold.node-agent");
    assert_eq!(plist["ProgramArguments"], json!([INSTALLED]));
    assert_eq!(plist["KeepAlive"], json!({"SuccessfulExit": false}));
    assert_eq!(plist["RunAtLoad"], true);
    let settings = &plist["EnvironmentVariables"];
    assert_eq!(settings["FREEHOLD_NODE"], "mac");
    assert_eq!(settings["FREEHOLD_LABELS"], "a=<&>");
    assert_eq!(settings["FREEHOLD_WATCHDOG_SECONDS"], "60");
    assert_eq!(
        settings["FREEHOLD_TOKEN_FILE"],
        "/usr/local/var/freehold/credential/token"
    );

    let shown = join("systemd").unwrap();
    assert!(shown.contains("would be run: systemctl daemon-reload"), "{shown}");
    assert!(!shown.contains("eyJ"), "a dry run has no token: {shown}");
    assert_eq!(accounts(&person), Vec::<String>::new());
}
