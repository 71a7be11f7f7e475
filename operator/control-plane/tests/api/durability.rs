//! What happens to what was answered when the process is killed, the disk is full or the file is broken,
//! and what an idle control plane costs.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use freehold_control_plane::{ControlPlane, OpenControlPlane, Options};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::support::{DEADLINE, crds, eventually, refusal};

/// What the child below is to do, and where.
const ROLE: &str = "FREEHOLD_TEST_CHILD_ROLE";
const FOLDER: &str = "FREEHOLD_TEST_CHILD_FOLDER";

fn open(folder: &Path) -> Result<ControlPlane, OpenControlPlane> {
    ControlPlane::open(Options {
        data_dir: Some(folder.to_owned()),
        crds: crds(),
    })
}

fn map(name: &str, content: &str) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name}, "data": {"content": content}})).unwrap()
}

/// This very test program, run again as the process that is killed.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "the other process of the tests below"]
#[allow(clippy::print_stdout)]
async fn child() {
    let (Ok(role), Some(folder)) = (std::env::var(ROLE), std::env::var_os(FOLDER)) else {
        return;
    };
    // The parent may be about to let go of it.
    let control_plane = eventually("the store opens", || async { open(Path::new(&folder)).ok() }).await;
    match role.as_str() {
        "write" => write_for_ever(&control_plane).await,
        "fill" => fill_the_disk(&control_plane).await,
        _ => {
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
            let server = control_plane.serve(address, Path::new(&folder)).await.unwrap();
            println!("\nREADY {}", server.kubeconfig().display());
            std::future::pending::<()>().await;
        }
    }
}

/// Four writers that create and now and then delete, and say so only when it was answered.
#[allow(clippy::print_stdout)]
async fn write_for_ever(control_plane: &ControlPlane) {
    let run = control_plane.revision();
    let writers = (0..4).map(|writer| {
        let api: Api<ConfigMap> = Api::default_namespaced(control_plane.client());
        tokio::spawn(async move {
            for n in 0.. {
                let name = format!("r{run}-w{writer}-n{n}");
                let made = api
                    .create(&PostParams::default(), &map(&name, "x"))
                    .await
                    .unwrap();
                println!("\nPUT {name} {}", made.resource_version().unwrap());
                if n % 3 == 2 {
                    println!("\nGOING {name} 0");
                    api.delete(&name, &DeleteParams::default()).await.unwrap();
                    println!("\nGONE {name} 0");
                }
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
}

/// Writes until the disk takes no more, then makes room and goes on.
#[allow(clippy::print_stdout)]
async fn fill_the_disk(control_plane: &ControlPlane) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let unlimited = getrlimit(Resource::Fsize);
    let limit = |current| {
        let limit = Rlimit {
            current,
            maximum: unlimited.maximum,
        };
        setrlimit(Resource::Fsize, limit).unwrap();
    };
    limit(Some(4 << 20));
    let api: Api<ConfigMap> = Api::default_namespaced(control_plane.client());
    let content = "x".repeat(200_000);
    let mut kept = Vec::new();
    let refused = loop {
        let name = format!("m{}", kept.len());
        match api.create(&PostParams::default(), &map(&name, &content)).await {
            Ok(made) => kept.push((name, made.resource_version().unwrap())),
            refused => break refusal(refused),
        }
        assert!(kept.len() < 100, "the limit did not bite");
    };
    assert_eq!(refused.code, 500);
    assert!(
        refused.message.contains("failed to write the store"),
        "{}",
        refused.message
    );
    let refused_name = format!("m{}", kept.len());
    // Still full: reading goes on as before, and a second write is refused as the first.
    assert_eq!(
        refusal(api.create(&PostParams::default(), &map("again", &content)).await).code,
        500
    );
    assert_eq!(
        api.list(&ListParams::default()).await.unwrap().items.len(),
        kept.len()
    );
    assert!(api.get_opt(&refused_name).await.unwrap().is_none());
    limit(unlimited.current);
    let made = api
        .create(&PostParams::default(), &map("after", &content))
        .await
        .unwrap();
    kept.push(("after".to_owned(), made.resource_version().unwrap()));
    for (name, revision) in kept {
        println!("\nPUT {name} {revision}");
    }
    println!("\nGONE {refused_name} 0\nGONE again 0\nDONE");
    std::future::pending::<()>().await;
}

/// Starts the child and gives what it prints.
fn start(role: &str, folder: &Path) -> (Child, Lines<BufReader<ChildStdout>>) {
    // Writing past the size limit is an error to handle, not a signal to die from.
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            "trap '' XFSZ; exec \"$0\" --exact durability::child --ignored --nocapture --test-threads=1",
        ])
        .arg(std::env::current_exe().unwrap())
        .env(ROLE, role)
        .env(FOLDER, folder)
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}

/// What a child said was answered: names, with the revision of those that are there.
#[derive(Default)]
struct Answered(BTreeMap<String, Known>);

/// What is known of one object.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Known {
    There(u64),
    /// Its deletion was asked for and not answered: it may have happened.
    Going(u64),
    Gone,
}

impl Answered {
    /// Takes one line in, and says whether it told of a write.
    fn hear(&mut self, line: &str) -> bool {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["PUT", name, revision] => {
                let revision = revision.parse().unwrap();
                self.0.insert((*name).to_owned(), Known::There(revision))
            }
            ["GOING", name, _] => {
                if let Some(Known::There(revision)) = self.0.get(*name).copied() {
                    self.0.insert((*name).to_owned(), Known::Going(revision));
                }
                return false;
            }
            ["GONE", name, _] => self.0.insert((*name).to_owned(), Known::Gone),
            _ => return false,
        };
        true
    }

    /// Opens the store and finds everything as it was answered.
    async fn check(&mut self, folder: &Path) -> u64 {
        // The dead process' lock goes with it, but not in the same instant.
        let control_plane = eventually("the store opens", || async { open(folder).ok() }).await;
        let revision_of = |known: &Known| match known {
            Known::There(revision) | Known::Going(revision) => *revision,
            Known::Gone => 0,
        };
        let highest = self.0.values().map(revision_of).max().unwrap_or_default();
        assert!(
            control_plane.revision() >= highest,
            "{} < {highest}",
            control_plane.revision()
        );
        let api: Api<ConfigMap> = Api::default_namespaced(control_plane.client());
        for (name, known) in &mut self.0 {
            let found = api.get_opt(name).await.unwrap();
            let found = match found {
                Some(map) => Known::There(map.resource_version().unwrap().parse().unwrap()),
                None => Known::Gone,
            };
            match *known {
                // Whichever it was: from here on it stays so.
                Known::Going(revision) => {
                    assert!(
                        [Known::Gone, Known::There(revision)].contains(&found),
                        "{name}: {found:?}"
                    );
                    *known = found;
                }
                known => assert_eq!(found, known, "{name}"),
            }
        }
        control_plane.revision()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_loses_no_answered_write_and_never_goes_back() {
    let folder = TempDir::new().unwrap();
    let (mut answered, mut highest) = (Answered::default(), 0);
    for round in 0_usize..4 {
        let (mut child, mut lines) = start("write", folder.path());
        let mut heard = 0;
        while heard < 40 + 37 * round {
            let line = tokio::time::timeout(DEADLINE, lines.next_line())
                .await
                .unwrap()
                .unwrap();
            heard += usize::from(answered.hear(&line.expect("the child goes on until it is killed")));
        }
        child.kill().await.unwrap();
        // What it had said before it died.
        while let Some(line) = lines.next_line().await.unwrap() {
            answered.hear(&line);
        }
        let revision = answered.check(folder.path()).await;
        assert!(revision > highest);
        highest = revision;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_and_nothing_else_and_mends() {
    let folder = TempDir::new().unwrap();
    let (mut child, mut lines) = start("fill", folder.path());
    let mut answered = Answered::default();
    loop {
        let line = tokio::time::timeout(DEADLINE, lines.next_line())
            .await
            .unwrap()
            .unwrap();
        let line = line.expect("the child lives");
        answered.hear(&line);
        if line == "DONE" {
            break;
        }
    }
    child.kill().await.unwrap();
    answered.check(folder.path()).await;
}

#[tokio::test]
async fn a_restart_finds_objects_revision_and_generation() {
    let folder = TempDir::new().unwrap();
    let control_plane = open(folder.path()).unwrap();
    let api: Api<ConfigMap> = Api::default_namespaced(control_plane.client());
    let made = api
        .create(&PostParams::default(), &map("kept", "x"))
        .await
        .unwrap();
    api.create(&PostParams::default(), &map("gone", "x"))
        .await
        .unwrap();
    api.delete("gone", &DeleteParams::default()).await.unwrap();
    let revision = control_plane.revision();
    drop((api, control_plane));
    let control_plane = eventually("the store opens", || async { open(folder.path()).ok() }).await;
    assert_eq!(control_plane.revision(), revision, "a start writes nothing");
    let api: Api<ConfigMap> = Api::default_namespaced(control_plane.client());
    let found = api.list(&ListParams::default()).await.unwrap();
    assert_eq!(found.items, [made]);
}

#[tokio::test]
async fn a_folder_serves_one_process_and_says_so_to_the_second() {
    let folder = TempDir::new().unwrap();
    let _first = open(folder.path()).unwrap();
    let second = open(folder.path()).map(|_| ()).unwrap_err();
    assert!(
        second
            .to_string()
            .contains("if another freehold runs with this folder, stop it"),
        "{second}"
    );
}

#[tokio::test]
async fn a_broken_file_is_an_error_and_not_a_crash() {
    let folder = TempDir::new().unwrap();
    let control_plane = open(folder.path()).unwrap();
    let api: Api<ConfigMap> = Api::default_namespaced(control_plane.client());
    for n in 0..20 {
        api.create(&PostParams::default(), &map(&format!("m{n}"), &"x".repeat(2000)))
            .await
            .unwrap();
    }
    drop((api, control_plane));
    eventually("the store opens", || async { open(folder.path()).ok() }).await;
    let whole = std::fs::read(folder.path().join("control-plane.redb")).unwrap();
    let broken = TempDir::new().unwrap();
    let path = broken.path().join("control-plane.redb");
    let mut refused = 0;
    for at in (0..whole.len()).step_by(whole.len() / 24) {
        std::fs::write(&path, &whole).unwrap();
        let mut file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.seek(SeekFrom::Start(at as u64)).unwrap();
        file.write_all(&[0xa5; 4096]).unwrap();
        refused += usize::from(matches!(
            open(broken.path()),
            Err(OpenControlPlane::OpenStore { .. })
        ));
    }
    assert!(refused > 0, "no damage was found");
    for length in [1, 4096, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(
            matches!(open(broken.path()), Err(OpenControlPlane::OpenStore { .. })),
            "{length}"
        );
    }
}

/// The value of `VmRSS`, in KiB.
fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Processor time used so far, in ticks of 10 ms.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_control_plane_costs_little_memory_no_time_and_no_writes() {
    let folder = TempDir::new().unwrap();
    let (child, mut lines) = start("serve", folder.path());
    let kubeconfig = loop {
        let line = tokio::time::timeout(DEADLINE, lines.next_line())
            .await
            .unwrap()
            .unwrap();
        if let Some(path) = line.expect("the child lives").strip_prefix("READY ") {
            break path.to_owned();
        }
    };
    let file = kube::config::Kubeconfig::read_from(kubeconfig).unwrap();
    let config = kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default())
        .await
        .unwrap();
    let api: Api<ConfigMap> = Api::default_namespaced(kube::Client::try_from(config).unwrap());
    for n in 0..50 {
        api.create(&PostParams::default(), &map(&format!("m{n}"), &"x".repeat(1000)))
            .await
            .unwrap();
    }
    let list = api.list(&ListParams::default()).await.unwrap();
    let mut watches = Vec::new();
    for _ in 0..4 {
        watches.push(
            api.watch(
                &kube::api::WatchParams::default(),
                list.metadata.resource_version.as_deref().unwrap(),
            )
            .await
            .unwrap(),
        );
    }
    let pid = child.id().unwrap();
    let store = folder.path().join("control-plane.redb");
    let written = || std::fs::metadata(&store).unwrap().modified().unwrap();
    let (begin, used, modified) = (Instant::now(), ticks(pid), written());
    tokio::time::sleep(Duration::from_secs(3)).await;
    let used = ticks(pid) - used;
    assert!(used <= 2, "{used} ticks in {:?}", begin.elapsed());
    assert_eq!(written(), modified);
    let resident = resident_kib(pid);
    assert!(resident < 40 * 1024, "{resident} KiB");
}
