//! Making machines: of disks, or of a capsule of one.

use std::path::{Path, PathBuf};

use capsule_proto::manifest::DirectBoot;
use rand::RngExt;
use serde::Deserialize;

use super::client::{daemon, is_changed, lock, pin, said};
use super::config::{Config, Directory, DiskConfig, Origin, failed};
use super::qemu::{self, Wanted};
use crate::control::{
    Base, CapsuleRef, ComponentInfo, Describe, Described, Failure, FailureCode, Progress,
};
use crate::home::Home;

/// Most disks of a machine: as many as have a place on its bus.
pub const MAX_DISKS: usize = 16;
/// What disks consist of.
const SECTOR: u64 = 512;

/// What a machine is to be.
#[derive(Debug, Clone, Default)]
pub struct NewMachine {
    /// Disks: capsules, or absolute paths of images.
    pub disks: Vec<DiskFrom>,
    /// Bytes of memory.
    pub memory: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Whether it has a network card behind the user's own network.
    pub network: bool,
    /// Machine type, where not the newest.
    pub machine_type: Option<String>,
    /// CPU model, where not the usual one.
    pub cpu_model: Option<String>,
    /// `tcg` or `kvm`.
    pub accelerator: Option<String>,
    /// A kernel that QEMU loads itself: absolute path.
    pub kernel: Option<PathBuf>,
    /// Its initial ramdisk.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub append: Option<String>,
    /// How long to wait for a capsule, in seconds.
    pub wait: Option<u64>,
}

/// Where a disk comes from.
#[derive(Debug, Clone)]
pub enum DiskFrom {
    /// An image, which is not written to.
    File(PathBuf),
    /// A capsule's only disk.
    Capsule(CapsuleRef),
}

/// Makes a machine.
///
/// # Errors
/// It exists, QEMU is missing or cannot do it, or a disk is none.
pub fn create(home: &Home, name: &str, new: &NewMachine) -> Result<Config, Failure> {
    let directory = Directory::of(home, name)?;
    if directory.exists() {
        let message = format!("there is a machine {name} already");
        return Err(Failure::new(FailureCode::Exists, message).hint(format!(
            "choose another name, or remove it with `capsule machine rm {name}`"
        )));
    }
    let probed = super::block_on(qemu::probe())??;
    if new.disks.len() > MAX_DISKS {
        let message = format!("a machine has at most {MAX_DISKS} disks");
        return Err(Failure::new(FailureCode::Invalid, message));
    }
    let boot = new.kernel.as_ref().map(|_| DirectBoot {
        kernel: "kernel".to_owned(),
        initrd: new.initrd.as_ref().map(|_| "initrd".to_owned()),
        append: new.append.clone().unwrap_or_default(),
    });
    if boot.is_none() && new.disks.is_empty() {
        let message = "a machine needs something to boot: a disk, or a kernel";
        return Err(Failure::new(FailureCode::Invalid, message).hint("give --disk or --kernel"));
    }
    let wanted = Wanted {
        memory: new.memory,
        cpus: new.cpus,
        disks: new.disks.len(),
        network: new.network,
        machine_type: new.machine_type.clone(),
        cpu_model: new.cpu_model.clone(),
        kvm: new.accelerator.as_deref() == Some("kvm"),
        boot,
        mac: rand::rng().random(),
    };
    let machine = qemu::describe(&wanted, &probed);
    qemu::check(&machine, &probed)?;
    let mut disks = Vec::new();
    for (from, number) in new.disks.iter().zip(0..) {
        let component = format!("disk{number}");
        disks.push(match from {
            DiskFrom::File(path) => of_image(component, path)?,
            DiskFrom::Capsule(capsule) => of_capsule(home, component, capsule, new.wait)?,
        });
    }
    let mut config = Config::new(machine, disks);
    config.kernel = new.kernel.as_deref().map(boot_file).transpose()?;
    config.initrd = new.initrd.as_deref().map(boot_file).transpose()?;
    directory.make()?;
    pin(home, &directory, &config, &[])?;
    directory.save(&config)?;
    Ok(config)
}

/// What QEMU is to load itself, which must be there now and when it runs.
fn boot_file(path: &Path) -> Result<Base, Failure> {
    match std::fs::File::open(path) {
        Ok(_) => Ok(Base::File { path: path.into() }),
        Err(error) => Err(failed("reading", path, &error)),
    }
}

/// Makes a machine of a capsule of one, or has one that was not changed since its capture be that.
///
/// # Errors
/// The capsule is no machine, this machine's QEMU cannot run it, or the machine of that name has changes.
pub fn of_machine(
    home: &Home,
    name: &str,
    capsule: &CapsuleRef,
    wait: Option<u64>,
    on_progress: impl FnMut(Progress),
) -> Result<Config, Failure> {
    let directory = Directory::of(home, name)?;
    let old = match directory.exists() {
        true => Some(directory.load()?),
        false => None,
    };
    let _lock = match &old {
        Some(old) => {
            let lock = lock(&directory)?;
            if is_changed(&directory, old) {
                let message = format!("machine {name} has been written to since it was captured");
                return Err(Failure::new(FailureCode::Exists, message).hint(format!(
                    "capture it first, remove it with `capsule machine rm --force {name}`, or give the new one another name with --as"
                )));
            }
            Some(lock)
        }
        None => None,
    };
    let request = Describe {
        capsule: capsule.clone(),
        wait,
    };
    let described = daemon(home)?
        .run(request, on_progress, |_| {})
        .map_err(said)?;
    let config = described_machine(&described)?;
    let probed = super::block_on(qemu::probe())??;
    qemu::check(&config.machine, &probed)?;
    directory.make()?;
    let before = old.as_ref().map(Config::capsules).unwrap_or_default();
    pin(home, &directory, &config, &before)?;
    directory.save(&config)?;
    if let Some(old) = old {
        let overlays = old.disks.into_iter().flat_map(|disk| disk.overlays);
        directory.remove(&overlays.collect::<Vec<_>>());
    }
    Ok(config)
}

/// A machine as a capsule has it.
fn described_machine(described: &Described) -> Result<Config, Failure> {
    let name = described.name.clone();
    let spelled = name
        .clone()
        .unwrap_or_else(|| described.capsule.to_string());
    let Some(machine) = described.machine.clone() else {
        let message = format!("{spelled} is no machine");
        return Err(Failure::new(FailureCode::Invalid, message).hint(format!(
            "`capsule machine create NAME --disk {spelled}` makes one with its disk"
        )));
    };
    let origin = Origin {
        capsule: described.capsule,
        name,
    };
    let of = |component: &str| Base::Capsule {
        capsule: CapsuleRef(described.capsule.to_string()),
        component: component.to_owned(),
    };
    let devices = machine.devices.iter();
    let components: Vec<&String> = devices
        .filter_map(|device| device.component.as_ref())
        .collect();
    for (place, component) in components.iter().enumerate() {
        if components[..place].contains(component) {
            let message = format!("{spelled} has two disks of one component, {component}");
            return Err(Failure::new(FailureCode::Refused, message));
        }
        let mut all = described.components.iter();
        let found = all.find(|found| found.name == **component);
        check_size(component, found.map_or(0, |found| found.size))?;
    }
    let disks = components.into_iter().map(|component| {
        let mut all = described.components.iter();
        let size = all
            .find(|found| found.name == *component)
            .map_or(0, |found| found.size);
        DiskConfig {
            component: component.clone(),
            size,
            base: Some(of(component)),
            format: None,
            overlays: Vec::new(),
            captured: 0,
        }
    });
    let mut config = Config::new(machine.clone(), disks.collect());
    config.origin = Some(origin);
    config.resume = machine.state.is_some();
    if let Some(boot) = &machine.boot {
        config.kernel = Some(of(&boot.kernel));
        config.initrd = boot.initrd.as_deref().map(of);
    }
    Ok(config)
}

/// Refuses what QEMU would round up.
fn check_size(component: &str, size: u64) -> Result<(), Failure> {
    if size.is_multiple_of(SECTOR) {
        return Ok(());
    }
    let message = format!("disk {component} has {size} bytes, which is no whole number of sectors");
    Err(Failure::new(FailureCode::Invalid, message)
        .hint("publish it again as an image of whole 512-byte sectors"))
}

/// What `qemu-img info` tells.
#[derive(Debug, Deserialize)]
struct ImageInfo {
    #[serde(rename = "virtual-size")]
    virtual_size: u64,
    format: String,
    #[serde(rename = "backing-filename")]
    backing: Option<String>,
}

fn of_image(component: String, path: &Path) -> Result<DiskConfig, Failure> {
    let told = std::process::Command::new("qemu-img")
        .args(["info", "--output=json"])
        .arg(path)
        .stdin(std::process::Stdio::null())
        .output();
    let told = told.map_err(|error| {
        let message = format!("qemu-img cannot be started: {error}");
        Failure::new(FailureCode::Io, message).hint("install the Debian package qemu-utils")
    })?;
    let unusable = |why: &str| {
        let message = format!("{} cannot be a disk: {why}", path.display());
        Failure::new(FailureCode::Invalid, message)
    };
    if !told.status.success() {
        return Err(unusable(String::from_utf8_lossy(&told.stderr).trim()));
    }
    let info: ImageInfo =
        serde_json::from_slice(&told.stdout).map_err(|error| unusable(&error.to_string()))?;
    if let Some(backing) = info.backing {
        let why = format!("it stands upon another image, {backing}");
        return Err(unusable(&why).hint(
            "`qemu-img convert -O qcow2 IMAGE NEW` makes one of both; or publish it, and give its capsule",
        ));
    }
    Ok(DiskConfig {
        component,
        size: info.virtual_size,
        base: Some(Base::File {
            path: path.to_owned(),
        }),
        format: Some(info.format),
        overlays: Vec::new(),
        captured: 0,
    })
}

fn of_capsule(
    home: &Home,
    component: String,
    capsule: &CapsuleRef,
    wait: Option<u64>,
) -> Result<DiskConfig, Failure> {
    let request = Describe {
        capsule: capsule.clone(),
        wait,
    };
    let described = daemon(home)?.call(request).map_err(said)?;
    let disks: Vec<&ComponentInfo> = described
        .components
        .iter()
        .filter(|component| component.kind == "disk")
        .collect();
    let [disk] = disks[..] else {
        let message = format!("{} has {} disks, not one", capsule.0, disks.len());
        return Err(Failure::new(FailureCode::Invalid, message)
            .hint(format!("`capsule show {}` lists its components", capsule.0)));
    };
    check_size(&disk.name, disk.size)?;
    Ok(DiskConfig {
        component,
        size: disk.size,
        base: Some(Base::Capsule {
            capsule: CapsuleRef(described.capsule.to_string()),
            component: disk.name.clone(),
        }),
        format: None,
        overlays: Vec::new(),
        captured: 0,
    })
}
