//! Builds the images that are compared, once: they stay in the cache, and so do the package files.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::apt::{Apt, Deb, Inside, Offer};
use super::image::{self, Mount};
use crate::process::Deadline;
use crate::report::MIB;
use crate::tools::empty_dir;

/// Tells of a set of images that it is whole: written last.
const FACTS: &str = "facts.json";
/// What is added to the name of another image of nearly the same packages.
const OTHER: &str = "other";

/// Its part of bytes from the same packages.
const SAME: f64 = 0.9;
/// What dpkg has installed.
const STATUS: &str = "var/lib/dpkg/status";

/// A set of images.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    name: &'static str,
    /// Size of each image.
    pub bytes: u64,
    /// What is installed first.
    packages: &'static [&'static str],
    /// With what is recommended beside them, as desktops are.
    recommended: bool,
    /// The large applications of the last step.
    large: &'static [&'static str],
    /// What another image has besides.
    odd: &'static [&'static str],
}

/// A server with a kernel; several tens of its packages have newer versions.
pub const SMALL: Recipe = Recipe {
    name: "small",
    bytes: 2 << 30,
    packages: &[
        "linux-image-cloud-amd64",
        "initramfs-tools",
        "zstd",
        "systemd-sysv",
        "openssl",
        "python3",
        "openssh-server",
        "curl",
        "perl",
        "vim",
        "git",
        "bind9",
        "gnupg",
        "nginx-light",
        "mariadb-server",
        "nodejs",
        "ruby",
        "sudo",
        "rsync",
        "tzdata",
        "poppler-utils",
        "libxml2-utils",
        "krb5-user",
    ],
    recommended: false,
    large: &["inkscape", "g++"],
    odd: &["mc", "tmux", "lynx", "nano"],
};

/// A desktop.
pub const FULL: Recipe = Recipe {
    name: "full",
    bytes: 8 << 30,
    packages: &[
        "linux-image-amd64",
        "initramfs-tools",
        "zstd",
        "systemd-sysv",
        "task-xfce-desktop",
        "firefox-esr",
        "thunderbird",
        "libreoffice",
        "openssh-server",
        "git",
        "vim",
        "curl",
        "cups",
        "python3",
        "perl",
        "sudo",
        "rsync",
    ],
    recommended: true,
    large: &["gimp", "inkscape", "clang", "openjdk-17-jdk"],
    odd: &["emacs-nox", "gdb", "mc", "tmux", "audacity"],
};

/// The images of a set, one after the other in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// As installed, older.
    Old,
    /// Half of the packages that have newer versions upgraded.
    Half,
    /// All upgraded.
    New,
    /// Then large applications installed.
    Large,
}

impl Version {
    const ALL: [Self; 4] = [Self::Old, Self::Half, Self::New, Self::Large];

    fn name(self) -> &'static str {
        match self {
            Self::Old => "old",
            Self::Half => "half",
            Self::New => "new",
            Self::Large => "large",
        }
    }

    /// Whether it is measured as apt left it, too.
    fn is_measured_as_is(self) -> bool {
        matches!(self, Self::Old | Self::New)
    }
}

/// What apt fetched for the steps.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Facts {
    /// Packages upgraded or drawn in by the upgrade, from the oldest to the newest image.
    pub upgrade_packages: usize,
    /// Bytes of their files.
    pub upgrade_deb_bytes: u64,
    /// The same of the first half.
    pub half_deb_bytes: u64,
    /// The same of the large applications.
    pub install_packages: usize,
    /// Bytes of their files.
    pub install_deb_bytes: u64,
    /// Bytes of the newest image's initial RAM disks: they change with an upgrade, and no package holds them.
    pub initrd_bytes: u64,
    /// How long building took.
    pub seconds: f64,
}

/// A set in the cache.
#[derive(Debug)]
pub struct Set {
    dir: PathBuf,
    /// What is known of it.
    pub facts: Facts,
}

impl Set {
    /// Where a set lies.
    fn dir(cache: &Path, recipe: &Recipe, initrd: bool) -> PathBuf {
        let with = if initrd { "" } else { "-no-initrd" };
        cache.join(format!("{}{with}", recipe.name))
    }

    /// A set that was built before, if it was.
    pub fn open(cache: &Path, recipe: &Recipe, initrd: bool) -> Result<Self> {
        let dir = Self::dir(cache, recipe, initrd);
        let facts =
            fs::read(dir.join(FACTS)).with_context(|| format!("no images in {}", dir.display()))?;
        Ok(Self {
            facts: serde_json::from_slice(&facts)?,
            dir,
        })
    }

    /// What the largest image takes on the disk.
    pub fn allocated(&self) -> Result<u64> {
        let images = [(Version::Large, true), (Version::New, false)];
        let mut sizes = images.into_iter().map(|(version, trimmed)| -> Result<u64> {
            let image = self.image(version, trimmed);
            let meta = fs::metadata(&image);
            let meta = meta.with_context(|| format!("looking at {}", image.display()))?;
            Ok(meta.blocks() * 512)
        });
        sizes.try_fold(0, |most, size| Ok(size?.max(most)))
    }

    /// An image; trimmed means that what the file system does not use is holes.
    pub fn image(&self, version: Version, trimmed: bool) -> PathBuf {
        path(&self.dir, version, trimmed)
    }

    /// Another image, made anew of nearly the packages of the newest one in another order, trimmed; where it was built.
    pub fn other(&self) -> Option<PathBuf> {
        Some(self.dir.join(format!("{OTHER}.img"))).filter(|image| image.exists())
    }

    /// A directory to mount an image on: outside of what is removed when the benchmark is stopped.
    pub fn mount_point(&self, name: &str) -> PathBuf {
        self.dir.join("mnt").join(name)
    }
}

fn path(dir: &Path, version: Version, trimmed: bool) -> PathBuf {
    let kind = if trimmed { "trimmed" } else { "as-is" };
    dir.join(format!("{}-{kind}.img", version.name()))
}

/// Makes the trimmed image of a version that is done; the other stays only where it is measured.
fn trim(dir: &Path, version: Version) -> Result<()> {
    let (as_is, trimmed) = (path(dir, version, false), path(dir, version, true));
    if version.is_measured_as_is() {
        image::copy(&as_is, &trimmed)?;
    } else {
        fs::rename(&as_is, &trimmed)?;
    }
    image::trim(&trimmed)
}

/// What is to be built.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The cache.
    pub cache: &'a Path,
    /// Which set.
    pub recipe: &'a Recipe,
    /// With initial RAM disks.
    pub initrd: bool,
    /// With another image of nearly the same packages.
    pub other: bool,
    /// How long one step may take.
    pub step: Duration,
}

impl Plan<'_> {
    /// Whether nothing is left to do.
    pub fn is_done(&self) -> bool {
        let set = Set::open(self.cache, self.recipe, self.initrd);
        set.is_ok_and(|set| !self.other || set.other().is_some())
    }

    /// Builds what is lacking. Only whole sets get their names.
    pub fn build(&self) -> Result<()> {
        // Two benchmarks at once would take each other's half-built images for left behind.
        let lock = fs::File::create(self.cache.join("lock"))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
            .with_context(|| format!("another benchmark builds in {}", self.cache.display()))?;
        let apt = Apt::new(&self.cache.join("apt"), self.initrd)?;
        let dir = Set::dir(self.cache, self.recipe, self.initrd);
        if Set::open(self.cache, self.recipe, self.initrd).is_err() {
            let partial = dir.with_extension("partial");
            empty_dir(&partial)?;
            let made = self.versions(&apt, &partial);
            if made.is_err() {
                fs::remove_dir_all(&partial)?;
            }
            made?;
            if dir.exists() {
                fs::remove_dir_all(&dir)?;
            }
            fs::rename(&partial, &dir)?;
        }
        let other = dir.join(format!("{OTHER}.img"));
        if self.other && !other.exists() {
            let partial = other.with_extension("partial");
            self.another(&apt, &partial, &path(&dir, Version::New, true))?;
            fs::rename(&partial, &other)?;
        }
        Ok(())
    }

    /// The images, oldest first, each from a copy of the one before it.
    fn versions(&self, apt: &Apt, dir: &Path) -> Result<()> {
        let started = Instant::now();
        let mut facts = Facts::default();
        let mut before: Option<Version> = None;
        for version in Version::ALL {
            let image = path(dir, version, false);
            match before {
                Some(before) => {
                    image::copy(&path(dir, before, false), &image)?;
                    trim(dir, before)?;
                }
                None => image::make(&image, self.recipe.bytes)?,
            }
            self.step(version.name(), apt, &image, dir, version, &mut facts)?;
            before = Some(version);
        }
        before.map_or(Ok(()), |last| trim(dir, last))?;
        facts.seconds = started.elapsed().as_secs_f64();
        fs::write(dir.join(FACTS), serde_json::to_vec_pretty(&facts)?)?;
        Ok(())
    }

    fn step(
        &self,
        what: &str,
        apt: &Apt,
        image: &Path,
        dir: &Path,
        version: Version,
        facts: &mut Facts,
    ) -> Result<()> {
        let started = Instant::now();
        eprintln!("building the {} images: {what} ...", self.recipe.name);
        let deadline = Deadline::after(self.step);
        let root = Mount::writable(image, &dir.join("mnt/root"))?;
        if version == Version::Old {
            apt.bootstrap(root.path(), &deadline)?;
        }
        let offer = if version == Version::Old {
            Offer::Older
        } else {
            Offer::Newest
        };
        let inside = apt.inside(root.path(), offer, &deadline)?;
        match version {
            Version::Old => inside.install(self.recipe.packages, self.recipe.recommended)?,
            Version::Half => {
                let all = inside.debs(&["dist-upgrade"])?;
                (facts.upgrade_packages, facts.upgrade_deb_bytes) = (all.len(), bytes(&all));
                let half = half(&inside)?;
                let order: Vec<&str> = ["install", "--only-upgrade", "--no-install-recommends"]
                    .into_iter()
                    .chain(half.iter().map(String::as_str))
                    .collect();
                facts.half_deb_bytes = bytes(&inside.debs(&order)?);
                inside.install(&half.iter().map(String::as_str).collect::<Vec<_>>(), false)?;
            }
            Version::New => {
                inside.upgrade()?;
                facts.initrd_bytes = initrds(&root.path().join("boot"))?;
            }
            Version::Large => {
                let all = inside
                    .debs(&[&["install", "--no-install-recommends"], self.recipe.large].concat())?;
                (facts.install_packages, facts.install_deb_bytes) = (all.len(), bytes(&all));
                inside.install(self.recipe.large, false)?;
            }
        }
        inside.close()?;
        let free = rustix::fs::statvfs(root.path())?;
        root.close()?;
        eprintln!(
            "building the {} images: {what} done in {:.0} s, {:.0} MiB free",
            self.recipe.name,
            started.elapsed().as_secs_f64(),
            (free.f_bfree * free.f_frsize) as f64 / MIB
        );
        Ok(())
    }

    /// Nearly the same packages as the newest image, in a fresh file system and another order.
    fn another(&self, apt: &Apt, image: &Path, newest: &Path) -> Result<()> {
        eprintln!("building another image of nearly the same packages ...");
        let deadline = Deadline::after(self.step);
        image::make(image, self.recipe.bytes)?;
        let root = Mount::writable(image, &image.with_extension("mnt"))?;
        apt.bootstrap(root.path(), &deadline)?;
        let inside = apt.inside(root.path(), Offer::Newest, &deadline)?;
        inside.upgrade()?;
        inside.install(self.recipe.odd, false)?;
        for package in self.recipe.packages.iter().rev() {
            inside.install(&[package], self.recipe.recommended)?;
        }
        inside.close()?;
        let model = Mount::read_only(newest, &image.with_extension("newest"))?;
        let share = same_share(
            &fs::read_to_string(root.path().join(STATUS))?,
            &fs::read_to_string(model.path().join(STATUS))?,
        );
        ensure!(
            share >= SAME,
            "only {:.0} % of its bytes are of the same packages",
            share * 100.0
        );
        eprintln!(
            "another image: {:.1} % of its bytes are of the same packages",
            share * 100.0
        );
        model.close()?;
        root.close()?;
        image::trim(image)
    }
}

/// The first half of the packages that have newer versions.
fn half(inside: &Inside<'_>) -> Result<Vec<String>> {
    let mut names = inside.upgradable()?;
    ensure!(
        names.len() > 1,
        "only {names:?} has a newer version: no two steps"
    );
    names.truncate(names.len() / 2);
    Ok(names)
}

/// Which part of what is installed in one image comes from packages that are in the other too, in the same version.
fn same_share(one: &str, other: &str) -> f64 {
    let other: BTreeSet<_> = installed(other).map(|(package, _)| package).collect();
    let (mut same, mut all) = (0, 0);
    for (package, size) in installed(one) {
        all += size;
        same += if other.contains(&package) { size } else { 0 };
    }
    same as f64 / all as f64
}

/// Packages with their versions, and their installed sizes, of a status file of dpkg.
fn installed(status: &str) -> impl Iterator<Item = ((&str, &str), u64)> {
    status.split("\n\n").filter_map(|package| {
        let field = |name: &str| package.lines().find_map(|line| line.strip_prefix(name));
        let size = field("Installed-Size: ")?.parse().ok()?;
        Some(((field("Package: ")?, field("Version: ")?), size))
    })
}

fn bytes(debs: &[Deb]) -> u64 {
    debs.iter().map(|deb| deb.bytes).sum()
}

fn initrds(boot: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(boot)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("initrd") {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_the_same_in_the_same_version() {
        let one = "Package: a\nVersion: 1\nInstalled-Size: 30\n\nPackage: b\nVersion: 2\nInstalled-Size: 10\n";
        let other = "Package: a\nVersion: 1\nInstalled-Size: 30\n\nPackage: b\nVersion: 3\nInstalled-Size: 10\n";
        assert!((same_share(one, other) - 0.75).abs() < 1e-9);
        assert!((same_share(one, one) - 1.0).abs() < 1e-9);
    }
}
