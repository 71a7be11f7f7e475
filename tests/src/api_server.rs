//! A real kube-apiserver on this machine, over etcd or over kine with SQLite.
//!
//! ```text
//!  test ──TLS, token──▶ kube-apiserver ──▶ etcd (a port) or kine (a socket) ──▶ folder of the test
//! ```
//! Everything lies in one temporary folder and listens on loopback only. `FREEHOLD_TEST_KUBECONFIG` puts a cluster of
//! the reader's own in its place ([`crate::named`]), save where a test gives the server users or arguments.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use freehold_crds::SYSTEM_NAMESPACE;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, Patch, PatchParams};
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Client, Config};
use tempfile::TempDir;

use crate::audit;
use crate::child::Program;
use crate::named::NamedCluster;
use crate::parts::part;
use crate::person::Person;

/// A server that is not ready by then will not be.
const START: Duration = Duration::from_secs(90);
/// Another program may take a port between our asking for a free one and the server's listening on it.
const ATTEMPTS: usize = 3;

/// What keeps the objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// etcd, as most clusters have it.
    Etcd,
    /// kine over SQLite, as k3s has it on a single server.
    Kine,
}

/// Who a token of [`ApiServer::client_as`] speaks for.
#[derive(Clone, Debug)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Its groups.
    pub groups: Vec<String>,
}

/// A running API server. Dropping it ends it, or leaves the named cluster as it was.
#[derive(Debug)]
pub struct ApiServer {
    kubeconfig: PathBuf,
    arguments: Vec<String>,
    /// kube-apiserver, then what keeps its objects; none where the cluster is named.
    programs: Vec<Program>,
    /// Where it is and who is believed to be it.
    owner: Kubeconfig,
    folder: TempDir,
    /// Parts of the audit log, from an end of the server to its being ready again: who asks too early is refused,
    /// since its own caches of roles are not filled yet.
    unsettled: Vec<(usize, usize)>,
    _named: Option<NamedCluster>,
}

/// What grants rights, as kubectl is asked for it.
const ROLES: [&str; 2] = ["clusterroles,clusterrolebindings,roles,rolebindings", "-A"];
/// The token of the owner, who may do everything.
const OWNER: &str = "owner-token";

impl ApiServer {
    /// Starts one and waits until it is ready; or takes the cluster that the environment names.
    ///
    /// # Errors
    /// When a part is missing or ends early; its last words are in the error. When the named cluster holds already
    /// what the tests make.
    pub async fn start(storage: Storage) -> Result<Self> {
        if let Some(named) = NamedCluster::borrow().await? {
            return Ok(Self {
                kubeconfig: named.path().to_owned(),
                arguments: Vec::new(),
                programs: Vec::new(),
                owner: named.kubeconfig.clone(),
                folder: tempfile::tempdir()?,
                unsettled: Vec::new(),
                _named: Some(named),
            });
        }
        Self::start_with(storage, &[], &[]).await
    }

    /// The same with more users, and more arguments of kube-apiserver.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_with(storage: Storage, users: &[User], arguments: &[String]) -> Result<Self> {
        Self::start_at(Ipv4Addr::LOCALHOST, storage, users, arguments).await
    }

    /// The same at another of this machine's addresses, where other machines reach it too.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_at(
        address: Ipv4Addr,
        storage: Storage,
        users: &[User],
        arguments: &[String],
    ) -> Result<Self> {
        let mut failure = None;
        for _ in 0..ATTEMPTS {
            match Self::attempt(address, storage, users, arguments).await {
                Ok(server) => return Ok(server),
                Err(error) if format!("{error:#}").contains("address already in use") => {
                    failure = Some(error)
                }
                Err(error) => return Err(error),
            }
        }
        Err(failure.context("no attempt was made")?)
    }

    async fn attempt(
        address: Ipv4Addr,
        storage: Storage,
        users: &[User],
        arguments: &[String],
    ) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix(&crate::network::folder_prefix())
            .tempdir()?;
        let path = folder.path();
        let (store, endpoint) = start_storage(storage, path).await?;
        write_identities(path, users)?;
        let port = free_port()?;
        let file = |name: &str| path.join(name).display().to_string();
        let mut all = vec![
            format!("--etcd-servers={endpoint}"),
            format!("--bind-address={address}"),
            format!("--advertise-address={address}"),
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--secure-port={port}"),
            format!("--cert-dir={}", file("certificates")),
            format!("--token-auth-file={}", file("tokens")),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", file("service-account.pub")),
            format!(
                "--service-account-signing-key-file={}",
                file("service-account.key")
            ),
            "--service-cluster-ip-range=10.43.0.0/24".to_owned(),
        ];
        all.extend(audit::arguments(path)?);
        all.extend_from_slice(arguments);
        let program = Program::start("kube-apiserver", &part("kube-apiserver")?, &all, path)?;
        let authority = path.join("certificates/apiserver.crt");
        let owner = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\nclusters:\n- name: test\n  cluster: {{server: \"https://{address}:{port}\", certificate-authority: {authority:?}}}\nusers:\n- name: test\n  user: {{token: \"{OWNER}\"}}\ncontexts:\n- name: test\n  context: {{cluster: test, user: test, namespace: default}}\n",
        );
        let mut server = Self {
            kubeconfig: path.join("kubeconfig"),
            arguments: all,
            programs: vec![program, store],
            owner: Kubeconfig::from_yaml(&owner)?,
            folder,
            unsettled: Vec::new(),
            _named: None,
        };
        std::fs::write(&server.kubeconfig, owner)?;
        server.until_ready(&authority).await?;
        Ok(server)
    }

    /// Kills kube-apiserver; what keeps its objects stays.
    pub fn kill(&mut self) {
        if let Some(server) = self.programs.first_mut() {
            server.kill();
        }
    }

    /// Starts it again after [`Self::kill`], and waits until it is ready.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn start_again(&mut self) -> Result<()> {
        let from = audit::Log::read(self.folder.path())?.len();
        let program = Program::start(
            "kube-apiserver",
            &part("kube-apiserver")?,
            &self.arguments,
            self.folder.path(),
        )?;
        if let Some(server) = self.programs.first_mut() {
            *server = program;
        }
        let authority = self.folder.path().join("certificates/apiserver.crt");
        self.until_ready(&authority).await?;
        let to = audit::Log::read(self.folder.path())?.len();
        self.unsettled.push((from, to));
        Ok(())
    }

    /// `authority`: the certificate that it makes when it first starts.
    async fn until_ready(&mut self, authority: &Path) -> Result<()> {
        let started = Instant::now();
        let mut last = "nothing was heard".to_owned();
        while started.elapsed() < START {
            for program in &mut self.programs {
                if let Some(why) = program.ended() {
                    bail!("{why}");
                }
            }
            if authority.is_file() {
                match self.ready().await {
                    Ok(()) => return Ok(()),
                    Err(error) => last = format!("{error:#}"),
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let words: Vec<String> = self.programs.iter().map(Program::last_words).collect();
        bail!(
            "the API server was not ready within {START:?}: {last}\n{}",
            words.join("\n")
        );
    }

    async fn ready(&self) -> Result<()> {
        let client = self.client().await?;
        let request = http::Request::get("/readyz").body(Vec::new())?;
        let text = client.request_text(request).await?;
        anyhow::ensure!(text == "ok", "/readyz says {text}");
        Ok(())
    }

    fn kubeconfig_of(&self, token: &str) -> Kubeconfig {
        let mut kubeconfig = self.owner.clone();
        for user in &mut kubeconfig.auth_infos {
            user.auth_info = Some(AuthInfo {
                token: Some(token.to_owned().into()),
                ..AuthInfo::default()
            });
        }
        kubeconfig
    }

    /// A client that shows this token.
    ///
    /// # Errors
    /// When the kubeconfig does not read.
    pub async fn client_of(&self, token: &str) -> Result<Client> {
        client(self.kubeconfig_of(token)).await
    }

    /// A client of one who may do everything.
    ///
    /// # Errors
    /// When the kubeconfig does not read.
    pub async fn client(&self) -> Result<Client> {
        client(self.owner.clone()).await
    }

    /// A client of a user that was given to [`Self::start_with`].
    ///
    /// # Errors
    /// When the kubeconfig does not read.
    pub async fn client_as(&self, user: &User) -> Result<Client> {
        self.client_of(&token_of(user)).await
    }

    /// A kubeconfig of a user that was given to [`Self::start_with`], in the server's folder.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn kubeconfig_as(&self, user: &User) -> Result<PathBuf> {
        let token = token_of(user);
        let path = self.folder.path().join(format!("{token}.kubeconfig"));
        std::fs::write(&path, serde_yaml::to_string(&self.kubeconfig_of(&token))?)?;
        Ok(path)
    }

    /// The owner's kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// What service accounts asked of it so far, while it was ready.
    ///
    /// # Errors
    /// When the log does not read; on a named cluster, which keeps its own to itself.
    pub fn asked(&self) -> Result<audit::Log> {
        ensure!(
            self._named.is_none(),
            "a named cluster keeps its audit log to itself"
        );
        let log = audit::Log::read(self.folder.path())?;
        let unsettled = self.unsettled.iter().rev();
        Ok(unsettled.fold(log, |log, (from, to)| log.without(*from, *to)))
    }

    /// Complaints about what Freehold's service accounts asked for so far: what they were refused, and what no role
    /// of theirs grants. `but_for`: a part of [`Self::asked`] in which a test asked itself, with an account's token.
    ///
    /// # Errors
    /// As [`Self::asked`]; when no account asked for anything, which would prove nothing.
    pub fn beyond_grants(&self, person: &Person, but_for: (usize, usize)) -> Result<Vec<String>> {
        let log = self.asked()?.without(but_for.0, but_for.1);
        let accounts = log.accounts(SYSTEM_NAMESPACE);
        ensure!(!accounts.is_empty(), "no service account asked for anything");
        Ok(log.beyond_grants(&person.get(&ROLES), SYSTEM_NAMESPACE))
    }

    /// What one of Freehold's service accounts is granted and did not use so far.
    ///
    /// # Errors
    /// As [`Self::asked`]; when it is granted nothing.
    pub fn idle_grants(&self, person: &Person, account: &str) -> Result<Vec<String>> {
        let used = self.asked()?.used(SYSTEM_NAMESPACE, account);
        let mut granted = audit::granted(&person.get(&ROLES), account);
        ensure!(!granted.is_empty(), "{account} is granted nothing");
        granted.retain(|verb| !used.contains_key(verb));
        Ok(granted.into_iter().collect())
    }

    /// A folder that goes with the server.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The process ids of kube-apiserver and of what keeps its objects.
    #[must_use]
    pub fn process_ids(&self) -> Vec<u32> {
        self.programs.iter().map(Program::id).collect()
    }
}

async fn client(kubeconfig: Kubeconfig) -> Result<Client> {
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Makes the API server know the kinds of `crds`, and waits until it serves them.
///
/// # Errors
/// When it refuses one.
pub async fn install(client: &Client, crds: &[CustomResourceDefinition]) -> Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in crds {
        let name = crd.metadata.name.as_deref().context("a CRD has no name")?;
        let parameters = PatchParams::apply("freehold-tests").force();
        api.patch(name, &parameters, &Patch::Apply(crd))
            .await
            .with_context(|| format!("failed to install CRD {name}"))?;
    }
    for crd in crds {
        let name = crd.metadata.name.as_deref().context("a CRD has no name")?;
        let established = await_condition(api.clone(), name, conditions::is_crd_established());
        tokio::time::timeout(START, established)
            .await
            .with_context(|| format!("CRD {name} was not established within {START:?}"))??;
    }
    Ok(())
}

/// Starts what keeps the objects and waits until it listens: an API server that comes first takes half a
/// minute to try again.
async fn start_storage(storage: Storage, folder: &Path) -> Result<(Program, String)> {
    let data = folder.join("data");
    std::fs::create_dir_all(&data)?;
    match storage {
        Storage::Etcd => {
            let (clients, peers) = (free_port()?, free_port()?);
            let endpoint = format!("http://127.0.0.1:{clients}");
            let arguments = [
                format!("--data-dir={}", data.display()),
                format!("--listen-client-urls={endpoint}"),
                format!("--advertise-client-urls={endpoint}"),
                format!("--listen-peer-urls=http://127.0.0.1:{peers}"),
                format!("--initial-advertise-peer-urls=http://127.0.0.1:{peers}"),
                format!("--initial-cluster=default=http://127.0.0.1:{peers}"),
            ];
            let mut program = Program::start("etcd", &part("etcd")?, &arguments, folder)?;
            until(&mut program, || {
                std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, clients)).is_ok()
            })
            .await?;
            Ok((program, endpoint))
        }
        Storage::Kine => {
            let endpoint = format!("unix://{}", folder.join("kine.sock").display());
            let database = data.join("state.db");
            let arguments = [
                format!("--listen-address={endpoint}"),
                format!(
                    "--endpoint=sqlite://{}?_journal=WAL&cache=shared&_busy_timeout=30000&_txlock=immediate",
                    database.display()
                ),
                "--metrics-bind-address=0".to_owned(),
            ];
            let mut program = Program::start("kine", &part("kine")?, &arguments, folder)?;
            let socket = folder.join("kine.sock");
            until(&mut program, || socket.exists()).await?;
            Ok((program, endpoint))
        }
    }
}

async fn until(program: &mut Program, listens: impl Fn() -> bool) -> Result<()> {
    let started = Instant::now();
    while !listens() {
        if let Some(why) = program.ended() {
            bail!("{why}");
        }
        if started.elapsed() > START {
            bail!("it did not listen within {START:?}:\n{}", program.last_words());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

fn token_of(user: &User) -> String {
    format!("token-of-{}", user.name.replace([':', '/'], "-"))
}

/// Who may speak to the server, and the key with which it signs the tokens of service accounts.
fn write_identities(folder: &Path, users: &[User]) -> Result<()> {
    let mut tokens = format!("{OWNER},owner,owner,system:masters\n");
    for user in users {
        let groups = user.groups.join(",");
        tokens.push_str(&format!(
            "{},{},{},\"{groups}\"\n",
            token_of(user),
            user.name,
            user.name
        ));
    }
    std::fs::write(folder.join("tokens"), tokens)?;
    let key = rcgen::KeyPair::generate()?;
    std::fs::write(folder.join("service-account.key"), key.serialize_pem())?;
    std::fs::write(folder.join("service-account.pub"), key.public_key_pem())?;
    Ok(())
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}
