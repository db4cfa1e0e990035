//! The other tools: installs them, and runs each as its users would, from one server or seeder to one client.

pub mod bittorrent;
pub mod rsync;
pub mod tcp;
pub mod tracker;

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::process::Deadline;

/// What a leg of `bench pair` works on.
#[derive(Debug)]
pub struct Job<'a> {
    /// The address of both ends.
    pub address: Ipv4Addr,
    /// The file to be brought over.
    pub source: &'a Path,
    /// An empty directory of this leg alone: for the result, configurations and logs.
    pub dir: &'a Path,
    /// When it has to be done.
    pub deadline: Deadline,
}

impl Job<'_> {
    /// A path of this leg.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The source's name.
    pub fn name(&self) -> Result<&str> {
        let name = self.source.file_name().and_then(|name| name.to_str());
        name.context("the source has a name")
    }

    /// The source's length.
    pub fn bytes(&self) -> Result<u64> {
        Ok(fs::metadata(self.source)?.len())
    }

    /// The directory that the source lies in.
    pub fn source_dir(&self) -> Result<&Path> {
        self.source
            .parent()
            .context("the source lies in a directory")
    }

    /// A port that nobody uses.
    pub fn free_port(&self) -> Result<u16> {
        let listener = std::net::TcpListener::bind((self.address, 0))?;
        Ok(listener.local_addr()?.port())
    }
}

/// Installs Debian packages whose programs are missing: (program, package).
pub fn install(needs: &[(&str, &str)]) -> Result<()> {
    let missing = needs.iter().filter(|(program, _)| !is_installed(program));
    let packages: Vec<&str> = missing.map(|(_, package)| *package).collect();
    if packages.is_empty() {
        return Ok(());
    }
    eprintln!("installing {}", packages.join(" "));
    let apt = |args: &[&str]| {
        Command::new("apt-get")
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .context("apt-get is needed to install other tools")
    };
    apt(&["update", "-qq"])?;
    let args = ["install", "-y", "-qq", "--no-install-recommends"];
    ensure!(
        apt(&[&args[..], &packages].concat())?.success(),
        "apt-get install failed: run as root, or install {}",
        packages.join(" ")
    );
    Ok(())
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).exists())
}

/// Makes a directory anew, empty.
pub fn empty_dir(dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("emptying {}", dir.display()))?;
    }
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))
}

/// Writes an executable file.
pub fn script(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(())
}
