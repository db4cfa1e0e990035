//! What the QEMU on this machine can do, and whether that is enough for a given machine.

use std::ffi::OsString;
use std::process::Stdio;
use std::time::Duration;

use capsule_proto::manifest::{Device, Machine};
use tokio::process::Command;
use tokio::time::timeout;

use crate::control::{Failure, FailureCode};

/// Oldest version that can do all of this (`open-timeout` of NBD, `blockdev-reopen`).
const OLDEST: (u32, u32) = (7, 2);
/// So long QEMU may take to say what it knows.
const ANSWER: Duration = Duration::from_secs(20);
/// Most bytes of a list that are looked at.
const MAX_LIST: usize = 1 << 20;
/// Confines QEMU to what it needs: no other programs, no other privileges.
pub(super) const SANDBOX: &str =
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// Images of firmware that QEMU loads into memory, whose sizes must be the same at resume.
const FIRMWARE: [&str; 3] = ["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin"];
/// Largest memory: what QEMU's machines take without special care.
const MAX_MEMORY: u64 = 1 << 40;

/// What the QEMU here can do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Probed {
    /// Its version, such as `7.2.22`.
    pub version: String,
    /// Versioned machine types that it knows, such as `pc-q35-7.2`.
    pub machine_types: Vec<String>,
    /// Versioned CPU models that it knows, such as `Nehalem-v1`.
    pub cpu_models: Vec<String>,
    /// Firmware images by name and size.
    pub firmware: Vec<(String, u64)>,
    /// Whether `/dev/kvm` can be opened. That guests run on it is not said.
    pub kvm: bool,
    /// Whether it can be confined by seccomp.
    pub sandbox: bool,
}

/// The program, which `CAPSULE_QEMU` may name.
pub(super) fn program() -> OsString {
    std::env::var_os("CAPSULE_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into())
}

/// Asks the QEMU here what it can do.
///
/// # Errors
/// There is none, it does not run, or it is too old.
pub async fn probe() -> Result<Probed, Failure> {
    let version = run(&["-version"]).await?;
    let version = parse_version(&version).ok_or_else(|| {
        let message = format!(
            "{} does not say its version as QEMU does",
            program().display()
        );
        Failure::new(FailureCode::Refused, message).hint(INSTALL)
    })?;
    if major_minor(&version).is_none_or(|version| version < OLDEST) {
        let message = format!("QEMU {version} is too old");
        let hint = format!("it takes QEMU {}.{} or newer", OLDEST.0, OLDEST.1);
        return Err(Failure::new(FailureCode::Refused, message).hint(hint));
    }
    // A QEMU built without seccomp refuses the option.
    let confined = run(&["-sandbox", SANDBOX, "-machine", "help"]).await;
    let sandbox = confined.is_ok();
    let machine_types = match confined {
        Ok(list) => list,
        Err(_no_seccomp) => run(&["-machine", "help"]).await?,
    };
    let cpu_models = run(&["-cpu", "help"]).await?;
    let directories = run(&["-L", "help"]).await?;
    let firmware = FIRMWARE.iter().filter_map(|name| {
        let found = directories.lines().find_map(|directory| {
            std::fs::metadata(std::path::Path::new(directory).join(name)).ok()
        });
        Some(((*name).to_owned(), found?.len()))
    });
    Ok(Probed {
        machine_types: parse_machine_types(&machine_types),
        cpu_models: parse_cpu_models(&cpu_models),
        firmware: firmware.collect(),
        kvm: std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok(),
        version,
        sandbox,
    })
}

const INSTALL: &str = "install QEMU (package qemu-system-x86), or name the program in CAPSULE_QEMU";

async fn run(arguments: &[&str]) -> Result<String, Failure> {
    let program = program();
    let name = program.display();
    let output = Command::new(&program)
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match timeout(ANSWER, output).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => {
            let message = format!("cannot start {name}: {error}");
            return Err(Failure::new(FailureCode::NotFound, message).hint(INSTALL));
        }
        Err(_elapsed) => {
            let message = format!("{name} says nothing within {} s", ANSWER.as_secs());
            return Err(Failure::new(FailureCode::Io, message));
        }
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().last().unwrap_or("it does not say why");
        let message = format!("{name} {} failed: {said}", arguments.join(" "));
        return Err(Failure::new(FailureCode::Refused, message).hint(INSTALL));
    }
    let said = &output.stdout[..output.stdout.len().min(MAX_LIST)];
    Ok(String::from_utf8_lossy(said).into_owned())
}

/// `QEMU emulator version 7.2.22 (Debian ...)`.
fn parse_version(said: &str) -> Option<String> {
    let (_, after) = said.lines().next()?.split_once("version ")?;
    let version = after.split_whitespace().next()?;
    major_minor(version)?;
    Some(version.to_owned())
}

pub(super) fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// The version that a type such as `pc-q35-7.2` ends with.
pub(super) fn type_version(machine_type: &str) -> Option<(u32, u32)> {
    major_minor(machine_type.rsplit_once('-')?.1)
}

fn parse_machine_types(list: &str) -> Vec<String> {
    let names = list
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next());
    names
        .filter(|name| type_version(name).is_some())
        .map(str::to_owned)
        .collect()
}

/// Lines are `x86 Nehalem-v1  Intel ...` in older versions, `  Nehalem-v1  Intel ...` in newer ones, and end where flags begin.
fn parse_cpu_models(list: &str) -> Vec<String> {
    let lines = list.lines().skip(1);
    let names = lines
        .take_while(|line| !line.starts_with("Recognized"))
        .filter_map(|line| {
            let line = line.trim_start();
            line.strip_prefix("x86 ")
                .unwrap_or(line)
                .split_whitespace()
                .next()
        });
    names
        .filter(|name| is_versioned_model(name))
        .map(str::to_owned)
        .collect()
}

fn is_versioned_model(name: &str) -> bool {
    name.rsplit_once("-v").is_some_and(|(_, version)| {
        !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit())
    })
}

/// Whether this QEMU can run the machine: nothing is started that would fail or, worse, go on wrongly.
///
/// # Errors
/// What is missing, and what to do.
pub fn check(machine: &Machine, probed: &Probed) -> Result<(), Failure> {
    let refuse =
        |message: String, hint: String| Err(Failure::new(FailureCode::Refused, message).hint(hint));
    let machine_type = &machine.machine_type;
    if !probed.machine_types.contains(machine_type) {
        let message = format!(
            "QEMU {} does not know the machine type {machine_type}",
            probed.version
        );
        let newer = type_version(machine_type)
            .filter(|needs| major_minor(&probed.version).is_some_and(|version| version < *needs));
        return refuse(
            message,
            match newer {
                Some((major, minor)) => format!("install QEMU {major}.{minor} or newer"),
                None => format!(
                    "the capsule was captured by QEMU {}: install a version as near as possible",
                    machine.emulator
                ),
            },
        );
    }
    let model = &machine.cpu_model;
    if !probed.cpu_models.contains(model) {
        let message = match is_versioned_model(model) {
            true => format!(
                "QEMU {} does not know the CPU model {model}",
                probed.version
            ),
            false => format!("{model:?} is not a versioned CPU model"),
        };
        return refuse(
            message,
            "choose an exact one that `qemu-system-x86_64 -cpu help` lists, such as Nehalem-v1"
                .into(),
        );
    }
    match machine.accelerator.as_str() {
        "tcg" => {}
        "kvm" if probed.kvm => {}
        "kvm" => {
            return refuse(
                "the machine was captured under KVM, and /dev/kvm cannot be opened here".into(),
                "enable virtualisation in the firmware, load kvm_intel or kvm_amd, and join the group kvm".into(),
            );
        }
        other => {
            return refuse(
                format!("the accelerator {other:?} is unknown"),
                "it is tcg or kvm".into(),
            );
        }
    }
    for (name, size) in &machine.firmware {
        let here = probed.firmware.iter().find(|(other, _)| other == name);
        if here.is_some_and(|(_, here)| here != size) {
            return refuse(
                format!(
                    "the firmware {name} has another size here than where the machine was captured"
                ),
                format!(
                    "install the firmware that came with QEMU {}",
                    machine.emulator
                ),
            );
        }
    }
    shape(machine)
}

/// What a machine may be made of. A manifest comes from elsewhere, and some of QEMU's devices and properties reach files of the host.
pub(super) fn shape(machine: &Machine) -> Result<(), Failure> {
    let invalid = |message: String| Err(Failure::new(FailureCode::Invalid, message));
    if machine.cpus == 0 || machine.cpus > 255 {
        return invalid(format!("{} CPUs: there are 1 to 255", machine.cpus));
    }
    if machine.ram_size == 0 || machine.ram_size > MAX_MEMORY || machine.ram_size % (1 << 20) != 0 {
        return invalid(format!(
            "{} bytes of memory: it is a whole number of MiB, at most {} GiB",
            machine.ram_size,
            MAX_MEMORY >> 30
        ));
    }
    let words = [&machine.machine_type, &machine.cpu_model, &machine.ram_id];
    for word in words
        .into_iter()
        .chain(machine.devices.iter().map(|device| &device.id))
    {
        if !is_word(word) {
            return invalid(format!("{word:?} is not a name that QEMU takes"));
        }
    }
    for device in &machine.devices {
        let name = &device.driver;
        let Some(driver) = DRIVERS.iter().find(|driver| driver.name == name) else {
            return invalid(format!("devices of the kind {name:?} are not supported"));
        };
        if driver.is_disk != device.component.is_some() {
            return invalid(format!(
                "{}: disks read a component, others none",
                device.id
            ));
        }
        if !is_number(&device.address) {
            return invalid(format!("{}: its address is not a number", device.id));
        }
        for (property, value) in &device.properties {
            if property == "romfile" && !value.is_empty() {
                return invalid(format!("{}: it cannot have a ROM from a file", device.id));
            }
            if property != "bus" && !driver.properties.contains(&property.as_str()) {
                return invalid(format!(
                    "{}: {property:?} is no property of {name} here",
                    device.id
                ));
            }
        }
    }
    let mut ids: Vec<&String> = machine.devices.iter().map(|device| &device.id).collect();
    ids.sort_unstable();
    if let Some(twice) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        return invalid(format!("two devices are called {}", twice[0]));
    }
    Ok(())
}

/// Letters, digits, `-`, `_` and `.`, and a letter first.
fn is_word(word: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    word.starts_with(|c: char| c.is_ascii_alphabetic())
        && word.len() <= 64
        && word.bytes().all(allowed)
}

/// Digits, or `0x` and hexadecimal ones; for a PCI address perhaps a function behind a dot.
fn is_number(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_hexdigit() || b == b'x' || b == b'.';
    text.starts_with(|c: char| c.is_ascii_digit()) && text.len() <= 12 && text.bytes().all(allowed)
}

/// A kind of device that a machine may have.
pub(super) struct Driver {
    name: &'static str,
    /// The property that the address is given as.
    pub address: &'static str,
    /// The property that names the part of the host it is connected to.
    pub backend: Option<&'static str>,
    is_disk: bool,
    properties: &'static [&'static str],
}

const fn pci(
    name: &'static str,
    backend: Option<&'static str>,
    properties: &'static [&'static str],
) -> Driver {
    Driver {
        name,
        address: "addr",
        backend,
        is_disk: false,
        properties,
    }
}

static DRIVERS: [Driver; 7] = [
    Driver {
        is_disk: true,
        ..pci(
            "virtio-blk-pci",
            Some("drive"),
            &[
                "bootindex",
                "discard",
                "logical_block_size",
                "num-queues",
                "physical_block_size",
                "queue-size",
                "serial",
                "write-zeroes",
            ],
        )
    },
    pci(
        "virtio-balloon-pci",
        None,
        &["deflate-on-oom", "free-page-reporting"],
    ),
    pci("virtio-rng-pci", None, &["max-bytes", "period"]),
    pci("virtio-serial-pci", None, &["max_ports"]),
    pci(
        "virtio-net-pci",
        Some("netdev"),
        &["bootindex", "mac", "romfile"],
    ),
    Driver {
        address: "nr",
        ..pci("virtserialport", Some("chardev"), &["name"])
    },
    Driver {
        address: "iobase",
        ..pci("isa-serial", Some("chardev"), &["irq"])
    },
];

/// What is known about a device's kind; nothing where machines may not have it.
pub(super) fn driver(device: &Device) -> Option<&'static Driver> {
    DRIVERS.iter().find(|driver| driver.name == device.driver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_old_and_new_versions_are_read() {
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2)\nCopyright").as_deref(),
            Some("7.2.22")
        );
        assert_eq!(parse_version("GNU bash, version x.2"), None);
        let types = "Supported machines are:\nmicrovm   microvm (i386)\nq35  Standard (alias of pc-q35-7.2)\n\
                     pc-q35-7.2           Standard PC (Q35 + ICH9, 2009)\n";
        assert_eq!(parse_machine_types(types), ["pc-q35-7.2"]);
        let old = "Available CPUs:\nx86 Nehalem  (alias configured by machine type)\nx86 Nehalem-v1  Intel Core\n\n\
                   Recognized CPUID flags:\n  3dnow-v1\n";
        let new = "Available CPUs:\n  Nehalem   (alias)\n  Nehalem-v1            Intel Core\n  host      same\n";
        for list in [old, new] {
            assert_eq!(parse_cpu_models(list), ["Nehalem-v1"]);
        }
    }

    #[test]
    fn machine_types_compare_by_number() {
        assert!(type_version("pc-q35-10.0") > type_version("pc-q35-7.2"));
        assert_eq!(type_version("microvm"), None);
    }
}
