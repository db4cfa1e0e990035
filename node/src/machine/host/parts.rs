//! What a machine is put together from: its memory, its disks, the state of its devices, from its directory and from capsules.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use capsule_proto::RootHash;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::daemon::Served;
use super::{Host, by_id, prefetch, waiting};
use crate::control::{Base, CapsuleRef, Describe, Described, Failure, FailureCode};
use crate::disk::Disk;
use crate::machine::config::{Config, DiskConfig, failed};
use crate::machine::qemu::{DiskBase, DiskPlace, Places, create_overlay};
use crate::machine::ram::{Mounted, Ram};
use crate::machine::touched::Watched;
use crate::nbd::client::NbdDisk;
use crate::nbd::{Export, serve_at};
use crate::work::blocking;

/// A disk's read that takes longer fails, so that QEMU stops the guest instead of waiting itself, and answers; the guest goes on when the read,
/// tried again, comes. Memory is waited for as long as it takes: a guest whose memory fails is lost.
const READ_LIMIT: Duration = Duration::from_secs(15);
/// Bytes of a component that are copied at a time.
const COPY_LEN: u64 = 1 << 20;
/// Largest component that is copied whole before the guest runs: states and kernels.
const MAX_COPY: u64 = 1 << 30;

/// See the module. What is served ends with it.
pub struct Parts {
    /// Where QEMU finds everything.
    pub places: Places,
    /// The memory.
    pub ram: Arc<Ram>,
    /// The state of CPU and devices, where the guest goes on.
    pub state: Option<PathBuf>,
    /// The capsule that it goes on from.
    pub described: Option<Described>,
    /// What capsules are read for it.
    pub reading: Vec<Reading>,
    _shown: Mounted,
}

/// A component that is read while it comes.
pub struct Reading {
    /// Of which capsule,
    pub capsule: CapsuleRef,
    /// which component.
    pub component: String,
    /// By this connection to the daemon.
    pub disk: Arc<NbdDisk>,
    /// What of it was read, and what waits.
    pub watched: Arc<Watched>,
    /// Its length.
    pub size: u64,
    _served: Served,
    exported: Option<AbortHandle>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Some(exported) = &self.exported {
            exported.abort();
        }
    }
}

impl Parts {
    /// Brings together what the guest needs before its first step.
    pub async fn gather(host: &Host, config: &Config) -> Result<Self, Failure> {
        let described = match (&config.origin, config.resume) {
            (Some(origin), true) => {
                host.tell(waiting("the capsule"));
                Some(describe(host, by_id(&origin.capsule)).await?)
            }
            _ => None,
        };
        let mut reading = Vec::new();
        let mut disks = Vec::new();
        for (number, disk) in config.disks.iter().enumerate() {
            host.tell(waiting(&disk.component));
            disks.push(place(host, disk, number, &mut reading).await?);
        }
        let ram = memory(host, config, described.as_ref(), &mut reading).await?;
        let (at, shared, runtime) = (host.directory.file("ram"), ram.clone(), Handle::current());
        let shown = blocking(move || show(&shared, &at, runtime)).await?;
        let state = match &described {
            Some(described) => Some(state(host, described).await?),
            None => None,
        };
        if let Some(described) = &described {
            prefetch::bring(host, described, &reading).await?;
        }
        let kernel = boot_file(host, config.kernel.as_ref(), "kernel").await?;
        let initrd = boot_file(host, config.initrd.as_ref(), "initrd").await?;
        let places = Places {
            dir: host.directory.sockets(),
            ram: shown.file(),
            disks,
            kernel,
            initrd,
            incoming: state.is_some(),
            sandbox: false,
        };
        Ok(Self {
            places,
            ram,
            state,
            described,
            reading,
            _shown: shown,
        })
    }

    /// The hash of what is read, where it is the capsule's that the guest goes on from.
    pub fn root_of(&self, reading: &Reading) -> Option<RootHash> {
        let described = self.described.as_ref()?;
        let mut all = described.components.iter();
        let found = all.find(|component| component.name == reading.component)?;
        (reading.capsule == by_id(&described.capsule)).then_some(found.root)
    }

    /// How long the oldest read waits, if one does.
    pub fn late(&self) -> Option<Duration> {
        let waits = self
            .reading
            .iter()
            .map(|reading| reading.watched.oldest_wait());
        waits.flatten().max()
    }

    /// Bytes of memory and disks that were read from capsules.
    pub fn read(&self) -> u64 {
        let reading = self.reading.iter();
        let ranges = reading.flat_map(|reading| reading.watched.touched());
        ranges.map(|(_, len)| len).sum()
    }
}

/// What the daemon knows of a capsule.
pub async fn describe(host: &Host, capsule: CapsuleRef) -> Result<Described, Failure> {
    let request = Describe {
        capsule,
        wait: None,
    };
    host.daemon.ask(request, |_| {}).await
}

/// A disk: the overlay that is written to, and what lies below.
async fn place(
    host: &Host,
    disk: &DiskConfig,
    number: usize,
    reading: &mut Vec<Reading>,
) -> Result<DiskPlace, Failure> {
    let base = match &disk.base {
        None => DiskBase::None,
        Some(Base::File { path }) => DiskBase::File {
            path: path.clone(),
            format: disk.format.clone().unwrap_or_else(|| "raw".to_owned()),
        },
        Some(Base::Capsule { capsule, component }) => {
            let mut read = read(
                host,
                capsule,
                component,
                &format!("disk-{number}"),
                Some(READ_LIMIT),
            )
            .await?;
            let socket = host.directory.sockets().join(format!("disk-{number}.sock"));
            let export = Arc::new(Export {
                name: disk.component.clone(),
                description: format!("{component} of {}", capsule.0),
                disk: read.watched.clone(),
            });
            let _gone = std::fs::remove_file(&socket);
            let serving = serve_at(&socket, export).await?;
            read.exported = Some(tokio::spawn(serving).abort_handle());
            reading.push(read);
            DiskBase::Nbd(socket)
        }
    };
    let mut overlays = disk.overlays.clone();
    if overlays.is_empty() {
        let overlay = disk.next_overlay();
        // That of a start that was cut short before it was noted.
        let _gone = std::fs::remove_file(host.directory.file(&overlay));
        create_overlay(&host.directory.file(&overlay), disk.size).await?;
        overlays.push(overlay.clone());
        let mut config = host.config();
        let mut all = config.disks.iter_mut();
        if let Some(known) = all.find(|known| known.component == disk.component) {
            known.overlays.push(overlay);
        }
        host.directory.save(&config)?;
    }
    Ok(DiskPlace {
        component: disk.component.clone(),
        base,
        overlays: overlays
            .iter()
            .map(|file| host.directory.file(file))
            .collect(),
    })
}

/// Connects to a component that the daemon serves; its socket is named after what it is here.
async fn read(
    host: &Host,
    capsule: &CapsuleRef,
    component: &str,
    here: &str,
    limit: Option<Duration>,
) -> Result<Reading, Failure> {
    let socket = host.directory.sockets().join(format!("{here}.base"));
    let served = host.daemon.serve(capsule, component, &socket).await?;
    let connected = NbdDisk::connect(&socket).await;
    let disk = connected.map_err(|error| failed("connecting to", &socket, &error))?;
    Ok(Reading {
        capsule: capsule.clone(),
        component: component.to_owned(),
        size: disk.len(),
        watched: Arc::new(Watched::new(disk.clone(), limit)),
        disk,
        _served: served,
        exported: None,
    })
}

/// The memory: that of the capsule where the guest goes on, or empty.
async fn memory(
    host: &Host,
    config: &Config,
    described: Option<&Described>,
    reading: &mut Vec<Reading>,
) -> Result<Arc<Ram>, Failure> {
    let captured = described.and_then(|described| {
        let machine = described.machine.as_ref()?;
        Some((described, machine.ram.as_ref()?))
    });
    let base = match captured {
        Some((described, ram)) => {
            host.tell(waiting(ram));
            let read = read(host, &by_id(&described.capsule), ram, "memory", None).await?;
            let disk = read.watched.clone();
            reading.push(read);
            Some(disk as Arc<dyn Disk>)
        }
        None => None,
    };
    let dir = host.directory.file("memory");
    let size = config.machine.ram_size;
    blocking(move || {
        // What was written to the memory of an earlier run ended with that.
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed("removing", &dir, &error));
            }
            _ => crate::home::make_private_dir(&dir)?,
        }
        let ram = Ram::new(&dir, size, base);
        Ok(Arc::new(
            ram.map_err(|error| failed("making", &dir, &error))?,
        ))
    })
    .await
}

/// Takes a mount away that nobody serves any more, if there is one.
pub fn take_down(at: &Path) {
    if rustix::mount::unmount(at, rustix::mount::UnmountFlags::DETACH).is_ok() {
        return;
    }
    // Who is not root has this do it; where nothing is mounted it only says so.
    let mut helper = std::process::Command::new("fusermount3");
    let helper = helper.args(["-u", "-z", "-q"]).arg(at);
    let _none = helper
        .stdin(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status();
}

fn show(ram: &Arc<Ram>, at: &Path, runtime: Handle) -> Result<Mounted, Failure> {
    // A process that was killed leaves its mount behind.
    take_down(at);
    crate::home::make_private_dir(at)?;
    ram.mount(at, runtime).map_err(|error| {
        failed("mounting at", at, &error)
            .hint("it takes /dev/fuse and, where the user is not root, fusermount3 (package fuse3)")
    })
}

/// The state of CPU and devices, as a file.
async fn state(host: &Host, described: &Described) -> Result<PathBuf, Failure> {
    let machine = described.machine.as_ref();
    let Some(component) = machine.and_then(|machine| machine.state.as_ref()) else {
        let message = format!("capsule {} was not captured running", described.capsule);
        return Err(Failure::new(FailureCode::Refused, message));
    };
    let to = host.directory.file("state");
    copy(host, &by_id(&described.capsule), component, &to).await?;
    Ok(to)
}

async fn boot_file(
    host: &Host,
    base: Option<&Base>,
    name: &str,
) -> Result<Option<PathBuf>, Failure> {
    match base {
        None => Ok(None),
        Some(Base::File { path }) => Ok(Some(path.clone())),
        Some(Base::Capsule { capsule, component }) => {
            let to = host.directory.file(name);
            copy(host, capsule, component, &to).await?;
            Ok(Some(to))
        }
    }
}

/// Copies a component of a capsule to a file.
async fn copy(
    host: &Host,
    capsule: &CapsuleRef,
    component: &str,
    to: &Path,
) -> Result<(), Failure> {
    host.tell(waiting(component));
    let from = read(host, capsule, component, &format!("{component}-copy"), None).await?;
    if from.size > MAX_COPY {
        let message = format!("component {component} is too large for what it is");
        return Err(Failure::new(FailureCode::Damaged, message));
    }
    let mut bytes = Vec::new();
    for start in (0..from.size).step_by(COPY_LEN as usize) {
        let range = start..from.size.min(start + COPY_LEN);
        let read = from.disk.clone().read(range, bytes).await;
        bytes = read.map_err(|error| Failure::new(FailureCode::Io, error.to_string()))?;
    }
    let written = tokio::fs::write(to, bytes).await;
    written.map_err(|error| failed("writing", to, &error))
}
