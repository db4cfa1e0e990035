//! A simulated disk that fails on purpose: crashes at any operation, errors at any operation.
//!
//! It keeps what was made durable apart from what was only written. A crash keeps, of what was not
//! durable, what a seed chooses: each 512-byte sector of each write, each change of length, each hole and
//! each name by itself, so that writes are dropped, torn, and reordered against each other and against
//! names. Only a rename is atomic. That is at least as harsh as POSIX allows (Pillai et al., OSDI 2014).
//! After a failed sync, what it should have written reads back fine and is never written: as the Linux
//! page cache does it (Rebello et al., ATC 2020).

#![allow(dead_code)] // Each test file uses its part of this.

mod changes;
pub mod content;
pub mod script;
pub mod short;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use capsule_node::store::{Disk, DiskFile, FileEntry, OpenMode};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use changes::{Change, Content, NameChange};

/// What goes wrong, and at which operation (counted from 0 among those that change something).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The operation happens or not, and the machine is off.
    Crash(u64),
    /// The operation fails once with this error number.
    Error(u64, i32),
    /// From the operation on, whatever takes space fails with "no space left".
    Full(u64),
}

/// The disk; clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct SimDisk(Arc<Mutex<Machine>>);

#[derive(Debug, Clone, Default)]
struct Machine {
    files: Vec<Content>,
    /// Names as a running program sees them; `None` is a directory.
    names: BTreeMap<PathBuf, Option<usize>>,
    durable: BTreeMap<PathBuf, Option<usize>>,
    pending: Vec<NameChange>,
    operations: u64,
    fault: Option<Fault>,
    off: bool,
    /// Whether an injected error was met.
    met: bool,
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    id: usize,
}

/// What an operation may do, by the fault plan.
enum Verdict {
    Go,
    /// It is the last before the power goes.
    Last,
    Fail(io::Error),
}

impl SimDisk {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.0.lock().unwrap()
    }

    /// A copy that shares nothing, with a fault plan of its own.
    pub fn fork(&self, fault: Option<Fault>) -> Self {
        let machine = Machine {
            operations: 0,
            fault,
            met: false,
            ..self.machine().clone()
        };
        Self(Arc::new(Mutex::new(machine)))
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.machine().operations
    }

    /// Whether the planned error was met.
    pub fn met(&self) -> bool {
        self.machine().met
    }

    /// Sets the fault plan; operations count from here.
    pub fn plan(&self, fault: Fault) {
        let mut machine = self.machine();
        machine.operations = 0;
        machine.fault = Some(fault);
    }

    /// Makes the directory that everything is in.
    pub fn make_root(&self) {
        let mut machine = self.machine();
        machine.names.insert(PathBuf::new(), None);
        machine.durable.insert(PathBuf::new(), None);
    }

    /// Lifts the fault plan.
    pub fn heal(&self) {
        self.machine().fault = None;
    }

    /// What a machine finds on this disk after the power was cut; the seed chooses what survived.
    pub fn crash(&self, seed: u64) -> Self {
        let machine = self.machine();
        let mut rng = SmallRng::seed_from_u64(seed);
        // Some crashes keep nothing, some everything, most a part.
        let odds = [0.0, 1.0, 0.5, 0.9, 0.1][rng.random_range(0..5)];
        let names = machine.surviving_names(&mut rng, odds);
        let survive = |content: &Content| {
            let bytes = content.surviving(&mut rng, odds);
            Content {
                live: bytes.clone(),
                durable: bytes,
                pending: Vec::new(),
            }
        };
        let files = machine.files.iter().map(survive).collect();
        let after = Machine {
            files,
            durable: names.clone(),
            names,
            ..Machine::default()
        };
        Self(Arc::new(Mutex::new(after)))
    }

    /// Changes a byte behind everybody's back, durably.
    pub fn damage(&self, path: &Path, offset: usize) {
        let mut machine = self.machine();
        let id = machine.names[path].expect("a file");
        let content = &mut machine.files[id];
        content.live[offset] ^= 0x55;
        if let Some(byte) = content.durable.get_mut(offset) {
            *byte ^= 0x55;
        }
    }

    /// Removes a file behind everybody's back, durably.
    pub fn lose(&self, path: &Path) {
        let mut machine = self.machine();
        machine.names.remove(path).expect("a file");
        machine.durable.remove(path);
    }

    /// All files that a running program sees.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.machine()
            .names
            .iter()
            .filter(|(_, id)| id.is_some())
            .map(|(path, _)| path.clone())
            .collect()
    }

    /// A file's bytes as a running program sees them.
    pub fn bytes(&self, path: &Path) -> Vec<u8> {
        let machine = self.machine();
        machine.files[machine.names[path].expect("a file")]
            .live
            .clone()
    }
}

impl Machine {
    /// Counts an operation and says what becomes of it.
    fn verdict(&mut self, takes_space: bool) -> Verdict {
        if self.off {
            return Verdict::Fail(io::Error::other("the machine is off"));
        }
        let now = self.operations;
        self.operations += 1;
        match self.fault {
            Some(Fault::Crash(at)) if now == at => {
                self.off = true;
                Verdict::Last
            }
            Some(Fault::Error(at, code)) if now == at => {
                self.met = true;
                Verdict::Fail(io::Error::from_raw_os_error(code))
            }
            Some(Fault::Full(at)) if now >= at && takes_space => {
                self.met = true;
                Verdict::Fail(io::Error::from_raw_os_error(ENOSPC))
            }
            _ => Verdict::Go,
        }
    }

    /// Runs an operation that happens as a whole, or not.
    fn operate(&mut self, takes_space: bool, act: impl FnOnce(&mut Self)) -> io::Result<()> {
        match self.verdict(takes_space) {
            Verdict::Go => {
                act(self);
                Ok(())
            }
            Verdict::Last => {
                act(self);
                Err(io::Error::other("the power was cut"))
            }
            Verdict::Fail(e) => Err(e),
        }
    }

    fn change(&mut self, id: usize, change: Change) {
        change.apply(&mut self.files[id].live);
        self.files[id].pending.push(change);
    }

    fn surviving_names(&self, rng: &mut SmallRng, odds: f64) -> BTreeMap<PathBuf, Option<usize>> {
        let mut names = self.durable.clone();
        for change in &self.pending {
            if rng.random_bool(odds) {
                change.apply(&mut names);
            }
        }
        names
    }

    fn sync_dir(&mut self, dir: &Path) {
        let pending = std::mem::take(&mut self.pending);
        for change in pending {
            if change.touches(dir) {
                change.apply(&mut self.durable);
                // The old name's directory was not synced: it may still show it.
                if let NameChange::Rename(from, _, _) = change
                    && from.parent() != Some(dir)
                {
                    self.pending.push(NameChange::Unlink(from));
                }
            } else {
                self.pending.push(change);
            }
        }
    }
}

pub const ENOSPC: i32 = 28;
pub const EIO: i32 = 5;

impl Disk for SimDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let mut machine = self.machine();
        let found = machine.names.get(path).copied().flatten();
        let id = match (found, mode) {
            (None, OpenMode::Existing) => return Err(io::ErrorKind::NotFound.into()),
            (Some(id), OpenMode::Existing | OpenMode::Create) => id,
            (Some(id), OpenMode::Truncate) => {
                machine.operate(false, |machine| machine.change(id, Change::Len(0)))?;
                id
            }
            (None, _) => {
                let id = machine.files.len();
                machine.operate(true, |machine| {
                    machine.files.push(Content::default());
                    machine.names.insert(path.into(), Some(id));
                    machine
                        .pending
                        .push(NameChange::Make(path.into(), Some(id)));
                })?;
                id
            }
        };
        Ok(Arc::new(SimFile {
            disk: self.clone(),
            id,
        }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut machine = self.machine();
        if machine.names.contains_key(path) {
            return Ok(());
        }
        machine.operate(true, |machine| {
            machine.names.insert(path.into(), None);
            machine.pending.push(NameChange::Make(path.into(), None));
        })
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<FileEntry>> {
        let machine = self.machine();
        if !machine.names.contains_key(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let files = machine
            .names
            .iter()
            .filter(|(path, _)| path.parent() == Some(dir));
        let entry = |(path, id): (&PathBuf, &Option<usize>)| {
            let name = path.file_name()?.to_str()?.to_owned();
            id.map(|id| FileEntry {
                name,
                len: machine.files[id].live.len() as u64,
            })
        };
        Ok(files.filter_map(entry).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut machine = self.machine();
        let id = machine
            .names
            .get(from)
            .copied()
            .flatten()
            .ok_or(io::ErrorKind::NotFound)?;
        machine.operate(false, |machine| {
            let change = NameChange::Rename(from.into(), to.into(), id);
            change.apply(&mut machine.names);
            machine.pending.push(change);
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut machine = self.machine();
        machine
            .names
            .get(path)
            .copied()
            .flatten()
            .ok_or(io::ErrorKind::NotFound)?;
        machine.operate(false, |machine| {
            machine.names.remove(path);
            machine.pending.push(NameChange::Unlink(path.into()));
        })
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut machine = self.machine();
        match machine.verdict(false) {
            Verdict::Go => machine.sync_dir(dir),
            // Not done: what of it survived, the crash chooses.
            Verdict::Last => return Err(io::Error::other("the power was cut")),
            Verdict::Fail(e) => return Err(e),
        }
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.machine().files[self.id].live.len() as u64)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let machine = self.disk.machine();
        let live = &machine.files[self.id].live;
        let start = live.len().min(offset as usize);
        let len = buf.len().min(live.len() - start);
        buf[..len].copy_from_slice(&live[start..start + len]);
        Ok(len)
    }

    fn write_at(&self, offset: u64, slices: &[&[u8]]) -> io::Result<()> {
        let mut machine = self.disk.machine();
        let mut data = slices.concat();
        match machine.verdict(true) {
            Verdict::Go => machine.change(self.id, Change::Write(offset as usize, data)),
            Verdict::Last => {
                machine.change(self.id, Change::Write(offset as usize, data));
                return Err(io::Error::other("the power was cut"));
            }
            Verdict::Fail(e) => {
                // A write that fails may have done a part of its work.
                if !machine.off {
                    data.truncate(data.len() / 2);
                    machine.change(self.id, Change::Write(offset as usize, data));
                }
                return Err(e);
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut machine = self.disk.machine();
        machine.operate(true, |machine| {
            machine.change(self.id, Change::Len(len as usize))
        })
    }

    fn sync(&self) -> io::Result<()> {
        let mut machine = self.disk.machine();
        match machine.verdict(false) {
            Verdict::Go => machine.files[self.id].sync(),
            Verdict::Last => return Err(io::Error::other("the power was cut")),
            Verdict::Fail(e) => {
                if !machine.off {
                    // Pages marked clean that never reached the disk: readable, and lost.
                    machine.files[self.id].pending.clear();
                }
                return Err(e);
            }
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        let mut machine = self.disk.machine();
        machine.operate(false, |machine| {
            machine.change(self.id, Change::Punch(offset as usize, len as usize))
        })?;
        Ok(true)
    }
}

/// A set of operations to try: all of them, or an even choice of at most `most`.
pub fn choose(operations: u64, most: u64) -> BTreeSet<u64> {
    let step = operations.div_ceil(most).max(1);
    (0..operations).step_by(step as usize).collect()
}
