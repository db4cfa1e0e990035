//! Capsule manifests: which components a capsule has and, for a captured machine, what resuming it needs.
//!
//! A manifest holds no time, name or layer unless the machine's state includes them, so that the same content gives the
//! same capsule id. Late facts (names, layers) live in records. Byte-level description: `proto/docs/manifest.md`.

use serde::{Deserialize, Serialize};

use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::{CapsuleId, RootHash};
use crate::listing::MAX_LISTING_LEN;
use crate::ranges::MAX_CONTENT_LEN;

const MAGIC: &[u8; 4] = b"CAPM";
const VERSION: u8 = 1;

/// Longest manifest, in bytes: it is fetched whole before anything else.
pub const MAX_MANIFEST_LEN: usize = 256 << 10;
/// Most components: disks, RAM and device state of a machine fit many times.
pub const MAX_COMPONENTS: usize = 256;
const MAX_DEVICES: usize = 256;
const MAX_PROPERTIES: usize = 256;
const MAX_TEXT: usize = 4096;
const MAX_COMPONENT_NAME: usize = 64;

/// A capsule: an immutable set of components.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The components, sorted by name, at least one.
    pub components: Vec<Component>,
    /// For a machine captured running: what it needs to go on.
    pub machine: Option<Machine>,
}

/// One content of a capsule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component {
    /// Name within the capsule: 1 to 64 of `a-z 0-9 . _ -`, such as `disk0` or `ram`.
    pub name: String,
    /// What it is.
    pub kind: ComponentKind,
    /// BLAKE3 hash of the stream, or of the tree's listing.
    pub root: RootHash,
    /// Length of what the root names, in bytes: the stream, or the listing.
    pub size: u64,
    /// Bytes of content: the stream's length again, or the sum of the tree's regular files.
    pub content_size: u64,
}

/// What a component is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ComponentKind {
    /// A stream: a disk, as the machine sees it.
    Disk,
    /// A stream: a machine's memory, flat.
    Ram,
    /// A stream: a machine's CPU and device state.
    DeviceState,
    /// A stream: a file's bytes.
    File,
    /// A directory tree, named by its listing.
    Tree,
}

/// A machine as it was captured: enough to start one like it and go on.
///
/// Values are QEMU's own spellings where there are any.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Versioned machine type, such as `pc-q35-7.2`.
    pub machine_type: String,
    /// Versioned CPU model, never `host`.
    pub cpu_model: String,
    /// Accelerator: `tcg` or `kvm`; states do not move between them.
    pub accelerator: String,
    /// Version of the emulator that captured it.
    pub emulator: String,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory, in bytes.
    pub ram_size: u64,
    /// Id of the memory backend.
    pub ram_id: String,
    /// Component that holds the memory; none where only disks were captured.
    pub ram: Option<String>,
    /// Component that holds CPU and device state; present exactly where the memory is.
    pub state: Option<String>,
    /// All devices, in the order of creation.
    pub devices: Vec<Device>,
    /// Firmware images by name and size in bytes: sizes must match at resume.
    pub firmware: Vec<(String, u64)>,
    /// Kernel, initial ramdisk and command line, where booted directly.
    pub boot: Option<DirectBoot>,
    /// Tools seen in the guest, such as `qemu-ga` or `balloon`.
    pub guest_tools: Vec<String>,
    /// When it was captured: seconds since 1970, for the guest's clock.
    pub captured_at: u64,
}

/// A device of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Driver, such as `virtio-blk-pci`.
    pub driver: String,
    /// Its id.
    pub id: String,
    /// Explicit address on its bus.
    pub address: String,
    /// Component that it reads, for a disk.
    pub component: Option<String>,
    /// All other properties (MAC, serial ...), sorted by name, without repetition.
    pub properties: Vec<(String, String)>,
}

/// A kernel that the emulator loads itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectBoot {
    /// Component that holds the kernel.
    pub kernel: String,
    /// Component that holds the initial ramdisk.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub append: String,
}

impl Manifest {
    /// The manifest of components without machine state; sorts them.
    pub fn new(mut components: Vec<Component>) -> Result<Self, DecodeError> {
        components.sort_by(|a, b| a.name.cmp(&b.name));
        let manifest = Self {
            components,
            machine: None,
        };
        // The rules live in one place, the decoder.
        Self::decode(&manifest.encode())
    }

    /// The capsule's name: hash of the canonical encoding.
    pub fn id(&self) -> CapsuleId {
        CapsuleId(RootHash::of(&self.encode()))
    }

    /// The component of the given name.
    pub fn component(&self, name: &str) -> Option<&Component> {
        self.components
            .iter()
            .find(|component| component.name == name)
    }

    /// Bytes of content of all components.
    pub fn content_size(&self) -> u64 {
        self.components
            .iter()
            .map(|component| component.content_size)
            .sum()
    }

    /// The canonical encoding.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::with_header(MAGIC, VERSION);
        writer.list(&self.components, |w, component| component.encode(w));
        writer.option(self.machine.as_ref(), |w, machine| machine.encode(w));
        writer.finish()
    }

    /// Parses and checks a manifest; accepts only the canonical form.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r =
            Reader::with_header(bytes, MAGIC, VERSION, "capsule manifest", MAX_MANIFEST_LEN)?;
        let start = r.at();
        let components = r.list("components", MAX_COMPONENTS, 36, Component::decode)?;
        if components.is_empty() || !components.is_sorted_by(|a, b| a.name < b.name) {
            return Err(r.invalid(
                "components",
                start,
                "there is at least one, sorted by name, without repetition",
            ));
        }
        let mut total = 0u64;
        for component in &components {
            total = total.saturating_add(component.content_size);
        }
        if total > MAX_CONTENT_LEN {
            return Err(r.invalid(
                "components",
                start,
                "together they exceed the largest content",
            ));
        }
        let at = r.at();
        let machine = r.option("machine", Machine::decode)?;
        let manifest = Self {
            components,
            machine,
        };
        if manifest
            .machine
            .as_ref()
            .is_some_and(|machine| !manifest.holds_all_of(machine))
        {
            return Err(r.invalid(
                "machine",
                at,
                "it names a component that the capsule lacks or that is of another kind",
            ));
        }
        r.finish()?;
        Ok(manifest)
    }

    fn holds_all_of(&self, machine: &Machine) -> bool {
        let is = |name: &String, kinds: &[ComponentKind]| {
            self.component(name)
                .is_some_and(|c| kinds.contains(&c.kind))
        };
        let stream = [ComponentKind::Disk, ComponentKind::File];
        machine
            .ram
            .as_ref()
            .is_none_or(|ram| is(ram, &[ComponentKind::Ram]))
            && machine
                .state
                .as_ref()
                .is_none_or(|state| is(state, &[ComponentKind::DeviceState]))
            && machine
                .devices
                .iter()
                .filter_map(|device| device.component.as_ref())
                .all(|disk| is(disk, &stream))
            && machine.boot.iter().all(|boot| {
                is(&boot.kernel, &stream) && boot.initrd.iter().all(|initrd| is(initrd, &stream))
            })
    }
}

impl Component {
    fn encode(&self, w: &mut Writer) {
        w.bytes(self.name.as_bytes());
        w.u8(self.kind as u8);
        w.hash(&self.root);
        w.varint(self.size);
        if self.kind == ComponentKind::Tree {
            w.varint(self.content_size);
        }
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let name = component_name(r)?;
        let at = r.at();
        let kind = match r.u8("component kind")? {
            0 => ComponentKind::Disk,
            1 => ComponentKind::Ram,
            2 => ComponentKind::DeviceState,
            3 => ComponentKind::File,
            4 => ComponentKind::Tree,
            _ => {
                return Err(r.invalid(
                    "component kind",
                    at,
                    "kinds are 0 to 4: upgrade capsule to read newer ones",
                ));
            }
        };
        let root = r.hash("component root")?;
        // A tree's root names its listing, a stream's the content itself.
        let (size, content_size) = if kind == ComponentKind::Tree {
            (
                r.varint("listing size", MAX_LISTING_LEN as u64)?,
                r.varint("content size", MAX_CONTENT_LEN)?,
            )
        } else {
            let size = r.varint("component size", MAX_CONTENT_LEN)?;
            (size, size)
        };
        Ok(Self {
            name,
            kind,
            root,
            size,
            content_size,
        })
    }
}

fn component_name(r: &mut Reader<'_>) -> Result<String, DecodeError> {
    let at = r.at();
    let name = r.text("component name", MAX_COMPONENT_NAME)?;
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
    if name.is_empty() || name.starts_with('.') || !name.bytes().all(allowed) {
        return Err(r.invalid(
            "component name",
            at,
            "a name is of a-z 0-9 . _ - and does not begin with a dot",
        ));
    }
    Ok(name)
}

impl ComponentKind {
    /// The word for it in output and options.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Ram => "ram",
            Self::DeviceState => "device-state",
            Self::File => "file",
            Self::Tree => "tree",
        }
    }
}

impl Machine {
    /// As text, to be passed on: its part of a manifest, in hexadecimal digits.
    pub fn to_text(&self) -> String {
        let mut writer = Writer::default();
        self.encode(&mut writer);
        data_encoding::HEXLOWER.encode(&writer.finish())
    }

    /// What [`Machine::to_text`] wrote.
    ///
    /// # Errors
    /// It did not write that.
    pub fn from_text(text: &str) -> Result<Self, DecodeError> {
        let bytes = data_encoding::HEXLOWER.decode(text.as_bytes());
        // What is no text ends too early.
        let bytes = bytes.unwrap_or_default();
        let mut reader = Reader::new(&bytes);
        let machine = Self::decode(&mut reader)?;
        reader.finish()?;
        Ok(machine)
    }

    fn encode(&self, w: &mut Writer) {
        let text = |w: &mut Writer, text: &String| w.bytes(text.as_bytes());
        for field in [
            &self.machine_type,
            &self.cpu_model,
            &self.accelerator,
            &self.emulator,
        ] {
            text(w, field);
        }
        w.varint(self.cpus.into());
        w.varint(self.ram_size);
        text(w, &self.ram_id);
        w.option(self.ram.as_ref(), text);
        w.option(self.state.as_ref(), text);
        w.list(&self.devices, |w, device| device.encode(w));
        w.list(&self.firmware, |w, (name, size)| {
            text(w, name);
            w.varint(*size);
        });
        w.option(self.boot.as_ref(), |w, boot| {
            text(w, &boot.kernel);
            w.option(boot.initrd.as_ref(), text);
            text(w, &boot.append);
        });
        w.list(&self.guest_tools, text);
        w.varint(self.captured_at);
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let text = |r: &mut Reader<'_>| r.text("machine field", MAX_TEXT);
        let start = r.at();
        let machine = Self {
            machine_type: text(r)?,
            cpu_model: text(r)?,
            accelerator: text(r)?,
            emulator: text(r)?,
            cpus: r.varint("cpus", 4096)? as u32,
            ram_size: r.varint("ram size", MAX_CONTENT_LEN)?,
            ram_id: text(r)?,
            ram: r.option("ram", component_name)?,
            state: r.option("state", component_name)?,
            devices: r.list("devices", MAX_DEVICES, 5, Device::decode)?,
            firmware: r.list("firmware", MAX_DEVICES, 2, |r| {
                Ok((text(r)?, r.varint("firmware size", MAX_CONTENT_LEN)?))
            })?,
            boot: r.option("boot", |r| {
                Ok(DirectBoot {
                    kernel: component_name(r)?,
                    initrd: r.option("initrd", component_name)?,
                    append: text(r)?,
                })
            })?,
            guest_tools: r.list("guest tools", MAX_PROPERTIES, 1, text)?,
            captured_at: r.varint("capture time", u64::MAX)?,
        };
        if machine.cpus == 0
            || machine.machine_type.is_empty()
            || machine.ram.is_some() != machine.state.is_some()
        {
            return Err(r.invalid(
                "machine",
                start,
                "it has a type, CPUs, and both memory and state or neither",
            ));
        }
        Ok(machine)
    }
}

impl Device {
    fn encode(&self, w: &mut Writer) {
        for field in [&self.driver, &self.id, &self.address] {
            w.bytes(field.as_bytes());
        }
        w.option(self.component.as_ref(), |w, component| {
            w.bytes(component.as_bytes())
        });
        w.list(&self.properties, |w, (name, value)| {
            w.bytes(name.as_bytes());
            w.bytes(value.as_bytes());
        });
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let text = |r: &mut Reader<'_>| r.text("device field", MAX_TEXT);
        let (driver, id, address) = (text(r)?, text(r)?, text(r)?);
        let component = r.option("device component", component_name)?;
        let start = r.at();
        let properties = r.list("device properties", MAX_PROPERTIES, 2, |r| {
            Ok((text(r)?, text(r)?))
        })?;
        if !properties.is_sorted_by(|(a, _), (b, _)| a < b) {
            return Err(r.invalid(
                "device properties",
                start,
                "they are sorted by name, without repetition",
            ));
        }
        Ok(Self {
            driver,
            id,
            address,
            component,
            properties,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn component(name: &str, kind: ComponentKind) -> Component {
        Component {
            name: name.into(),
            kind,
            root: RootHash::of(name.as_bytes()),
            size: 5,
            content_size: 5,
        }
    }

    #[test]
    fn order_of_components_does_not_change_the_id() {
        let (a, b) = (
            component("disk0", ComponentKind::Disk),
            component("disk1", ComponentKind::Disk),
        );
        let manifest = Manifest::new(vec![b.clone(), a.clone()]).unwrap();
        assert_eq!(
            manifest.id(),
            Manifest::new(vec![a.clone(), b]).unwrap().id()
        );
        assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
        assert!(Manifest::new(vec![a.clone(), a]).is_err());
        assert!(Manifest::new(vec![]).is_err());
        assert!(Manifest::new(vec![component("../x", ComponentKind::File)]).is_err());
    }

    #[test]
    fn a_machine_names_components_of_the_capsule() {
        let machine = Machine {
            machine_type: "pc-q35-7.2".into(),
            cpus: 1,
            ram: Some("ram".into()),
            state: Some("state".into()),
            ..Machine::default()
        };
        let with = |components: &[(&str, ComponentKind)]| {
            let components = components
                .iter()
                .map(|(name, kind)| component(name, *kind))
                .collect();
            Manifest::decode(
                &Manifest {
                    components,
                    machine: Some(machine.clone()),
                }
                .encode(),
            )
        };
        assert!(
            with(&[
                ("ram", ComponentKind::Ram),
                ("state", ComponentKind::DeviceState)
            ])
            .is_ok()
        );
        assert!(with(&[("ram", ComponentKind::Ram)]).is_err());
        assert!(
            with(&[
                ("ram", ComponentKind::Disk),
                ("state", ComponentKind::DeviceState)
            ])
            .is_err()
        );
    }
}
