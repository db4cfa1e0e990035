//! Whether a machine can run here. A manifest comes from elsewhere: what it asks for has to be there, and is to reach nothing else of this host.

use capsule_proto::manifest::{Device, Machine};

use super::probe::{Probed, is_versioned_model, major_minor, type_version};
use crate::control::{Failure, FailureCode};

/// Largest memory: what QEMU's machines take without special care.
const MAX_MEMORY: u64 = 1 << 40;

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
    if machine.ram_size == 0
        || machine.ram_size > MAX_MEMORY
        || !machine.ram_size.is_multiple_of(1 << 20)
    {
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
        if driver.address.is_some() != is_number(&device.address) {
            return invalid(format!("{}: its address is none of its bus", device.id));
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
    /// The property that the address is given as; none for what is on no bus.
    pub address: Option<&'static str>,
    /// Properties that are this host's choice.
    pub host: &'static str,
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
        address: Some("addr"),
        host: "",
        backend,
        is_disk: false,
        properties,
    }
}

static DRIVERS: [Driver; 8] = [
    Driver {
        is_disk: true,
        // An error of the base (a peer that is away) stops the machine, which can then go on where it was.
        host: ",rerror=stop,werror=stop",
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
        address: Some("nr"),
        ..pci("virtserialport", Some("chardev"), &["name"])
    },
    Driver {
        address: Some("iobase"),
        ..pci("isa-serial", Some("chardev"), &["irq"])
    },
    Driver {
        address: None,
        // Another one each time: a guest that is resumed takes it for a sign to draw new random numbers.
        host: ",guid=auto",
        ..pci("vmgenid", None, &[])
    },
];

/// What is known about a device's kind; nothing where machines may not have it.
pub(super) fn driver(device: &Device) -> Option<&'static Driver> {
    DRIVERS.iter().find(|driver| driver.name == device.driver)
}
