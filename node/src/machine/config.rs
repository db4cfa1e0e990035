//! A machine's directory, and what it says of the machine.
//!
//! | file | what |
//! |---|---|
//! | `machine.json` | what it is like and what it stands upon ([`Config`]); written whole, beside its place, and renamed |
//! | `DISK.N.qcow2` | what was written to a disk since it was last captured, or since some capture: overlays without names of what is below them |
//! | `ram/`, `memory/` | while it runs: where its memory is shown, and what was written to it |
//! | `host.log`, `qemu.log` | what its process and QEMU said last |
//! | `lock` | held by its process |

use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use capsule_proto::manifest::{ComponentKind, DirectBoot, Machine};
use capsule_proto::{CapsuleId, RootHash};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::control::{Base, CapsuleRef, Captured, Failure, FailureCode, Published};
use crate::home::{Home, Mode, make_private_dir, read_json, write_json};

/// Format of `machine.json`.
const FORMAT: u32 = 1;
/// Longest name of a machine: of its directory, and in its sockets' paths.
const MAX_NAME: usize = 64;
/// Longest path of a directory in which sockets still have room for their names.
const MAX_SOCKET_DIR: usize = 80;
const CONFIG: &str = "machine.json";
const DAMAGED: &str = "restore it from a backup, or make the machine anew from its last capture";

/// What is remembered of a machine while it does not run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Config {
    /// Format of this file.
    pub format: u32,
    /// What QEMU is to make.
    pub machine: Machine,
    /// The capsule that it was made from or last captured as.
    pub origin: Option<Origin>,
    /// Whether it goes on where that capsule stopped; else it starts anew.
    pub resume: bool,
    /// Its disks, in the order of its devices.
    pub disks: Vec<DiskConfig>,
    /// Kernel and initial ramdisk, where QEMU loads them itself.
    pub kernel: Option<Base>,
    /// The initial ramdisk.
    pub initrd: Option<Base>,
}

/// The capsule that a machine comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Its id.
    pub capsule: CapsuleId,
    /// By what name it was known.
    pub name: Option<String>,
}

/// A disk: what lies below, and what was written upon that.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Its component's name, as its device has it.
    pub component: String,
    /// Its length in bytes.
    pub size: u64,
    /// What lies below all overlays; zeros where absent.
    pub base: Option<Base>,
    /// The format of a base that is a file, as QEMU calls it.
    #[serde(default)]
    pub format: Option<String>,
    /// Files of the machine's directory, the lowest first. All but the last are no longer written to.
    pub overlays: Vec<String>,
    /// How many of the lowest overlays are in the origin too: below the others lies the origin's disk of the same name.
    pub captured: usize,
}

impl Config {
    /// A machine on which nothing was written yet.
    pub fn new(machine: Machine, disks: Vec<DiskConfig>) -> Self {
        Self {
            format: FORMAT,
            machine,
            origin: None,
            resume: false,
            disks,
            kernel: None,
            initrd: None,
        }
    }

    /// The machine as a capsule has it that it is published as, but for memory and state: what is booted directly is among its components.
    pub fn at_rest(&self) -> Machine {
        let boot = self.machine.boot.as_ref().map(|boot| DirectBoot {
            kernel: "kernel".to_owned(),
            initrd: self.initrd.as_ref().map(|_| "initrd".to_owned()),
            append: boot.append.clone(),
        });
        Machine {
            ram: None,
            state: None,
            boot,
            ..self.machine.clone()
        }
    }

    /// What is booted directly, as components of such a capsule.
    pub fn boot_files(&self) -> impl Iterator<Item = Captured> {
        let files = [("kernel", &self.kernel), ("initrd", &self.initrd)];
        files.into_iter().filter_map(|(name, base)| {
            Some(Captured {
                name: name.to_owned(),
                kind: ComponentKind::File,
                size: None,
                base: Some(base.clone()?),
                patches: Vec::new(),
            })
        })
    }

    /// Has everything stand upon what was published, which has all overlays but those from `frozen` on.
    pub fn stand_upon(&mut self, published: &Published, frozen: impl Fn(&DiskConfig) -> usize) {
        self.origin = Some(Origin {
            capsule: published.capsule,
            name: Some(published.name.clone()),
        });
        for disk in &mut self.disks {
            disk.captured = frozen(disk);
        }
        let of_origin = |file: &Option<Base>, name| file.as_ref().and(self.in_origin(name));
        (self.kernel, self.initrd) = (
            of_origin(&self.kernel, "kernel"),
            of_origin(&self.initrd, "initrd"),
        );
    }

    /// The origin as the base of a component.
    pub fn in_origin(&self, component: &str) -> Option<Base> {
        let origin = self.origin.as_ref()?;
        Some(Base::Capsule {
            capsule: CapsuleRef(origin.capsule.to_string()),
            component: component.to_owned(),
        })
    }

    /// Has disks stand upon the origin where that has their lower overlays; the files that are no longer needed. Only while nothing reads them.
    pub fn fold(&mut self) -> Vec<String> {
        let mut unneeded = Vec::new();
        for at in 0..self.disks.len() {
            let base = self.in_origin(&self.disks[at].component);
            let disk = &mut self.disks[at];
            if disk.captured > 0 && base.is_some() {
                (disk.base, disk.format) = (base, None);
                unneeded.extend(disk.overlays.drain(..disk.captured));
                disk.captured = 0;
            }
        }
        unneeded
    }

    /// The capsules that it stands upon.
    pub fn capsules(&self) -> Vec<CapsuleRef> {
        let disks = self.disks.iter().map(|disk| &disk.base);
        let bases = disks.chain([&self.kernel, &self.initrd]).flatten();
        let origin = self.origin.as_ref();
        let origin = origin.map(|origin| CapsuleRef(origin.capsule.to_string()));
        let of_base = |base: &Base| match base {
            Base::Capsule { capsule, .. } => Some(capsule.clone()),
            Base::File { .. } => None,
        };
        let mut all: Vec<CapsuleRef> = origin.into_iter().collect();
        for capsule in bases.filter_map(of_base) {
            if !all.contains(&capsule) {
                all.push(capsule);
            }
        }
        all
    }
}

impl DiskConfig {
    /// A name for the next overlay.
    pub fn next_overlay(&self) -> String {
        let number = |name: &String| name.rsplit('.').nth(1).and_then(|n| n.parse::<u64>().ok());
        let last = self.overlays.iter().filter_map(number).max();
        format!("{}.{}.qcow2", self.component, last.map_or(0, |n| n + 1))
    }
}

/// A machine's directory.
#[derive(Debug, Clone)]
pub struct Directory {
    path: PathBuf,
    name: String,
}

/// Kept by whoever runs or changes a machine.
pub struct Lock {
    _file: File,
}

impl Directory {
    /// Of the machine of that name, which need not exist.
    ///
    /// # Errors
    /// That it cannot be a machine's name.
    pub fn of(home: &Home, name: &str) -> Result<Self, Failure> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if name.is_empty()
            || name.len() > MAX_NAME
            || name.starts_with('.')
            || !name.bytes().all(allowed)
        {
            let message = format!("{name:?} cannot be the name of a machine");
            return Err(Failure::new(FailureCode::Invalid, message)
                .hint("use up to 64 letters, digits and . _ - and do not begin with a dot"));
        }
        Ok(Self {
            path: home.machines_dir().join(name),
            name: name.to_owned(),
        })
    }

    /// All that there are, by name.
    ///
    /// # Errors
    /// The home cannot be read.
    pub fn all(home: &Home) -> Result<Vec<Self>, Failure> {
        let dir = home.machines_dir();
        let found = match fs::read_dir(&dir) {
            Ok(found) => found,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("reading", &dir, &error)),
        };
        let mut all = Vec::new();
        for entry in found {
            let entry = entry.map_err(|error| failed("reading", &dir, &error))?;
            let directory = Self::of(home, &entry.file_name().to_string_lossy());
            all.extend(directory.ok().filter(Self::exists));
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// How the machine is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A file of it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is a machine.
    pub fn exists(&self) -> bool {
        self.file(CONFIG).exists()
    }

    /// Makes it, for this user only.
    ///
    /// # Errors
    /// What the system says.
    pub fn make(&self) -> Result<(), Failure> {
        Ok(make_private_dir(&self.path)?)
    }

    /// What is remembered of the machine.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn load(&self) -> Result<Config, Failure> {
        let config: Option<Config> = read_json(&self.file(CONFIG), DAMAGED)?;
        let config = config.ok_or_else(|| self.absent())?;
        if config.format > FORMAT {
            let message = format!("machine {} was made by a newer capsule", self.name);
            return Err(Failure::new(FailureCode::Refused, message).hint("use that one"));
        }
        Ok(config)
    }

    /// Replaces what is remembered.
    ///
    /// # Errors
    /// What the system says.
    pub fn save(&self, config: &Config) -> Result<(), Failure> {
        Ok(write_json(&self.file(CONFIG), config, Mode::Private)?)
    }

    /// Takes the machine for this process; none if another has it.
    ///
    /// # Errors
    /// What the system says.
    pub fn lock(&self) -> Result<Option<Lock>, Failure> {
        let path = self.file("lock");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options
            .open(&path)
            .map_err(|error| failed("opening", &path, &error))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(failed("locking", &path, &error.into())),
        }
    }

    /// Where its sockets lie: in itself, or where its path would be too long for them, in a directory made of it.
    pub fn sockets(&self) -> PathBuf {
        if self.path.as_os_str().len() <= MAX_SOCKET_DIR {
            return self.path.clone();
        }
        let hash = RootHash::of(self.path.as_os_str().as_bytes()).to_string();
        crate::home::socket::runtime_dir().join(format!("capsule-{}", &hash[..16]))
    }

    /// The socket of its process.
    pub fn socket(&self) -> PathBuf {
        self.sockets().join("host.sock")
    }

    /// Fails where there is no machine.
    ///
    /// # Errors
    /// That there is none.
    pub fn require(&self) -> Result<(), Failure> {
        match self.exists() {
            true => Ok(()),
            false => Err(self.absent()),
        }
    }

    fn absent(&self) -> Failure {
        let message = format!("there is no machine {}", self.name);
        Failure::new(FailureCode::NotFound, message).hint(
            "`capsule machine ls` lists those that there are; `capsule machine create` and `capsule machine run CAPSULE` make one",
        )
    }

    /// Removes all of it, what says that there is a machine last.
    ///
    /// # Errors
    /// What the system says; then the machine is still there.
    pub fn clear(&self) -> Result<(), Failure> {
        let failed = |error: std::io::Error| failed("removing", &self.path, &error);
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name() == CONFIG {
                continue;
            }
            let path = entry.path();
            let is_dir = entry.file_type().map_err(failed)?.is_dir();
            match is_dir {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            }
            .map_err(failed)?;
        }
        fs::remove_dir_all(&self.path).map_err(failed)
    }

    /// Makes the place of its sockets, which only this user may use.
    ///
    /// # Errors
    /// What the system says, or that another user has made it.
    pub fn prepare_sockets(&self) -> Result<(), Failure> {
        make_private_dir(&self.sockets())?;
        match self.sockets_are_ours() {
            true => Ok(()),
            false => {
                let message = format!("{} belongs to another user", self.sockets().display());
                Err(Failure::new(FailureCode::Refused, message)
                    .hint("use a home with a shorter path, or set XDG_RUNTIME_DIR"))
            }
        }
    }

    /// Whether nobody else can have put sockets where its own lie.
    pub fn sockets_are_ours(&self) -> bool {
        let user = rustix::process::getuid().as_raw();
        let ours = |dir: &Path| {
            let found = dir.symlink_metadata();
            found.is_ok_and(|found| found.is_dir() && found.uid() == user)
        };
        let dir = self.sockets();
        dir == self.path || (dir.parent().is_some_and(ours) && ours(&dir))
    }

    /// Bytes that each overlay takes of which the origin does not have what was written; but for so many of the uppermost.
    pub fn written<'a>(
        &'a self,
        config: &'a Config,
        without: usize,
    ) -> impl Iterator<Item = u64> + 'a {
        let new = config.disks.iter().flat_map(move |disk| {
            let end = disk.overlays.len().saturating_sub(without);
            &disk.overlays[disk.captured.min(end)..end]
        });
        new.map(|file| {
            let found = fs::metadata(self.file(file));
            found.map_or(0, |found| found.blocks() * 512)
        })
    }

    /// Removes files of it; what is not there is as good as removed.
    pub fn remove(&self, files: &[String]) {
        for file in files {
            let _gone = fs::remove_file(self.file(file));
        }
    }
}

/// What the system said of a path.
pub fn failed(doing: &str, path: &Path, error: &std::io::Error) -> Failure {
    let message = format!("{doing} {}: {error}", path.display());
    Failure::new(crate::failure::io_code(error), message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(overlays: &[&str], captured: usize) -> DiskConfig {
        DiskConfig {
            component: "disk0".to_owned(),
            size: 1 << 20,
            base: Some(Base::File {
                path: "/image".into(),
            }),
            format: Some("raw".to_owned()),
            overlays: overlays.iter().map(|&name| name.to_owned()).collect(),
            captured,
        }
    }

    #[test]
    fn what_was_captured_is_read_from_the_capsule_after_the_next_start() {
        let overlays = ["disk0.0.qcow2", "disk0.1.qcow2", "disk0.2.qcow2"];
        let mut config = Config::new(Machine::default(), vec![disk(&overlays, 2)]);
        assert!(config.fold().is_empty(), "it stands upon nothing else yet");
        let capsule = CapsuleId(RootHash::of(b"capsule"));
        config.origin = Some(Origin {
            capsule,
            name: None,
        });
        assert_eq!(config.fold(), overlays[..2]);
        let folded = &config.disks[0];
        assert_eq!(
            (&folded.overlays[..], folded.captured),
            (&["disk0.2.qcow2".to_owned()][..], 0)
        );
        assert!(
            matches!(&folded.base, Some(Base::Capsule { component, .. }) if component == "disk0")
        );
        assert_eq!(folded.next_overlay(), "disk0.3.qcow2");
        assert_eq!(config.capsules(), [CapsuleRef(capsule.to_string())]);
    }

    #[test]
    fn names_are_those_of_directories() {
        let temp = tempfile::tempdir().unwrap();
        let home = Home::new(temp.path());
        for name in ["", ".", "..", "a/b", "a b", &"x".repeat(65)] {
            assert!(Directory::of(&home, name).is_err(), "{name}");
        }
        let directory = Directory::of(&home, "me").unwrap();
        assert!(!directory.exists() && Directory::all(&home).unwrap().is_empty());
        directory.make().unwrap();
        directory
            .save(&Config::new(Machine::default(), Vec::new()))
            .unwrap();
        assert_eq!(Directory::all(&home).unwrap().len(), 1);
        assert!(directory.load().unwrap().origin.is_none());
        let lock = directory.lock().unwrap();
        assert!(lock.is_some() && directory.lock().unwrap().is_none());
        drop(lock);
        assert!(directory.lock().unwrap().is_some());
    }
}
