//! What needs no guest: descriptions, command lines, refusals.

use std::path::PathBuf;

use capsule_proto::manifest::{DirectBoot, Machine};

use super::*;
use crate::control::FailureCode;

fn probed() -> Probed {
    let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    Probed {
        version: "7.2.22".into(),
        machine_types: list(&["pc-q35-7.2", "pc-q35-7.1", "pc-i440fx-7.2"]),
        cpu_models: list(&["Nehalem-v1", "EPYC-v2"]),
        firmware: vec![("bios-256k.bin".into(), 262_144)],
        ..Probed::default()
    }
}

fn machine() -> Machine {
    let wanted = Wanted {
        memory: 256 << 20,
        cpus: 2,
        disks: 2,
        network: true,
        boot: Some(DirectBoot {
            kernel: "kernel".into(),
            initrd: None,
            append: "console=ttyS0,115200 -x".into(),
        }),
        mac: [0xff; 6],
        ..Wanted::default()
    };
    describe(&wanted, &probed())
}

fn places() -> Places {
    let disk = |component: &str, base| DiskPlace {
        component: component.into(),
        base,
        overlays: vec!["/run/m/a".into(), "/run/m/b".into()],
    };
    let file = DiskBase::File {
        path: "/data/a,b.raw".into(),
        format: "raw".into(),
    };
    Places {
        dir: "/run/m,1".into(),
        ram: "/run/m,1/ram".into(),
        disks: vec![
            disk("disk0", DiskBase::Nbd("/run/nbd.sock".into())),
            disk("disk1", file),
        ],
        kernel: Some("/data/kernel".into()),
        initrd: None,
        incoming: true,
        sandbox: true,
    }
}

#[test]
fn a_new_machine_is_spelt_out_and_taken_back() {
    let machine = machine();
    assert_eq!(machine.machine_type, "pc-q35-7.2");
    assert!(check(&machine, &probed()).is_ok());
    let mut ids: Vec<_> = machine
        .devices
        .iter()
        .map(|device| &device.address)
        .collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), machine.devices.len());
    let network = machine.devices.iter().find(|device| device.id == "net0");
    let properties = &network.unwrap().properties;
    // Locally administered, and not a group's.
    assert!(properties.contains(&("mac".into(), "fe:ff:ff:ff:ff:ff".into())));
    for device in &machine.devices {
        assert!(device.properties.is_sorted());
    }
}

#[test]
fn commas_stay_within_their_values() {
    let line = arguments(&machine(), &places()).unwrap();
    let line: Vec<_> = line.iter().map(|word| word.to_str().unwrap()).collect();
    let after = |option: &str| {
        let at = line.iter().position(|word| *word == option);
        line[at.unwrap() + 1]
    };
    assert!(line.contains(&"socket,id=monitor,path=/run/m,,1/monitor.sock,server=on,wait=off"));
    assert!(after("-object").contains(r#""mem-path":"/run/m,1/ram""#));
    assert_eq!(after("-append"), "console=ttyS0,115200 -x");
    assert_eq!(after("-incoming"), "defer");
    let disks: Vec<_> = line
        .iter()
        .filter(|word| word.starts_with("virtio-blk-pci"))
        .collect();
    assert!(disks[0].contains("rerror=stop,werror=stop,drive=d0-1"));
    assert!(disks[1].contains("drive=d1-1,"));
    let nodes = line.iter().filter(|word| word.starts_with('{')).count();
    assert_eq!(nodes, 1 + 2 * (1 + 2 * 2));
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |change: &dyn Fn(&mut Machine)| {
        let mut machine = machine();
        change(&mut machine);
        check(&machine, &probed()).unwrap_err()
    };
    let newer = refused(&|machine| machine.machine_type = "pc-q35-10.0".into());
    assert_eq!(newer.hint.as_deref(), Some("install QEMU 10.0 or newer"));
    let host = refused(&|machine| machine.cpu_model = "host".into());
    assert!(host.message.contains("versioned"), "{host}");
    let kvm = refused(&|machine| machine.accelerator = "kvm".into());
    assert!(kvm.message.contains("/dev/kvm"), "{kvm}");
    let firmware = refused(&|machine| machine.firmware[0].1 += 1);
    assert!(firmware.message.contains("bios-256k.bin"), "{firmware}");
}

#[test]
fn a_manifest_does_not_reach_files_of_the_host() {
    let changes: [&dyn Fn(&mut Machine); 7] = [
        &|machine| machine.devices[1].driver = "loader".into(),
        &|machine| machine.devices[1].driver = "virtio-rng-pci,bus=pcie.0".into(),
        &|machine| machine.devices[1].properties.push(("x".into(), "y".into())),
        &|machine| machine.devices[1].id = "a,b=c".into(),
        &|machine| machine.devices[1].address = "1,x=y".into(),
        &|machine| machine.ram_id = "a,b=c".into(),
        &|machine| {
            let network = machine
                .devices
                .iter_mut()
                .find(|device| device.id == "net0");
            network.unwrap().properties.last_mut().unwrap().1 = "/etc/passwd".into();
        },
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut machine = machine();
        change(&mut machine);
        let refused = check(&machine, &probed()).unwrap_err();
        assert_eq!(refused.code, FailureCode::Invalid, "{number}");
        assert!(arguments(&machine, &places()).is_err(), "{number}");
    }
}

#[test]
fn places_are_those_of_the_machine() {
    let changes: [&dyn Fn(&mut Places); 5] = [
        &|places| places.disks.truncate(1),
        &|places| places.disks.swap(0, 1),
        &|places| places.disks[1].overlays.clear(),
        &|places| places.kernel = None,
        &|places| places.dir = PathBuf::from("/").join("x".repeat(100)),
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut places = places();
        change(&mut places);
        assert!(arguments(&machine(), &places).is_err(), "{number}");
    }
}
