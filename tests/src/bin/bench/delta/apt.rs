//! Debian packages in an image: installed and upgraded by apt inside it, from the machine's own mirrors.
//!
//! Lists, packages and apt's settings lie beside the images and are bound in meanwhile: none of them is in an image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::image::{Mount, said};
use crate::process::{self, Deadline};
use crate::tools::{empty_dir, script};

/// The older suite.
const SUITE: &str = "bookworm";
/// What the newer packages come from besides.
const UPDATES: [&str; 2] = ["bookworm-updates", "bookworm-security"];
/// Where apt's files are bound in.
const INSIDE: &str = "/var/cache/apt";
/// Spares apt and dpkg waiting for a disk that nobody is going to lose.
const EATMYDATA: &str = "/usr/lib/x86_64-linux-gnu/libeatmydata.so";
/// Services do not start inside.
const NO_SERVICES: &str = "usr/sbin/policy-rc.d";

/// Which packages are offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// Those of the point release.
    Older,
    /// The newest too.
    Newest,
}

impl Offer {
    fn name(self) -> &'static str {
        match self {
            Self::Older => "older",
            Self::Newest => "newest",
        }
    }
}

/// What apt keeps beside the images, used again by later builds: package files, and lists.
#[derive(Debug)]
pub struct Apt {
    dir: PathBuf,
    mirror: String,
    initrd: bool,
}

impl Apt {
    /// Writes apt's settings; without initial RAM disks, kernels come without the one file that no package holds.
    pub fn new(dir: &Path, initrd: bool) -> Result<Self> {
        // What package files lie here stays; lists and settings are made anew.
        for part in ["archives/partial", "none/partial", "first"] {
            fs::create_dir_all(dir.join(part))?;
        }
        let mirrors = mirrors()?;
        let of = |suite: &str| -> Result<&str> {
            let found = mirrors
                .lines()
                .find_map(|line| line.split_once(' ').filter(|(name, _)| *name == suite));
            let (_, url) = found.with_context(|| {
                format!("this machine's apt has no source for {suite}: the pairs are built from it")
            })?;
            Ok(url)
        };
        let key = "signed-by=/usr/share/keyrings/debian-archive-keyring.gpg";
        let line = |suite: &str| of(suite).map(|url| format!("deb [{key}] {url} {suite} main\n"));
        let older = line(SUITE)?;
        let newest = UPDATES
            .iter()
            .map(|suite| line(suite))
            .collect::<Result<String>>()?;
        for (offer, sources) in [
            (Offer::Older, older.clone()),
            (Offer::Newest, older + &newest),
        ] {
            let lists = dir.join(format!("{}-lists/partial", offer.name()));
            empty_dir(&lists)?;
            fs::write(dir.join(format!("{}.list", offer.name())), sources)?;
        }
        // How to get out (proxies and the like) is the machine's own business.
        let acquire = said(Command::new("apt-config").arg("dump"))?;
        let acquire = acquire
            .lines()
            .filter(|line| line.starts_with("Acquire::") && !line.contains("IndexTargets"));
        let settings = "APT::Sandbox::User \"root\";\nAcquire::Languages \"none\";\nDir::Etc::sourceparts \"-\";\n\
                        DPkg::Options { \"--force-unsafe-io\"; \"--force-confold\"; };\n";
        fs::write(
            dir.join("settings"),
            acquire.map(|line| format!("{line}\n")).collect::<String>() + settings,
        )?;
        // Where it is lacking, everything takes longer and is the same.
        let _ = fs::copy(EATMYDATA, dir.join("eatmydata.so"));
        Ok(Self {
            dir: dir.to_owned(),
            mirror: of(SUITE)?.to_owned(),
            initrd,
        })
    }

    /// Where package files lie that were fetched.
    pub fn archives(&self) -> PathBuf {
        self.dir.join("archives")
    }

    /// Puts a minimal system into a mounted image.
    pub fn bootstrap(&self, root: &Path, deadline: &Deadline) -> Result<()> {
        let mut command = Command::new("debootstrap");
        command
            .arg("--variant=minbase")
            .arg(format!("--cache-dir={}", self.dir.join("first").display()));
        command.arg(SUITE).arg(root).arg(&self.mirror);
        self.run(&mut command, deadline)
            .context("a minimal system")?;
        for leftover in ["var/cache/apt", "var/lib/apt/lists"] {
            empty_dir(&root.join(leftover))?;
        }
        Ok(())
    }

    /// Begins to work in a mounted image.
    pub fn inside<'a>(
        &'a self,
        root: &Path,
        offer: Offer,
        deadline: &'a Deadline,
    ) -> Result<Inside<'a>> {
        let files = Mount::new(&["--bind"], &self.dir, &root.join(&INSIDE[1..]))?;
        let proc = Mount::new(&["-t", "proc"], Path::new("proc"), &root.join("proc"))?;
        script(&root.join(NO_SERVICES), "#!/bin/sh\nexit 101\n")?;
        let inside = Inside {
            apt: self,
            root: root.to_owned(),
            offer,
            deadline,
            mounts: vec![files, proc],
        };
        inside.get(&["update"])?;
        Ok(inside)
    }

    fn run(&self, command: &mut Command, deadline: &Deadline) -> Result<()> {
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C");
        process::run(command, &self.dir.join("log"), deadline, || Ok(())).map(drop)
    }
}

/// The machine's sources of binary packages: a suite and its URL a line.
fn mirrors() -> Result<String> {
    let mut targets = Command::new("apt-get");
    targets.args(["indextargets", "--format", "$(CODENAME) $(REPO_URI)"]);
    said(targets.args(["Created-By: Packages", "Component: main"]))
}

/// apt inside an image.
#[derive(Debug)]
pub struct Inside<'a> {
    apt: &'a Apt,
    root: PathBuf,
    offer: Offer,
    deadline: &'a Deadline,
    mounts: Vec<Mount>,
}

/// A package file that apt would fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deb {
    /// Its name, with version.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

impl Inside<'_> {
    /// Installs packages, or upgrades them.
    pub fn install(&self, packages: &[&str], recommended: bool) -> Result<()> {
        let recommends = if recommended {
            "--install-recommends"
        } else {
            "--no-install-recommends"
        };
        self.get(&[&["install", "-y", recommends], packages].concat())
    }

    /// Upgrades all.
    pub fn upgrade(&self) -> Result<()> {
        self.get(&["dist-upgrade", "-y", "--no-install-recommends"])
    }

    /// Fetches the files of newer versions of packages, and of what these take besides, and installs none of them.
    pub fn download(&self, packages: &[&str]) -> Result<()> {
        let order = [
            "install",
            "-y",
            "--download-only",
            "--only-upgrade",
            "--no-install-recommends",
        ];
        self.get(&[&order, packages].concat())
    }

    /// The files that an order would fetch, none of which is taken for here.
    pub fn debs(&self, order: &[&str]) -> Result<Vec<Deb>> {
        let nothing = format!("Dir::Cache::archives={INSIDE}/none/");
        let mut command = self.command();
        command
            .args(["-o", &nothing, "-qq", "-y", "--print-uris"])
            .args(order);
        Ok(said(&mut command)?.lines().filter_map(deb).collect())
    }

    /// Installed packages that an upgrade would replace, by name.
    pub fn upgradable(&self) -> Result<Vec<String>> {
        let simulated = said(self.command().args(["-s", "-q", "dist-upgrade"]))?;
        let mut names: Vec<String> = simulated
            .lines()
            .filter_map(upgraded)
            .map(str::to_owned)
            .collect();
        names.sort();
        ensure!(
            !names.is_empty(),
            "no package has a newer version: nothing to measure"
        );
        Ok(names)
    }

    /// Leaves the image as a user's: nothing of this benchmark's stays in it.
    pub fn close(mut self) -> Result<()> {
        fs::remove_file(self.root.join(NO_SERVICES))?;
        while let Some(mount) = self.mounts.pop() {
            mount.close()?;
        }
        Ok(())
    }

    fn get(&self, args: &[&str]) -> Result<()> {
        self.apt
            .run(self.command().args(args), self.deadline)
            .with_context(|| format!("apt-get {}", args.join(" ")))
    }

    fn command(&self) -> Command {
        let mut command = Command::new("chroot");
        command.arg(&self.root).arg("env");
        if self.apt.dir.join("eatmydata.so").exists() {
            command.arg(format!("LD_PRELOAD={INSIDE}/eatmydata.so"));
        }
        command.args(["apt-get", "-q"]);
        for (what, name) in [
            (
                "Dir::Etc::sourcelist",
                format!("{}.list", self.offer.name()),
            ),
            ("Dir::State::lists", format!("{}-lists/", self.offer.name())),
        ] {
            command.args(["-o", &format!("{what}={INSIDE}/{name}")]);
        }
        command.env("APT_CONFIG", format!("{INSIDE}/settings"));
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("LC_ALL", "C");
        command.env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
        if !self.apt.initrd {
            command.env("INITRD", "No");
        }
        command
    }
}

/// A line `'URL' FILE SIZE HASH`.
fn deb(line: &str) -> Option<Deb> {
    let mut fields = line.strip_prefix('\'')?.split_whitespace().skip(1);
    let name = fields.next()?.to_owned();
    Some(Deb {
        name,
        bytes: fields.next()?.parse().ok()?,
    })
}

/// A line `Inst NAME [OLD] (NEW ...)`; none for packages that were not there.
fn upgraded(line: &str) -> Option<&str> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
    rest.starts_with('[').then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apt_says_is_understood() {
        let line = "'http://mirror.example/debian/pool/main/o/openssl/openssl_3.0_amd64.deb' openssl_3.0_amd64.deb 1440000 SHA256:00";
        assert_eq!(
            deb(line),
            Some(Deb {
                name: "openssl_3.0_amd64.deb".into(),
                bytes: 1_440_000
            })
        );
        assert_eq!(deb("Reading package lists..."), None);
        assert_eq!(
            upgraded("Inst openssl [3.0.1] (3.0.2 Debian-Security:12/stable [amd64])"),
            Some("openssl")
        );
        assert_eq!(
            upgraded("Inst linux-image-6.1 (6.1.1 Debian:12/stable [amd64])"),
            None
        );
        assert_eq!(upgraded("Conf openssl (3.0.2)"), None);
    }
}
