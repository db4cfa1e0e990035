//! What the rows found.

use capsule_node::control::LayerInfo;
use capsule_node::machine::api::CapturedMachine;
use serde::Serialize;

use super::Row;
use super::system::{Facts, System};

/// See the module. What was not measured is absent.
#[derive(Debug, Serialize)]
pub struct Found {
    /// The thin link's rate.
    pub kbit: u32,
    /// The guest's system, and its upgrade.
    pub system: Facts,
    /// From `machine create` to the shell.
    pub boot_seconds: f64,
    /// The idle guest's capture.
    pub idle: Option<CapturedMachine>,
    /// Its layers.
    pub idle_layers: Vec<Layer>,
    /// The first row, and the larger application.
    pub first: Option<Arrival>,
    /// After the upgrade.
    pub update: Option<Update>,
    /// To work, and back.
    pub hops: Vec<Hop>,
    /// Of each further capture.
    pub pauses: Vec<Pause>,
    /// LAN beside local.
    pub lan: Option<Lan>,
    /// Network block devices.
    pub nbd: Option<Nbd>,
    /// What each technique saves.
    pub ablation: Vec<Ladder>,
    /// Rows that could not be measured, and why.
    #[serde(skip)]
    pub failed: Vec<(Row, String)>,
}

/// A layer's bytes.
#[derive(Debug, Clone, Serialize)]
pub struct Layer {
    /// Of which component.
    pub component: String,
    /// Hash of what it stands on; none: on nothing.
    pub parent: Option<String>,
    /// Hash of what it makes.
    pub target: String,
    /// Bytes of its target.
    pub target_bytes: u64,
    /// Bytes of its index.
    pub index_bytes: u64,
    /// Bytes of its pack.
    pub pack_bytes: u64,
}

/// A machine that came over a link.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Arrival {
    /// From `machine run` until the guest ran.
    pub runs_seconds: f64,
    /// Until the first command was answered.
    pub first_seconds: f64,
    /// Bytes that the receiver's interface had received by then, headers included.
    pub first_bytes: u64,
    /// Bytes that it had sent.
    pub first_sent_bytes: u64,
    /// The same for the larger application, where it was asked.
    pub large_seconds: Option<f64>,
    /// Its bytes.
    pub large_bytes: Option<u64>,
    /// Bytes of memory and disks that the guest had read by then.
    pub read_bytes: u64,
}

/// An upgraded machine.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Update {
    /// Its arrival where the capture before was.
    pub arrival: Arrival,
    /// How long the upgrade took in the guest.
    pub upgrade_seconds: f64,
    /// Index and pack of the disk, from the capture before.
    pub disk_bytes: u64,
    /// The same of the memory.
    pub ram_bytes: u64,
    /// Bytes of the package files.
    pub deb_bytes: u64,
    /// Bytes that were written to the disk.
    pub written_bytes: u64,
}

/// A move from one node to the other, after work.
#[derive(Debug, Clone, Serialize)]
pub struct Hop {
    /// Whither.
    pub to: &'static str,
    /// From the order to capture to the first answer at the other end.
    pub seconds: f64,
    /// Of that, capturing and publishing.
    pub capture_seconds: f64,
    /// Before: how long it had been there when work was done and all of it had come, which was waited for. None where it was made there.
    pub whole_seconds: Option<f64>,
    /// The arrival.
    pub arrival: Arrival,
    /// Bytes of memory that were written since the last capture.
    pub ram_written: u64,
    /// Bytes of disks.
    pub disk_written: u64,
    /// Bytes of packs and indexes that were made.
    pub published_bytes: u64,
}

/// A further capture of a machine that goes on.
#[derive(Debug, Clone, Serialize)]
pub struct Pause {
    /// For how long the guest stood still.
    pub seconds: f64,
    /// Bytes of memory that it had written.
    pub ram_written: u64,
}

/// From `machine run` to the first command's answer, in seconds, each time it was measured.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Lan {
    /// At 1 Gbit/s, where the receiver has nothing, with a prefetch record.
    pub lan: Vec<f64>,
    /// Where no record was there.
    pub without_record: Vec<f64>,
    /// Of a capsule that is all here.
    pub here: Vec<f64>,
    /// QEMU alone, on files: raw disk, memory, state.
    pub files: Vec<f64>,
}

/// Bytes a second.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Nbd {
    /// Ours, one request after the other of 1 MiB each, 16 at a time.
    pub sequential: Vec<f64>,
    /// qemu-nbd on the raw file.
    pub qemu_sequential: Vec<f64>,
    /// Ours, 4 KiB at random places, 16 at a time.
    pub random: Vec<f64>,
    /// qemu-nbd.
    pub qemu_random: Vec<f64>,
    /// Ours with `--whole`: from a file that was written out before.
    pub whole_sequential: Vec<f64>,
    /// The same at random places.
    pub whole_random: Vec<f64>,
    /// Bytes that this takes on the disk.
    pub whole_bytes: f64,
    /// How long it took to write out.
    pub whole_seconds: f64,
}

/// What is left to send with one technique after the other.
#[derive(Debug, Clone, Serialize)]
pub struct Ladder {
    /// Of which move.
    pub title: String,
    /// In the order in which they are added.
    pub steps: Vec<Step>,
}

/// A technique more.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// What is added.
    pub name: &'static str,
    /// Bytes until the first command's answer.
    pub bytes: u64,
    /// Seconds until then; at the thin link's rate where that was not measured.
    pub seconds: f64,
    /// Whether that was measured in a real run; else it was reckoned from real content.
    pub is_measured: bool,
    /// What was reckoned, and how.
    pub how: String,
}

impl Found {
    /// Nothing yet.
    pub fn new(system: &System, kbit: u32) -> Self {
        Self {
            kbit,
            system: system.facts.clone(),
            boot_seconds: 0.0,
            idle: None,
            idle_layers: Vec::new(),
            first: None,
            update: None,
            hops: Vec::new(),
            pauses: Vec::new(),
            lan: None,
            nbd: None,
            ablation: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Index and pack of a component of the idle guest, from nothing.
    pub fn whole(&self, component: &str) -> Option<u64> {
        let mut all = self.idle_layers.iter();
        let layer = all.find(|layer| layer.component == component && layer.parent.is_none());
        layer.map(Layer::bytes)
    }
}

impl Layer {
    /// What a node says of a layer.
    pub fn of(info: &LayerInfo) -> Self {
        Self {
            component: info.component.clone(),
            parent: info.parent.map(|parent| parent.to_string()),
            target: info.target.to_string(),
            target_bytes: info.target_size,
            index_bytes: info.index.size,
            pack_bytes: info.pack.as_ref().map_or(0, |pack| pack.size),
        }
    }

    /// Index and pack.
    pub fn bytes(&self) -> u64 {
        self.index_bytes + self.pack_bytes
    }
}
