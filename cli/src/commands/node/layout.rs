//! What lies where on the machine.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

/// What starts services here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Platform {
    /// Linux with systemd.
    Systemd,
    /// macOS.
    Launchd,
}

impl Platform {
    /// This machine's.
    pub(super) fn here() -> Result<Self> {
        if cfg!(target_os = "macos") {
            return Ok(Self::Launchd);
        }
        // As sd_booted(3) looks.
        if Path::new("/run/systemd/system").is_dir() {
            return Ok(Self::Systemd);
        }
        bail!(
            "this machine runs neither systemd nor launchd: start freehold-node-agent with what it has instead; docs/host-agents.md tells the settings"
        )
    }
}

/// The paths.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) platform: Platform,
    pub(super) program: PathBuf,
    /// The unit or plist.
    pub(super) service: PathBuf,
    /// Folder of settings; None where the plist holds them.
    pub(super) settings: Option<PathBuf>,
    pub(super) data: PathBuf,
}

impl Layout {
    pub(super) fn of(platform: Platform) -> Self {
        let program = PathBuf::from("/usr/local/bin/freehold-node-agent");
        match platform {
            Platform::Systemd => Self {
                platform,
                program,
                service: "/etc/systemd/system/freehold-node-agent.service".into(),
                settings: Some("/etc/freehold".into()),
                data: "/var/lib/freehold".into(),
            },
            Platform::Launchd => Self {
                platform,
                program,
                service: "/Library/LaunchDaemons/dev.freehold.node-agent.plist".into(),
                settings: None,
                data: "/usr/local/var/freehold".into(),
            },
        }
    }

    /// Folder of what the agent shows to the API server. The agent renews the token in it.
    pub(super) fn credential(&self) -> PathBuf {
        self.data.join("credential")
    }

    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.credential().join("kubeconfig")
    }

    pub(super) fn token(&self) -> PathBuf {
        self.credential().join("token")
    }

    /// Which machine this is, for later commands.
    pub(super) fn node(&self) -> PathBuf {
        self.credential().join("node")
    }

    /// The file of settings, if there is one beside the service's own.
    pub(super) fn environment(&self) -> Option<PathBuf> {
        self.settings.as_ref().map(|folder| folder.join("node-agent.env"))
    }

    /// The name under which this machine joined.
    pub(super) fn joined(&self) -> Result<String> {
        let path = self.node();
        let name = fs::read_to_string(&path).with_context(|| {
            format!(
                "this machine has joined no cluster, or only root may see it: failed to read {}",
                path.display()
            )
        })?;
        Ok(name.trim().to_owned())
    }
}

/// A file to be written.
#[derive(Clone, Debug)]
pub(super) struct File {
    pub(super) path: PathBuf,
    pub(super) content: String,
    pub(super) mode: u32,
    /// Shown by a dry run instead of the content.
    pub(super) secret: Option<&'static str>,
}

impl File {
    pub(super) fn new(path: PathBuf, mode: u32, content: String) -> Self {
        Self {
            path,
            content,
            mode,
            secret: None,
        }
    }

    /// Writes it, whole or not at all.
    pub(super) fn write(&self) -> Result<()> {
        write(&self.path, self.mode, self.content.as_bytes())
    }
}

/// Writes a file, whole or not at all.
pub(super) fn write(path: &Path, mode: u32, content: &[u8]) -> Result<()> {
    let folder = path.parent().context("a file lies in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("failed to make {}", folder.display()))?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = folder.join(name);
    let _ = fs::remove_file(&temporary);
    let written = || -> std::io::Result<()> {
        let mut file = fs::OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(mode)
            .open(&temporary)?;
        // The umask may have taken some.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    written().with_context(|| format!("failed to write {}", path.display()))
}

/// Gives the folder of credentials to whom the folder around it belongs. With a user that systemd makes up, that
/// is root before the first start, which hands all of it over; after that, it is that user.
pub(super) fn hand_over(layout: &Layout, user: Option<&str>) -> Result<()> {
    let (owner, group) = match user {
        Some(user) => user_ids(user)?,
        None => {
            let around = fs::metadata(&layout.data)?;
            (around.uid(), around.gid())
        }
    };
    let folder = layout.credential();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700))?;
    let mut paths = vec![folder.clone()];
    if user.is_some() {
        paths.push(layout.data.clone());
    }
    for entry in fs::read_dir(&folder)? {
        paths.push(entry?.path());
    }
    for path in paths {
        std::os::unix::fs::lchown(&path, Some(owner), Some(group))
            .with_context(|| format!("failed to give {} to its user", path.display()))?;
    }
    Ok(())
}

fn user_ids(user: &str) -> Result<(u32, u32)> {
    let id = |what: &str| -> Result<u32> {
        let output = std::process::Command::new("id").args([what, user]).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        text.trim()
            .parse()
            .with_context(|| format!("this machine has no user {user:?}"))
    };
    Ok((id("-u")?, id("-g")?))
}

/// Removes a file or a folder. Whether it was there.
pub(super) fn remove(path: &Path) -> Result<bool> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("failed to look at {}", path.display())),
    };
    if found.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
    .with_context(|| format!("failed to remove {}", path.display()))?;
    Ok(true)
}
