//! QEMU's command line for a machine.

use std::ffi::OsString;
use std::path::Path;

use capsule_proto::manifest::{Device, Machine};
use serde_json::{Value, json};

use super::check::{driver, shape};
use super::probe::SANDBOX;
use super::{DiskPlace, Places, disks};
use crate::control::{Failure, FailureCode};

/// Longest path of a Unix socket, with the zero at its end.
const MAX_SOCKET_PATH: usize = 107;
/// Most overlays of a disk: each is a file that is open, and looked into at a read.
pub(super) const MAX_OVERLAYS: usize = 256;

/// The arguments for QEMU: the machine stands still until it is told to go on.
///
/// # Errors
/// The machine and the places do not fit together, or a path cannot be given to QEMU.
pub fn arguments(machine: &Machine, places: &Places) -> Result<Vec<OsString>, Failure> {
    shape(machine)?;
    for socket in [
        places.monitor(),
        places.console(),
        places.agent(),
        places.transit(),
    ] {
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            let message = format!("{} is too long for the path of a socket", socket.display());
            return Err(Failure::new(FailureCode::Invalid, message)
                .hint("choose a node's home with a shorter path"));
        }
    }
    let mut line = Line::default();
    line.flags(&["-no-user-config", "-nodefaults", "-S"]);
    line.pair("-display", "none");
    if places.sandbox {
        line.pair("-sandbox", SANDBOX);
    }
    line.pair(
        "-machine",
        &format!(
            "{},accel={},memory-backend={},usb=off,vmport=off",
            machine.machine_type, machine.accelerator, machine.ram_id
        ),
    );
    // QEMU goes on with less than the model has unless it is told not to, and the guest would fail later.
    line.pair("-cpu", &format!("{},enforce", machine.cpu_model));
    let cpus = machine.cpus;
    line.pair(
        "-smp",
        &format!("cpus={cpus},sockets=1,cores={cpus},threads=1"),
    );
    line.pair("-m", &format!("{}M", machine.ram_size >> 20));
    let ram = json!({
        "qom-type": "memory-backend-file",
        "id": machine.ram_id,
        "size": machine.ram_size,
        "mem-path": text(&places.ram)?,
        "share": true,
    });
    line.pair("-object", &ram.to_string());
    line.pair("-rtc", "base=utc,clock=host");
    line.socket("monitor", &places.monitor())?;
    line.pair("-mon", "chardev=monitor,mode=control");
    let mut disks = places.disks.iter().enumerate();
    for device in &machine.devices {
        line.device(device, places, &mut disks)?;
    }
    if disks.next().is_some() {
        return Err(mismatch("there are more disks than the machine has"));
    }
    if let Some(boot) = &machine.boot {
        // At a resume too: QEMU makes memory of it that the state expects.
        let Some(kernel) = &places.kernel else {
            return Err(mismatch(
                "the machine is booted by a kernel, and there is none",
            ));
        };
        line.path("-kernel", kernel);
        match (&boot.initrd, &places.initrd) {
            (Some(_), Some(initrd)) => line.path("-initrd", initrd),
            (None, _) => {}
            (Some(_), None) => {
                return Err(mismatch(
                    "the machine has an initial ramdisk, and there is none",
                ));
            }
        }
        line.pair("-append", &boot.append);
    }
    if places.incoming {
        line.pair("-incoming", "defer");
    }
    Ok(line.0)
}

fn mismatch(message: &str) -> Failure {
    Failure::new(FailureCode::Invalid, message)
}

/// A path as text: QEMU's JSON has no other bytes.
pub(super) fn text(path: &Path) -> Result<&str, Failure> {
    path.to_str().ok_or_else(|| {
        let message = format!("{} is not UTF-8, which QEMU's paths are", path.display());
        Failure::new(FailureCode::Invalid, message)
    })
}

/// A command line in the making.
#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn flags(&mut self, flags: &[&str]) {
        self.0.extend(flags.iter().map(OsString::from));
    }

    fn pair(&mut self, option: &str, value: &str) {
        self.flags(&[option, value]);
    }

    fn path(&mut self, option: &str, path: &Path) {
        self.0.extend([option.into(), path.into()]);
    }

    /// A character device that waits for somebody to connect, and does not mind if nobody does.
    fn socket(&mut self, id: &str, path: &Path) -> Result<(), Failure> {
        let path = escape(text(path)?);
        self.pair(
            "-chardev",
            &format!("socket,id={id},path={path},server=on,wait=off"),
        );
        Ok(())
    }

    fn device<'a>(
        &mut self,
        device: &Device,
        places: &Places,
        disks: &mut impl Iterator<Item = (usize, &'a DiskPlace)>,
    ) -> Result<(), Failure> {
        // `shape` has said that it is known.
        let Some(driver) = driver(device) else {
            return Err(mismatch("a device is of an unknown kind"));
        };
        let mut value = format!("{},id={}", device.driver, device.id);
        if let Some(property) = driver.address {
            value += &format!(",{property}={}", device.address);
        }
        value += driver.host;
        if let Some(component) = &device.component {
            let top = match disks.next() {
                Some((number, disk)) if disk.component == *component => self.disk(number, disk)?,
                _ => return Err(mismatch("the disks are not those of the machine")),
            };
            value += &format!(",drive={top}");
        } else if let Some(property) = driver.backend {
            let backend = self.backend(device, places)?;
            value += &format!(",{property}={backend}");
        }
        for (name, property) in &device.properties {
            value += &format!(",{name}={}", escape(property));
        }
        self.pair("-device", &value);
        Ok(())
    }

    /// The part of the host that a device is connected to.
    fn backend(&mut self, device: &Device, places: &Places) -> Result<String, Failure> {
        let backend = format!("{}-host", device.id);
        match device.driver.as_str() {
            "virtio-net-pci" => self.pair("-netdev", &format!("user,id={backend}")),
            "isa-serial" if device.id == "console" => self.socket(&backend, &places.console())?,
            "virtserialport" if device.id == "agent" => self.socket(&backend, &places.agent())?,
            // A further port that nobody listens to.
            _ => self.pair("-chardev", &format!("null,id={backend}")),
        }
        Ok(backend)
    }

    /// A disk's chain, the base first; returns the name of its top.
    fn disk(&mut self, number: usize, disk: &DiskPlace) -> Result<String, Failure> {
        if disk.overlays.is_empty() || disk.overlays.len() > MAX_OVERLAYS {
            let message = format!(
                "{}: a disk has 1 to {MAX_OVERLAYS} overlays",
                disk.component
            );
            return Err(mismatch(&message));
        }
        let mut below = Value::Null;
        if let Some(base) = disks::base(number, &disk.base)? {
            self.pair("-blockdev", &base.to_string());
            below = base["node-name"].clone();
        }
        for (level, overlay) in disk.overlays.iter().enumerate() {
            let is_top = level + 1 == disk.overlays.len();
            let file = disks::file(number, level, overlay)?;
            let node = disks::overlay(number, level, below, is_top);
            self.pair("-blockdev", &file.to_string());
            self.pair("-blockdev", &node.to_string());
            below = node["node-name"].clone();
        }
        Ok(below.as_str().unwrap_or_default().to_owned())
    }
}

/// In QEMU's option lists a comma is doubled where it is none.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}
