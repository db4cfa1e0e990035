//! What a new machine is like, with every device spelt out, so that the next QEMU makes exactly the same one.

use capsule_proto::manifest::{Device, DirectBoot, Machine};

use super::probe::{Probed, type_version};

/// What every x86-64 machine since 2008 has (x86-64-v2), and what QEMU emulates without gaps.
const CPU_MODEL: &str = "Nehalem-v1";
/// Most disks: one PCI address each.
const MAX_DISKS: usize = 16;
/// PCI address of the first disk; below it the other devices, above it room.
const FIRST_DISK: usize = 8;

/// What a new machine is to be like.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Memory, in bytes.
    pub memory: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Disks: components `disk0`, `disk1` and so on, at most 16. The first is booted from where there is no kernel.
    pub disks: usize,
    /// Whether it has a network: the user's own, behind address translation.
    pub network: bool,
    /// Whether it runs on KVM; otherwise it is emulated, which works everywhere.
    pub kvm: bool,
    /// Versioned machine type; without it the newest one that this QEMU knows.
    pub machine_type: Option<String>,
    /// Versioned CPU model; without it one that every x86-64 machine has.
    pub cpu_model: Option<String>,
    /// Kernel to boot directly.
    pub boot: Option<DirectBoot>,
    /// Random bytes for the network card's address.
    pub mac: [u8; 6],
}

/// Describes a new machine for the QEMU that was probed.
pub fn describe(wanted: &Wanted, probed: &Probed) -> Machine {
    let newest = || {
        let q35 = probed
            .machine_types
            .iter()
            .filter(|name| name.starts_with("pc-q35-"));
        q35.max_by_key(|name| type_version(name)).cloned()
    };
    let machine_type = wanted.machine_type.clone().or_else(newest);
    Machine {
        machine_type: machine_type.unwrap_or_default(),
        cpu_model: wanted.cpu_model.clone().unwrap_or_else(|| CPU_MODEL.into()),
        accelerator: if wanted.kvm { "kvm" } else { "tcg" }.into(),
        emulator: probed.version.clone(),
        cpus: wanted.cpus,
        ram_size: wanted.memory,
        ram_id: "ram".into(),
        devices: devices(wanted),
        firmware: probed.firmware.clone(),
        boot: wanted.boot.clone(),
        ..Machine::default()
    }
}

fn devices(wanted: &Wanted) -> Vec<Device> {
    let mut devices = vec![
        device("isa-serial", "console", "0x3f8", &[("irq", "4")]),
        // Memory that the guest frees becomes a hole, without anybody asking.
        device(
            "virtio-balloon-pci",
            "balloon0",
            "0x1",
            &[
                ("bus", PCI),
                // Rather than kill a process for memory that the balloon has.
                ("deflate-on-oom", "on"),
                ("free-page-reporting", "on"),
            ],
        ),
        device("vmgenid", "generation", "", &[]),
        device("virtio-rng-pci", "rng0", "0x2", &[("bus", PCI)]),
        device("virtio-serial-pci", "serial0", "0x3", &[("bus", PCI)]),
        device(
            "virtserialport",
            "agent",
            "1",
            &[("bus", "serial0.0"), ("name", "org.qemu.guest_agent.0")],
        ),
    ];
    if wanted.network {
        // Without a ROM to boot from the network: half a megabyte that each state would hold.
        devices.push(device(
            "virtio-net-pci",
            "net0",
            "0x4",
            &[("bus", PCI), ("mac", &mac(wanted.mac)), ("romfile", "")],
        ));
    }
    for number in 0..wanted.disks.min(MAX_DISKS) {
        let name = format!("disk{number}");
        let address = format!("{:#x}", FIRST_DISK + number);
        let mut properties = vec![("bus", PCI)];
        if number == 0 && wanted.boot.is_none() {
            properties.push(("bootindex", "1"));
        }
        properties.push(("serial", &name));
        let mut disk = device("virtio-blk-pci", &name, &address, &properties);
        disk.component = Some(name.clone());
        devices.push(disk);
    }
    devices
}

const PCI: &str = "pcie.0";

fn device(driver: &str, id: &str, address: &str, properties: &[(&str, &str)]) -> Device {
    let mut properties: Vec<(String, String)> = properties
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    properties.sort();
    Device {
        driver: driver.into(),
        id: id.into(),
        address: address.into(),
        component: None,
        properties,
    }
}

/// An address that is locally administered and of one card.
fn mac(random: [u8; 6]) -> String {
    let [first, rest @ ..] = random;
    let first = (first | 0b10) & !0b1;
    rest.iter().fold(format!("{first:02x}"), |text, byte| {
        format!("{text}:{byte:02x}")
    })
}
