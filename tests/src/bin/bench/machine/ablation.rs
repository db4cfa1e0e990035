//! What each technique saves: what would be left to send until the first command's answer, with one technique after the other.
//!
//! The last step is a real run's. The others are reckoned from what was captured really, page by page, as each technique would have it: no run at
//! 384 kbit/s could wait for 2.5 GiB. Where all but one technique can be had, by switches or by waiting for a pull, that is told too.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::found::{Arrival, Ladder, Layer, Step};
use super::guest::Guest;
use super::moves::UPDATED;
use super::place::{HOME, json};
use super::{Bench, IDLE, SETTLES, STEP, prefetch};
use crate::process::Deadline;
use crate::tools::empty_dir;

/// What is compared.
const PAGE: usize = 4096;
/// What a disk's overlay is made of.
const CLUSTER: u64 = 64 << 10;
/// What is compressed at a time, and how hard: as frames of memory are.
const FRAME: usize = 64 << 10;
const LEVEL: i32 = 3;
/// What is read at a time.
const READ: u64 = 1 << 20;
/// The machine with all of its memory, and the capsule that it becomes.
const PLAIN: &str = "plain";
const PLAIN_IDLE: &str = "plain:idle";

/// Parts of pages, by hash: enough that no two are taken for one.
type Pages = HashSet<[u8; 16]>;

/// A captured machine's components as files.
struct Parts {
    disk: PathBuf,
    ram: PathBuf,
    state: u64,
    /// By component, what is read first.
    reads: BTreeMap<String, Vec<(u64, u64)>>,
}

/// What is left of it, in bytes.
#[derive(Debug, Clone, Copy)]
struct Left {
    raw: u64,
    copy_on_write: u64,
    balloon: u64,
    demand: u64,
    hashing: u64,
    compression: u64,
}

impl Bench<'_> {
    /// The ladders of the first row and of the update; and what all of it takes without one technique.
    pub(super) fn ablation(&mut self) -> Result<()> {
        let first = self
            .found
            .first
            .clone()
            .context("it needs the row `first`")?;
        let idle = self.parts(IDLE, "idle")?;
        let left = idle.left(None, None)?;
        self.add(ladder("the receiver has nothing", left, &first));
        if let Some(update) = self.found.update.clone() {
            let updated = self.parts(UPDATED, "updated")?;
            let left = updated.left(Some(&idle), Some(update.written_bytes))?;
            let title = "the receiver has the capture from before the upgrade";
            self.add(ladder(title, left, &update.arrival));
        }
        self.without(&first)
    }

    /// Adds a ladder, with the seconds that were not measured.
    fn add(&mut self, mut ladder: Ladder) {
        let rate = f64::from(self.found.kbit) * 1e3 / 8.0;
        let reckoned = ladder.steps.iter_mut().filter(|step| !step.is_measured);
        reckoned.for_each(|step| step.seconds = step.bytes as f64 / rate);
        self.found.ablation.push(ladder);
    }

    /// Everything but one technique.
    fn without(&mut self, first: &Arrival) -> Result<()> {
        let whole: u64 = self.found.idle_layers.iter().map(Layer::bytes).sum();
        let plain = self.without_balloon()?;
        let ram = self.found.whole("ram").context("the memory's layer")?;
        self.add(Ladder {
            title: "everything but one technique, the receiver has nothing".to_owned(),
            steps: vec![
                step("all", first.first_bytes, "the first row").measured(first.first_seconds),
                step(
                    "all but demand paging",
                    whole,
                    "`capsule pull` before `machine run`: all layers of the capsule",
                ),
                step(
                    "the same without balloon too",
                    whole - ram + plain,
                    "the memory's layer is that of a real capture with --no-balloon",
                ),
            ],
        });
        Ok(())
    }

    /// Index and pack of the memory of another machine that has booted alike, captured with `--no-balloon`.
    fn without_balloon(&self) -> Result<u64> {
        let deadline = Deadline::after(STEP);
        let image = self.system.image();
        let image = image.to_str().context("the cache's path is UTF-8")?;
        let args = ["--disk", image, "--memory", "512M"];
        let mut guest = Guest::create(self.place.node(HOME), PLAIN, &args, &deadline)?;
        guest.boot(&deadline)?;
        std::thread::sleep(SETTLES);
        guest.capture(PLAIN_IDLE, &["--no-balloon"], &deadline)?;
        guest.remove(&deadline)?;
        let layers = self.layers(HOME, PLAIN_IDLE)?;
        let ram = layers.iter().find(|layer| layer.component == "ram");
        ram.map(Layer::bytes).context("the memory's layer")
    }

    fn parts(&self, capsule: &str, name: &str) -> Result<Parts> {
        let dir = self.setting.scratch.join(name);
        empty_dir(&dir)?;
        let node = self.place.node(HOME);
        let write = |component: &str| -> Result<PathBuf> {
            let to = dir.join(component);
            let at = to
                .to_str()
                .context("the scratch directory's path is UTF-8")?;
            let args = ["export", capsule, "--component", component, "--to", at];
            json(node, &args, &Deadline::after(STEP))?;
            Ok(to)
        };
        Ok(Parts {
            disk: write("disk0")?,
            ram: write("ram")?,
            state: std::fs::metadata(write("state")?)?.len(),
            reads: prefetch(node.home(), capsule)?,
        })
    }
}

impl Parts {
    /// What is left to send to who has nothing, or an older capture; `written` is what the disk's overlays hold, where that is known.
    fn left(&self, older: Option<&Self>, written: Option<u64>) -> Result<Left> {
        let (disk, ram) = (length(&self.disk)?, length(&self.ram)?);
        let copy_on_write = match written {
            Some(written) => written,
            None => clusters(&self.disk)?,
        };
        let mut used = 0;
        visit(&self.ram, &[(0, ram)], |_, _| {
            used += PAGE as u64;
            Ok(())
        })?;
        let mut known = Pages::new();
        let before = older.map(|older| File::open(&older.disk)).transpose()?;
        if let Some(older) = older {
            for path in [&older.disk, &older.ram] {
                visit(path, &[(0, length(path)?)], |_, page| {
                    known.insert(name(page));
                    Ok(())
                })?;
            }
        }
        let (mut demand, mut hashing) = (0, 0);
        let mut frames = Frames::default();
        let mut same = [0; PAGE];
        for (component, path) in [("disk0", &self.disk), ("ram", &self.ram)] {
            let none = Vec::new();
            let ranges = self.reads.get(component).unwrap_or(&none);
            visit(path, ranges, |at, page| {
                // What the overlays do not have is on the disk below, which is there.
                if let Some(before) = before.as_ref().filter(|_| component == "disk0") {
                    before.read_exact_at(&mut same, at)?;
                    if page == same {
                        return Ok(());
                    }
                }
                demand += PAGE as u64;
                if known.insert(name(page)) {
                    hashing += PAGE as u64;
                    frames.add(page)?;
                }
                Ok(())
            })?;
        }
        Ok(Left {
            raw: disk + ram + self.state,
            copy_on_write: copy_on_write + ram + self.state,
            balloon: copy_on_write + used + self.state,
            demand: demand + self.state,
            hashing: hashing + self.state,
            compression: frames.end()? + self.state,
        })
    }
}

fn ladder(title: &str, left: Left, arrival: &Arrival) -> Ladder {
    Ladder {
        title: title.to_owned(),
        steps: vec![
            step("raw", left.raw, "disk, memory and state as they are"),
            step("+ copy-on-write", left.copy_on_write, "of the disk, what was written to it"),
            step("+ balloon", left.balloon, "of the memory, pages that are not zeros"),
            step(
                "+ demand paging",
                left.demand,
                "of both, pages that resuming reads, as its prefetch record has them",
            ),
            step(
                "+ hashing",
                left.hashing,
                "of these, pages that are not at the receiver, each once",
            ),
            step("+ compression", left.compression, "the same as frames of 64 KiB, zstd level 3"),
            step(
                "+ references",
                arrival.first_bytes,
                "the real run: what its interface received, with headers, indexes, records, whole frames, and what came behind",
            )
            .measured(arrival.first_seconds),
        ],
    }
}

/// A step whose time was not measured.
fn step(name: &'static str, bytes: u64, how: &str) -> Step {
    Step {
        name,
        bytes,
        seconds: 0.0,
        is_measured: false,
        how: how.to_owned(),
    }
}

impl Step {
    fn measured(self, seconds: f64) -> Self {
        Self {
            seconds,
            is_measured: true,
            ..self
        }
    }
}

/// What pages compress to.
#[derive(Default)]
struct Frames {
    pending: Vec<u8>,
    bytes: u64,
}

impl Frames {
    fn add(&mut self, page: &[u8]) -> Result<()> {
        self.pending.extend_from_slice(page);
        if self.pending.len() >= FRAME {
            self.compress()?;
        }
        Ok(())
    }

    fn compress(&mut self) -> Result<()> {
        self.bytes += zstd::bulk::compress(&self.pending, LEVEL)?.len() as u64;
        self.pending.clear();
        Ok(())
    }

    fn end(mut self) -> Result<u64> {
        if !self.pending.is_empty() {
            self.compress()?;
        }
        Ok(self.bytes)
    }
}

/// Shows pages that are not zeros, with where they lie.
fn visit(
    path: &Path,
    ranges: &[(u64, u64)],
    mut page: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let file = File::open(path)?;
    let len = length(path)?;
    let mut buffer = Vec::new();
    for &(start, range) in ranges {
        let end = start.saturating_add(range).min(len);
        let mut at = start;
        while at < end {
            let next = end.min(at + READ);
            buffer.resize(usize::try_from(next - at)?, 0);
            file.read_exact_at(&mut buffer, at)?;
            for (found, place) in buffer.chunks(PAGE).zip((at..).step_by(PAGE)) {
                if found.iter().any(|byte| *byte != 0) {
                    page(place, found)?;
                }
            }
            at = next;
        }
    }
    Ok(())
}

/// Bytes of clusters that are not all zeros.
fn clusters(disk: &Path) -> Result<u64> {
    let mut found = HashSet::new();
    visit(disk, &[(0, length(disk)?)], |at, _| {
        found.insert(at / CLUSTER);
        Ok(())
    })?;
    Ok(found.len() as u64 * CLUSTER)
}

fn length(path: &Path) -> Result<u64> {
    let meta = std::fs::metadata(path);
    Ok(meta
        .with_context(|| format!("looking at {}", path.display()))?
        .len())
}

fn name(page: &[u8]) -> [u8; 16] {
    let hash = blake3::hash(page);
    let mut name = [0; 16];
    name.copy_from_slice(&hash.as_bytes()[..16]);
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_technique_leaves_less() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        // Pages: zeros, A, B, A; the memory has B, C, zeros, zeros.
        let pages = |pages: &[u8]| -> Vec<u8> { pages.iter().flat_map(|b| [*b; PAGE]).collect() };
        std::fs::write(path("disk"), pages(&[0, 1, 2, 1])).unwrap();
        std::fs::write(path("ram"), pages(&[2, 3, 0, 0])).unwrap();
        let page = PAGE as u64;
        let reads = [("disk0", (page, 3 * page)), ("ram", (0, 2 * page))];
        let reads = reads.map(|(name, range)| (name.to_owned(), vec![range]));
        let parts = Parts {
            disk: path("disk"),
            ram: path("ram"),
            state: 10,
            reads: reads.into(),
        };
        let left = parts.left(None, None).unwrap();
        assert_eq!(left.raw, 8 * page + 10);
        assert_eq!(left.copy_on_write, CLUSTER + 4 * page + 10);
        assert_eq!(left.balloon, CLUSTER + 2 * page + 10);
        assert_eq!(left.demand, 5 * page + 10);
        assert_eq!(left.hashing, 3 * page + 10);
        assert!(left.compression < page);
        // Against itself nothing of the disk is new, and all pages of the memory are there.
        let left = parts.left(Some(&parts), Some(0)).unwrap();
        assert_eq!((left.demand, left.hashing), (2 * page + 10, 10));
    }
}
