//! Our own legs: a publisher and a machine that has the first of some versions and pulls the last.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use capsule_chunker::layer::encode::Effort;
use capsule_node::control::{CapsuleRef, Export, Publish, Published, Pull, Pulled};
use capsule_tests::{Fleet, Node, data};
use serde::Serialize;

use super::Found;
use super::image::tell;
use crate::capsule::{self, pid};
use crate::measure::{Family, loopback_bytes, sync_file_system};
use crate::process::{Cost, Deadline};
use crate::transfer::same_content;

/// The channel of all legs.
const CHANNEL: &str = "lab";

/// What only our own legs tell.
#[derive(Debug, Clone, Serialize)]
pub struct Ours {
    /// Verified bytes as `pull` tells them.
    pub fetched_bytes: u64,
    /// Of these, manifest and indexes.
    pub metadata_bytes: u64,
    /// Bytes of packs that were published.
    pub pack_bytes: u64,
    /// Bytes of new content that is neither zero nor what the older version has in the same place (of a tree: anywhere), of all
    /// layers.
    pub changed_bytes: u64,
    /// Bytes of new content that its older version has in another place.
    pub copied_bytes: u64,
    /// Bytes of new content that are not zero.
    pub written_bytes: u64,
    /// Writing the new version out; none where that was not asked for.
    pub export: Option<Cost>,
}

/// How a leg publishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// How hard to compress.
    pub effort: Effort,
    /// Without what lies in free blocks.
    pub trim: bool,
}

impl Way {
    /// At an effort, all as it lies.
    pub const fn of(effort: Effort) -> Self {
        Self {
            effort,
            trim: false,
        }
    }

    /// Its name in tables.
    pub fn name(self) -> String {
        let trim = if self.trim { ", --trim" } else { "" };
        format!("capsule, {:?}{trim}", self.effort).to_lowercase()
    }
}

/// Two nodes: one publishes, the other pulls.
pub struct Lab {
    fleet: Fleet,
    deadline: Deadline,
}

impl Lab {
    /// Starts both.
    pub fn start(deadline: &Deadline) -> Result<Self> {
        let fleet = Fleet::of(2);
        fleet[1].wait_for_peers(1);
        Ok(Self {
            fleet,
            deadline: deadline.clone(),
        })
    }

    /// Publishes against the version before, if there is one.
    pub fn publish(&self, path: &Path, version: u32, way: Way) -> Result<(Published, Cost)> {
        let name = format!("{CHANNEL}:{version}")
            .parse()
            .context("the name is a good one")?;
        let request = Publish {
            effort: way.effort,
            trim: way.trim,
            ..Publish::of(path, name)
        };
        sync_file_system(self.fleet.dir())?;
        let node = &self.fleet[0];
        cost(&[node], || {
            capsule::ask(node, "publishing", request, &self.deadline, drop)
        })
    }

    /// Pulls a version; also tells what crossed the network meanwhile, and what both ends used.
    pub fn pull(&self, version: u32) -> Result<(Pulled, u64, Cost)> {
        self.pull_like(version, None)
    }

    /// The same with local data in which to look for what is wanted.
    pub fn pull_like(&self, version: u32, like: Option<&Path>) -> Result<(Pulled, u64, Cost)> {
        sync_file_system(self.fleet.dir())?;
        let node = &self.fleet[1];
        let before = loopback_bytes();
        let (pulled, cost) = cost(&[node, &self.fleet[0]], || {
            let capsule = CapsuleRef(format!("{CHANNEL}:{version}"));
            capsule::ask(
                node,
                "the pull",
                Pull {
                    capsule,
                    wait: None,
                    like_path: like.map(Path::to_owned),
                    like_capsule: None,
                },
                &self.deadline,
                drop,
            )
        })?;
        Ok((pulled, loopback_bytes() - before, cost))
    }

    /// Writes a pulled version out; it must be what was published.
    fn export(&self, version: u32, source: &Path, trimmed: bool) -> Result<Cost> {
        let node = &self.fleet[1];
        let to = self.fleet.path("export");
        let export = Export {
            capsule: CapsuleRef(format!("{CHANNEL}:{version}")),
            to: to.clone(),
            component: None,
            force: false,
        };
        let (_, cost) = cost(&[node], || {
            capsule::ask(node, "the export", export, &self.deadline, drop)
        })?;
        if trimmed {
            // Other than the source where that holds what was deleted: a whole file system it must be.
            tell(Command::new("e2fsck").args(["-f", "-n"]).arg(&to))?;
        } else {
            same(source, &to)?;
        }
        remove(&to)?;
        Ok(cost)
    }
}

/// Does something; tells what nodes used meanwhile.
fn cost<T>(nodes: &[&Node], work: impl FnOnce() -> Result<T>) -> Result<(T, Cost)> {
    let mut families: Vec<Family> = nodes.iter().map(|node| Family::watch(pid(node))).collect();
    let started = Instant::now();
    let done = work()?;
    let wall_seconds = started.elapsed().as_secs_f64();
    families.iter_mut().for_each(Family::look);
    let mut used = crate::measure::Used::default();
    for family in &families {
        used.cpu_seconds += family.used().cpu_seconds;
        used.peak_bytes = used.peak_bytes.max(family.used().peak_bytes);
    }
    Ok((done, Cost { wall_seconds, used }))
}

/// Publishes versions one after the other, and pulls the last onto a machine that has the first.
pub fn update(versions: &[PathBuf], way: Way, deadline: &Deadline) -> Result<Found> {
    let (first, rest) = versions.split_first().context("a version")?;
    let lab = Lab::start(deadline)?;
    // How the machine came by the first is not measured.
    let fast = Way {
        effort: Effort::Fast,
        ..way
    };
    lab.publish(first, 1, fast)?;
    lab.pull(1)?;
    let mut make: Option<Cost> = None;
    let mut changed_bytes = 0;
    let mut last = None;
    for (version, path) in (2..).zip(rest) {
        let (published, cost) = lab.publish(path, version, way)?;
        make = Some(make.map_or(cost, |before| add(before, cost)));
        changed_bytes += changed(&published);
        last = Some((published, version, path));
    }
    let (published, version, path) = last.context("a second version")?;
    let (pulled, bytes, apply) = lab.pull(version)?;
    ensure!(
        bytes >= pulled.fetched_bytes,
        "only {bytes} bytes crossed the network of {} that were fetched",
        pulled.fetched_bytes
    );
    let export = lab.export(version, path, way.trim)?;
    Ok(Found {
        bytes,
        make,
        apply: Some(apply),
        ours: Some(Ours {
            export: Some(export),
            changed_bytes,
            ..ours(&published, &pulled)
        }),
    })
}

/// Pulls onto a machine that has nothing, or only another image.
pub fn newcomer(image: &Path, like: Option<&Path>, deadline: &Deadline) -> Result<Found> {
    let lab = Lab::start(deadline)?;
    let way = Way::of(Effort::Default);
    let (published, make) = lab.publish(image, 1, way)?;
    let (pulled, bytes, apply) = lab.pull_like(1, like)?;
    let export = lab.export(1, image, false)?;
    Ok(Found {
        bytes,
        make: Some(make),
        apply: Some(apply),
        ours: Some(Ours {
            export: Some(export),
            ..ours(&published, &pulled)
        }),
    })
}

/// What an answer tells, without an export.
pub fn ours(published: &Published, pulled: &Pulled) -> Ours {
    let written = published.content_bytes - published.zero_bytes;
    Ours {
        fetched_bytes: pulled.fetched_bytes,
        metadata_bytes: pulled.planning_bytes,
        pack_bytes: published.pack_bytes,
        changed_bytes: changed(published),
        copied_bytes: published.copied_bytes,
        written_bytes: written,
        export: None,
    }
}

/// A tree inherits nothing: all that stays is copied, since its files have no places of their own.
fn changed(published: &Published) -> u64 {
    let new = published.content_bytes - published.zero_bytes - published.inherited_bytes;
    let is_tree = published.components.iter().any(|part| part.kind == "tree");
    if is_tree {
        new - published.copied_bytes
    } else {
        new
    }
}

fn add(first: Cost, second: Cost) -> Cost {
    Cost {
        wall_seconds: first.wall_seconds + second.wall_seconds,
        used: crate::measure::Used {
            cpu_seconds: first.used.cpu_seconds + second.used.cpu_seconds,
            peak_bytes: first.used.peak_bytes.max(second.used.peak_bytes),
        },
    }
}

/// Fails unless a file or a directory came out as it went in.
pub fn same(source: &Path, target: &Path) -> Result<()> {
    if source.is_dir() {
        return data::compare_trees(source, target)
            .map_err(|difference| anyhow!("other than the source: {difference}"));
    }
    same_content(source, target)
}

/// Removes a file or a directory.
pub fn remove(path: &Path) -> Result<()> {
    if path.is_dir() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    }
    .with_context(|| format!("removing {}", path.display()))
}
