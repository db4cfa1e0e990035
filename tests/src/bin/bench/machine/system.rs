//! The guest's system: a Debian on one disk, built once, and the newer package files of its upgrade. Both stay in a cache.
//!
//! The disk is one ext4 without partitions, with a boot loader in it: like an ordinary machine's, it has all that the guest ever reads, kernel
//! and initial ramdisk included. A shell of root waits at the serial port.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::delta::apt::{Apt, Deb, Offer};
use crate::delta::image::{Mount, said, tell, trim};
use crate::process::Deadline;
use crate::report::MIB;
use crate::tools::{empty_dir, script};

/// Size of the disk.
pub const DISK: u64 = 2 << 30;
/// How long building may take.
const BUILD: Duration = Duration::from_secs(3600);
/// Tells that all is there: written last.
const FACTS: &str = "facts.json";
const IMAGE: &str = "disk.img";
const UPGRADE: &str = "upgrade.tar";

/// What is installed: a system that boots, an application whose libraries are many files, and about 100 MB of packages of which newer versions
/// are published.
const PACKAGES: [&str; 14] = [
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "busybox",
    "zstd",
    "systemd-sysv",
    "udev",
    "iproute2",
    "openssl",
    "python3",
    "perl",
    "openjdk-17-jre-headless",
    "postgresql-15",
    "nodejs",
    "mariadb-server-core",
];
/// Services and timers that an idle machine would be woken by at times that nobody chose.
const QUIET: [&str; 6] = [
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "postgresql.service",
];

/// Programs that the boot loader takes, and their Debian packages.
pub const NEEDS: [(&str, &str); 6] = [
    ("debootstrap", "debootstrap"),
    ("extlinux", "extlinux"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-nbd", "qemu-utils"),
    ("mkfs.ext4", "e2fsprogs"),
    ("tar", "tar"),
];

/// What was built.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    /// Packages of the upgrade.
    pub packages: Vec<String>,
    /// Bytes of their files.
    pub deb_bytes: u64,
}

/// A system in the cache.
#[derive(Debug, Clone)]
pub struct System {
    dir: PathBuf,
    /// What is known of it.
    pub facts: Facts,
}

impl System {
    /// One that was built before.
    pub fn open(cache: &Path) -> Result<Self> {
        let facts = fs::read(cache.join(FACTS));
        let facts = facts.with_context(|| format!("no guest in {}", cache.display()))?;
        Ok(Self {
            dir: cache.to_owned(),
            facts: serde_json::from_slice(&facts)?,
        })
    }

    /// The disk as it was installed.
    pub fn image(&self) -> PathBuf {
        self.dir.join(IMAGE)
    }

    /// Newer package files, in a tar.
    pub fn upgrade(&self) -> PathBuf {
        self.dir.join(UPGRADE)
    }
}

/// Builds it in a directory, which takes the machine's network.
pub fn build(cache: &Path) -> Result<()> {
    let lock = fs::File::create(cache.join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .with_context(|| format!("another benchmark builds in {}", cache.display()))?;
    let started = Instant::now();
    let deadline = Deadline::after(BUILD);
    eprintln!("building the guest's disk ...");
    let apt = Apt::new(&cache.join("apt"), true)?;
    let disk = cache.join(IMAGE);
    let partial = disk.with_extension("partial");
    make(&partial)?;
    let root = Mount::writable(&partial, &cache.join("root"))?;
    apt.bootstrap(root.path(), &deadline)?;
    let inside = apt.inside(root.path(), Offer::Older, &deadline)?;
    inside.install(&PACKAGES, false)?;
    inside.close()?;
    let inside = apt.inside(root.path(), Offer::Newest, &deadline)?;
    let names = inside.upgradable()?;
    // A newer kernel changes the initial ramdisk, which no package holds, and nobody runs it before the next boot.
    let names: Vec<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| !name.starts_with("linux-"))
        .collect();
    let order = [
        &["install", "--only-upgrade", "--no-install-recommends"],
        &names[..],
    ]
    .concat();
    let debs = inside.debs(&order)?;
    inside.download(&names)?;
    inside.close()?;
    pack(&apt.archives(), &debs, &cache.join(UPGRADE))?;
    settle(root.path())?;
    root.close()?;
    // As a disk is that was just installed: what was deleted meanwhile is nowhere.
    trim(&partial)?;
    fs::rename(&partial, &disk)?;
    let facts = Facts {
        deb_bytes: debs.iter().map(|deb| deb.bytes).sum(),
        packages: debs.into_iter().map(|deb| deb.name).collect(),
    };
    fs::write(cache.join(FACTS), serde_json::to_vec_pretty(&facts)?)?;
    eprintln!(
        "the guest's disk is built in {:.0} s; its upgrade: {} packages, {:.1} MiB",
        started.elapsed().as_secs_f64(),
        facts.packages.len(),
        facts.deb_bytes as f64 / MIB
    );
    Ok(())
}

/// An empty ext4 that the boot loader can read.
fn make(disk: &Path) -> Result<()> {
    fs::File::create(disk)?.set_len(DISK)?;
    let mut make = Command::new("mkfs.ext4");
    make.args(["-q", "-F", "-O", "^64bit,^metadata_csum"]);
    // What is initialised later, while it is mounted, would count as changed.
    make.args(["-E", "lazy_itable_init=0,lazy_journal_init=0"]);
    tell(make.arg(disk))
}

/// Packs package files in the order in which they are to be unpacked.
fn pack(archives: &Path, debs: &[Deb], into: &Path) -> Result<()> {
    ensure!(!debs.is_empty(), "no package has a newer version");
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(archives).arg("-cf").arg(into);
    tell(tar.args(debs.iter().map(|deb| &deb.name)))
}

/// Makes the installed system one that boots to a shell and then does nothing by itself.
fn settle(root: &Path) -> Result<()> {
    let write = |file: &str, text: &str| -> Result<()> {
        let path = root.join(file);
        let dir = path.parent().context("it lies in a directory")?;
        fs::create_dir_all(dir)?;
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    write("etc/hostname", "guest\n")?;
    write("etc/fstab", "/dev/vda / ext4 defaults 0 0\n")?;
    write(
        "etc/systemd/system/serial-getty@ttyS0.service.d/shell.conf",
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear %I vt220\n",
    )?;
    // Logs in memory would grow between captures at times of their own.
    write(
        "etc/systemd/journald.conf.d/none.conf",
        "[Journal]\nStorage=none\n",
    )?;
    write("root/.profile", "PS1='# '\n")?;
    write("root/.bashrc", "PS1='# '\n")?;
    write("root/.inputrc", "set enable-bracketed-paste off\n")?;
    for unit in QUIET {
        let at = root.join("etc/systemd/system").join(unit);
        // Whatever was there before: to nothing means masked.
        let _none = fs::remove_file(&at);
        std::os::unix::fs::symlink("/dev/null", &at)?;
    }
    script(&root.join("usr/local/bin/upgrade"), super::work::UPGRADE)?;
    script(&root.join("usr/local/bin/work"), super::work::WORK)?;
    boot_loader(root)
}

/// Has the disk boot its own kernel.
fn boot_loader(root: &Path) -> Result<()> {
    let boot = root.join("boot");
    let (mut kernel, mut initrd) = (None, None);
    for entry in fs::read_dir(&boot)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        match name.split('-').next() {
            Some("vmlinuz") => kernel = Some(name),
            Some("initrd.img") => initrd = Some(name),
            _ => {}
        }
    }
    let kernel = kernel.context("no kernel was installed")?;
    let initrd = initrd.context("no initial ramdisk was made")?;
    let dir = boot.join("extlinux");
    empty_dir(&dir)?;
    let append = "root=/dev/vda rw console=ttyS0 quiet net.ifnames=0 systemd.show_status=0";
    fs::write(
        dir.join("extlinux.conf"),
        format!(
            "DEFAULT linux\nPROMPT 0\nLABEL linux\nKERNEL /boot/{kernel}\nINITRD /boot/{initrd}\nAPPEND {append}\n"
        ),
    )?;
    said(Command::new("extlinux").arg("--install").arg(&dir)).map(drop)
}
