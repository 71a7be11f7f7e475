//! The program as people run it: real processes, a real model, real kubectl, the official clients.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What `./tests/run` put into the cache.
fn cached(name: &str) -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
        .expect("HOME is set");
    let path = base.join("freehold").join(name);
    assert!(
        path.exists(),
        "{} is not there: run ./tests/run, which fetches what the tests need",
        path.display()
    );
    path
}

fn freehold() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_freehold"));
    // Nothing of the caller's own set-up may leak in.
    for name in [
        "KUBECONFIG",
        "FREEHOLD_DATA_DIR",
        "HF_ENDPOINT",
        "RUST_LOG",
        "FREEHOLD_BASE_URL",
    ] {
        command.env_remove(name);
    }
    command
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// A running `freehold up`, stopped at the end even when the test fails.
struct Up {
    child: Child,
    base_url: String,
    kubeconfig: PathBuf,
    log: Arc<Mutex<String>>,
}

impl Up {
    fn start(data_dir: &Path, more: &[&str]) -> Self {
        let mut child = freehold()
            .args([
                "up",
                "--listen",
                "127.0.0.1:0",
                "--api-listen",
                "127.0.0.1:0",
                "--node-name",
                "testbox",
                "--data-dir",
            ])
            .arg(data_dir)
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (errors, kept) = (child.stderr.take().unwrap(), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                let mut kept = kept.lock().unwrap();
                kept.push_str(&line);
                kept.push('\n');
            }
        });
        let (mut base_url, mut lines) = (
            String::new(),
            BufReader::new(child.stdout.take().unwrap()).lines(),
        );
        for line in lines.by_ref().map_while(Result::ok) {
            if let Some(url) = line.strip_prefix("OpenAI API") {
                url.trim().clone_into(&mut base_url);
            }
            if line.starts_with("Stop with") {
                break;
            }
        }
        std::thread::spawn(move || lines.for_each(drop));
        assert!(
            !base_url.is_empty(),
            "freehold up did not start: {}",
            log.lock().unwrap()
        );
        Self {
            child,
            base_url,
            kubeconfig: data_dir.join("kubeconfig"),
            log,
        }
    }

    fn kubectl(&self, arguments: &[&str]) -> Output {
        Command::new(cached("bin/kubectl"))
            .args(arguments)
            .env("KUBECONFIG", &self.kubeconfig)
            .output()
            .unwrap()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        freehold()
            .args(arguments)
            .env("KUBECONFIG", &self.kubeconfig)
            .env("FREEHOLD_BASE_URL", &self.base_url)
            .output()
            .unwrap()
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits until `kubectl get` gives this text.
    fn wait_for(&self, what: &[&str], wanted: &str) {
        let deadline = Instant::now() + Duration::from_secs(90);
        loop {
            let output = self.kubectl(what);
            let found = String::from_utf8_lossy(&output.stdout).into_owned();
            if found.contains(wanted) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{what:?} gives {found:?} and not {wanted:?}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends it as Ctrl-C does, and sees that it ends well.
    fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(
                    status.success(),
                    "freehold up ended with {status}\n{}",
                    self.log()
                );
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("freehold up did not stop within 30 s of Ctrl-C\n{}", self.log());
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn deployment(name: &str, path: &Path, more: &str) -> String {
    format!(
        "apiVersion: freehold.dev/v1alpha1\nkind: ModelDeployment\nmetadata:\n  name: {name}\n  namespace: default\nspec:\n  model:\n    path: {}\n{more}---\n",
        path.display()
    )
}

#[test]
fn the_demo_goes_the_whole_way_and_again_from_its_cache() {
    let folder = tempfile::tempdir().unwrap();
    let model = cached("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let demo = |with_model: bool| {
        let mut command = freehold();
        command
            .args([
                "demo",
                "--listen",
                "127.0.0.1:0",
                "--api-listen",
                "127.0.0.1:0",
                "--data-dir",
            ])
            .arg(folder.path());
        if with_model {
            command.arg("--model-file").arg(&model);
        }
        command.output().unwrap()
    };
    let first = demo(true);
    let printed = text(&first);
    assert!(first.status.success(), "{printed}");
    for part in [
        "ModelDeployment default/smollm2 created",
        "Serving: 1 of 1 replicas serve",
        "Paris",
        "ENFORCEMENT",
        "export KUBECONFIG=",
    ] {
        assert!(printed.contains(part), "{part:?} is not in:\n{printed}");
    }
    let second = demo(false);
    let printed = text(&second);
    assert!(
        second.status.success() && printed.contains("is here already") && printed.contains("Paris"),
        "{printed}"
    );
}

#[test]
fn a_machine_serves_what_is_applied_to_kubectl_and_the_official_clients() {
    let folder = tempfile::tempdir().unwrap();
    let up = Up::start(&folder.path().join("data"), &[]);
    let manifests = folder.path().join("models.yaml");
    let chat = deployment(
        "chat",
        &cached("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        "  aliases: [gpt-4o-mini]\n  engine: {contextLength: 1024, concurrency: 4}\n",
    );
    let embed = deployment("embed", &cached("models/all-MiniLM-L6-v2"), "");
    std::fs::write(&manifests, format!("{chat}{embed}")).unwrap();

    let applied = up.run(&["apply", "-f", manifests.to_str().unwrap()]);
    assert!(applied.status.success(), "{}", text(&applied));
    let waited = up.kubectl(&[
        "wait",
        "md/chat",
        "md/embed",
        "--for=condition=Ready",
        "--timeout=90s",
    ]);
    assert!(waited.status.success(), "{}\n{}", text(&waited), up.log());
    let again = up.run(&["apply", "-f", manifests.to_str().unwrap()]);
    assert_eq!(text(&again).matches("unchanged").count(), 2, "{}", text(&again));

    for (program, script) in [
        (cached("venv/bin/python"), "test_openai.py"),
        (PathBuf::from("node"), "openai.mjs"),
    ] {
        let suite = Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap())
            .join("../tests/clients")
            .join(script);
        let output = Command::new(program)
            .arg(suite)
            .env("FREEHOLD_BASE_URL", &up.base_url)
            .env("FREEHOLD_CHAT_MODEL", "chat")
            .env("FREEHOLD_EMBEDDING_MODEL", "embed")
            .env("FREEHOLD_CLIENTS", cached("clients"))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{script}:\n{}\n{}",
            text(&output),
            up.log()
        );
    }
    let answer = up.run(&[
        "chat",
        "gpt-4o-mini",
        "-m",
        "What is the capital of France? Answer in one sentence.",
        "--temperature",
        "0",
        "--max-tokens",
        "24",
    ]);
    assert!(text(&answer).contains("Paris"), "{}", text(&answer));
    let table = text(&up.run(&["get", "md"]));
    assert!(table.contains("Serving") && table.contains("testbox"), "{table}");
    let doctor = up.run(&["doctor", "chat"]);
    assert!(doctor.status.success(), "{}", text(&doctor));

    let deleted = up.run(&["delete", "md", "chat"]);
    assert!(deleted.status.success(), "{}", text(&deleted));
    up.wait_for(
        &[
            "get",
            "inferencenodes",
            "-o",
            "jsonpath={.items[0].status.instances[*].name}",
        ],
        "embed",
    );
    up.stop();
}

#[test]
fn a_folder_is_kept_applied_and_what_leaves_it_is_pruned() {
    let folder = tempfile::tempdir().unwrap();
    let repository = folder.path().join("repository");
    std::fs::create_dir(&repository).unwrap();
    let suspended = |name: &str| deployment(name, Path::new("/nowhere.gguf"), "  suspend: true\n");
    std::fs::write(repository.join("one.yaml"), suspended("one")).unwrap();
    std::fs::write(repository.join("two.yaml"), suspended("two")).unwrap();
    let up = Up::start(
        &folder.path().join("data"),
        &["--manifests", repository.to_str().unwrap()],
    );
    let names = ["get", "md", "-o", "name"];
    up.wait_for(&names, "modeldeployment.freehold.dev/two");

    // A broken file stops everything but what runs: nothing is pruned on its account.
    std::fs::write(repository.join("two.yaml"), "kind: [").unwrap();
    std::fs::write(repository.join("three.yaml"), suspended("three")).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !up.log().contains("Failed to apply the folder") {
        assert!(Instant::now() < deadline, "{}", up.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(text(&up.kubectl(&names)).contains("/two"));

    std::fs::remove_file(repository.join("two.yaml")).unwrap();
    up.wait_for(&names, "/three");
    let deadline = Instant::now() + Duration::from_secs(30);
    while text(&up.kubectl(&names)).contains("/two") {
        assert!(Instant::now() < deadline, "two is not pruned: {}", up.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(text(&up.kubectl(&names)).contains("/one"));
    up.stop();
}

#[test]
fn files_that_are_no_models_are_told_apart_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let good = freehold()
        .arg("inspect")
        .arg(cached("models/SmolLM2-135M-Instruct.Q4_1.gguf"))
        .output()
        .unwrap();
    assert!(
        good.status.success() && text(&good).contains("llama 135M Q4_1"),
        "{}",
        text(&good)
    );
    let broken = folder.path().join("broken.gguf");
    let mut head = vec![0; 4096];
    std::fs::File::open(cached("models/SmolLM2-135M-Instruct.Q4_1.gguf"))
        .unwrap()
        .read_exact(&mut head)
        .unwrap();
    std::fs::write(&broken, head).unwrap();
    let bad = freehold().arg("inspect").arg(&broken).output().unwrap();
    assert_eq!(bad.status.code(), Some(1));
    assert!(text(&bad).contains("not sound"), "{}", text(&bad));
}

#[test]
fn a_plan_is_made_offline_with_its_reasons() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("m.yaml");
    std::fs::write(
        &file,
        deployment("chat", &cached("models/SmolLM2-135M-Instruct.Q4_1.gguf"), ""),
    )
    .unwrap();
    let fits = freehold()
        .args(["plan", "--memory", "8Gi", "-f"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(
        fits.status.success() && text(&fits).contains("fits in"),
        "{}",
        text(&fits)
    );
    let tight = freehold()
        .args(["plan", "--memory", "100Mi", "-f"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(
        !tight.status.success() && text(&tight).contains("does not fit"),
        "{}",
        text(&tight)
    );
    std::fs::write(&file, "kind: ModelDeployment\n").unwrap();
    let wrong = freehold().args(["plan", "-f"]).arg(&file).output().unwrap();
    assert!(
        !wrong.status.success() && text(&wrong).contains("apiVersion is missing"),
        "{}",
        text(&wrong)
    );
}

#[test]
fn a_bench_gives_figures_of_the_engine_and_of_chats_through_a_gateway_of_its_own() {
    let model = cached("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let small = [
        "--rounds",
        "1",
        "--prompt-tokens",
        "24",
        "--decode-tokens",
        "6",
        "--sequences",
        "1,3",
    ];
    let output = freehold()
        .arg("bench")
        .arg(&model)
        .args(small)
        .args(["--chats", "1,2", "--answer-tokens", "5"])
        .args(["--json", "--http"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |pointer: &str| {
        report
            .pointer(pointer)
            .and_then(serde_json::Value::as_f64)
            .unwrap_or_else(|| panic!("{pointer} is no number in {report:#}"))
    };
    for speed in [
        "/engine/prefill/tokens_per_second/median",
        "/engine/decode/0/tokens_per_second/median",
        "/engine/decode/1/tokens_per_second/median",
        "/engine/load_ms/median",
        "/http/chats/0/tokens_per_second",
        "/http/chats/1/tokens_per_second",
        "/http/chats/1/first_token_p50_ms",
    ] {
        assert!(number(speed) > 0.0, "{speed} in {report:#}");
    }
    assert_eq!(number("/engine/decode/1/sequences"), 3.0);
    // The weights are in memory, and not twice more.
    let resident = number("/engine/resident_loaded_bytes") / number("/engine/file_bytes");
    assert!((0.8..3.0).contains(&resident), "{resident} in {report:#}");
    // Eight answers a number of chats, none longer than was asked.
    for chats in ["/http/chats/0", "/http/chats/1"] {
        assert_eq!(number(&format!("{chats}/answers")), 8.0);
        assert!(
            (8.0..=40.0).contains(&number(&format!("{chats}/tokens"))),
            "{report:#}"
        );
        assert!(
            number(&format!("{chats}/first_token_p95_ms")) >= number(&format!("{chats}/first_token_p50_ms"))
        );
    }

    let table = freehold().arg("bench").arg(&model).args(small).output().unwrap();
    let shown = text(&table);
    for part in [
        "prefill of 24 tokens",
        "decode of 6 tokens, 3 sequences",
        "load",
        "of the file",
    ] {
        assert!(
            table.status.success() && shown.contains(part),
            "{part:?} is not in:\n{shown}"
        );
    }
    let astray = freehold()
        .arg("bench")
        .arg("--http")
        .arg(&model)
        .arg("x")
        .output()
        .unwrap();
    assert!(
        !astray.status.success() && text(&astray).contains("write --http last"),
        "{}",
        text(&astray)
    );
}
