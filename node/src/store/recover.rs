//! Opening: what the last run left, whole or cut short, is brought back to one truth.
//!
//! The database decides. Files that it does not know are leftovers of an import, a fetch or a removal
//! that did not end, and go; what it knows and the files cannot hold is taken out of it. Contents are not
//! read here: they are checked when they are served, and by `Store::verify`.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};

use capsule_chunker::bao::outboard_len;
use capsule_proto::ranges::{group_bytes, group_count};
use capsule_proto::{GroupRanges, RootHash};

use super::blob::{BLOBS_DIR, Part, is_small};
use super::disk::Disk;
use super::error::{IoFault, OpenError};
use super::import::TMP_DIR;
use super::meta::{BLOBS, COMPONENTS, META_NEW, Meta, SMALL, rows};
use super::reached::{Reached, all_reached, is_whole, key_of};
use super::rows::{BlobRow, ComponentRow, Row};

/// What opening found and put right.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Temporary files and files without a row that were removed.
    pub removed: Vec<PathBuf>,
    /// Blobs and components whose files are missing or too short, with the groups that were lost: not a
    /// crash, but somebody or something else at the files.
    pub lost: Vec<(RootHash, GroupRanges)>,
}

/// The truth about blobs and components after opening.
pub(super) struct Recovered {
    pub blobs: BTreeMap<RootHash, BlobRow>,
    pub components: BTreeMap<RootHash, ComponentRow>,
    pub recovery: Recovery,
}

/// Lengths of the files that there are.
type Files = HashMap<(RootHash, Part), u64>;

/// Makes the directories. Their names are durable before anything is put in them.
pub(super) fn make_directories(disk: &dyn Disk) -> Result<(), IoFault> {
    let make = |dir: &Path| {
        disk.create_dir(dir)
            .map_err(|e| IoFault::new("create", dir, e))
    };
    let sync = |dir: &Path| disk.sync_dir(dir).map_err(|e| IoFault::new("sync", dir, e));
    make(Path::new(TMP_DIR))?;
    make(Path::new(BLOBS_DIR))?;
    for byte in 0..=u8::MAX {
        make(&blob_dir(byte))?;
    }
    sync(Path::new(BLOBS_DIR))?;
    sync(Path::new(""))
}

/// Compares the database with the files, and puts both right.
pub(super) fn recover(disk: &dyn Disk, meta: &Meta) -> Result<Recovered, OpenError> {
    let mut recovery = Recovery::default();
    clear_tmp(disk, &mut recovery)?;
    let (blobs, components, small, reached) = meta.read(|tx| {
        let small = tx.open_table(SMALL)?;
        let mut lens = HashMap::new();
        for entry in redb::ReadableTable::iter(&small)? {
            let (key, value) = entry?;
            lens.insert(
                RootHash::from_bytes(*key.value()),
                value.value().len() as u64,
            );
        }
        Ok((
            rows::<BlobRow>(tx, BLOBS)?,
            rows::<ComponentRow>(tx, COMPONENTS)?,
            lens,
            all_reached(tx)?,
        ))
    })?;
    let mut blobs: BTreeMap<_, _> = blobs
        .into_iter()
        .map(|(k, v)| (RootHash::from_bytes(k), v))
        .collect();
    let mut components: BTreeMap<_, _> = components
        .into_iter()
        .map(|(k, v)| (RootHash::from_bytes(k), v))
        .collect();
    let files = files(
        disk,
        |root, part| match part {
            Part::Data | Part::Tree => blobs.get(root).is_some_and(|row| !is_small(row.size)),
            Part::Component => components.contains_key(root),
        },
        &mut recovery,
    )?;

    let mut changed = Vec::new();
    for (root, row) in &mut blobs {
        let lost = lost_groups(root, row, &files, small.get(root).copied());
        if !lost.is_empty() {
            row.ranges = row.ranges.difference(&lost);
            changed.push(*root);
            recovery.lost.push((*root, lost));
        }
    }
    let lost_components: Vec<_> = components
        .iter()
        .filter(|(root, row)| component_lost(root, row, &files, (&blobs, &reached)))
        .map(|(root, row)| (*root, row.ranges.clone()))
        .collect();
    lost_components
        .iter()
        .for_each(|(root, _)| drop(components.remove(root)));
    write_back(meta, &blobs, &changed, &lost_components)?;
    recovery.lost.extend(lost_components);
    Ok(Recovered {
        blobs,
        components,
        recovery,
    })
}

fn blob_dir(byte: u8) -> PathBuf {
    Path::new(BLOBS_DIR).join(format!("{byte:02x}"))
}

fn clear_tmp(disk: &dyn Disk, recovery: &mut Recovery) -> Result<(), IoFault> {
    let dir = Path::new(TMP_DIR);
    for entry in disk.list(dir).map_err(|e| IoFault::new("list", dir, e))? {
        remove(disk, dir.join(entry.name), recovery)?;
    }
    // A database that was not finished; `meta` has already begun another, or had one.
    match disk.remove(Path::new(META_NEW)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(IoFault::new("remove", META_NEW, e)),
        _ => Ok(()),
    }
}

fn remove(disk: &dyn Disk, path: PathBuf, recovery: &mut Recovery) -> Result<(), IoFault> {
    disk.remove(&path)
        .map_err(|e| IoFault::new("remove", &path, e))?;
    recovery.removed.push(path);
    Ok(())
}

/// Lists the files; those that are not known are removed, names that are not ours left alone.
fn files(
    disk: &dyn Disk,
    known: impl Fn(&RootHash, Part) -> bool,
    recovery: &mut Recovery,
) -> Result<Files, IoFault> {
    let mut files = Files::new();
    for byte in 0..=u8::MAX {
        let dir = blob_dir(byte);
        for entry in disk.list(&dir).map_err(|e| IoFault::new("list", &dir, e))? {
            match Part::of_name(&entry.name) {
                Some((root, part)) if known(&root, part) => {
                    files.insert((root, part), entry.len);
                }
                Some(_) => remove(disk, dir.join(entry.name), recovery)?,
                None => {}
            }
        }
    }
    Ok(files)
}

/// Groups of a row that its files are too short to hold.
fn lost_groups(root: &RootHash, row: &BlobRow, files: &Files, small: Option<u64>) -> GroupRanges {
    let all = || row.ranges.clone();
    if is_small(row.size) {
        return if small == Some(row.size) {
            GroupRanges::new()
        } else {
            all()
        };
    }
    // The outboard may be sparse, but its root pair is there as soon as any group is.
    let tree = files.get(&(*root, Part::Tree)).copied().unwrap_or(0);
    let Some(data) = files
        .get(&(*root, Part::Data))
        .copied()
        .filter(|_| tree >= 64)
    else {
        return all();
    };
    let mut lost = GroupRanges::new();
    let beyond = data / capsule_proto::GROUP_LEN..group_count(row.size);
    // The group that the file ends in is whole if it is the last and the blob ends there too.
    let whole_end = data >= group_bytes(&beyond, row.size).end;
    if !whole_end {
        lost = row.ranges.intersection(&GroupRanges::from(beyond));
    }
    lost
}

/// A component needs its outboard, and what it takes of its layers.
fn component_lost(
    root: &RootHash,
    row: &ComponentRow,
    files: &Files,
    (blobs, reached): (&BTreeMap<RootHash, BlobRow>, &BTreeMap<RootHash, Reached>),
) -> bool {
    let outboard = files.get(&(*root, Part::Component)).copied();
    let here = |blob: &RootHash| {
        let row = blobs.get(blob)?;
        let complete = row.ranges.contains_run(&(0..group_count(row.size)));
        Some((row.ranges.clone(), complete))
    };
    let layers = &row.component.recipe.layers;
    outboard != Some(outboard_len(row.component.size))
        || !is_whole(layers, reached.get(&key_of(layers)), here)
}

fn write_back(
    meta: &Meta,
    blobs: &BTreeMap<RootHash, BlobRow>,
    changed: &[RootHash],
    lost_components: &[(RootHash, GroupRanges)],
) -> Result<(), OpenError> {
    if changed.is_empty() && lost_components.is_empty() {
        return Ok(());
    }
    meta.write(|tx| {
        let (mut rows, mut components) = (tx.open_table(BLOBS)?, tx.open_table(COMPONENTS)?);
        for root in changed {
            rows.insert(root.as_bytes(), &blobs[root].encode()[..])?;
        }
        for (root, _) in lost_components {
            components.remove(root.as_bytes())?;
        }
        Ok(())
    })?;
    Ok(())
}
