//! The names of a mounted capsule: which inode is what, and what is in which directory.
//!
//! Inode 1 is the root. Of a capsule that is one tree, it is that tree's; else it has an entry by each component, a file or a directory. Inodes
//! of a tree follow from positions in its listing, so that they are the same at every mount.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use capsule_proto::listing::{Entry, EntryKind, Listing};
use fuser::{FileAttr, FileType, INodeNo};

use crate::disk::Disk;

/// Blocks in which sizes are told.
const BLOCK: u64 = 512;
/// Reads of a file are best of so many bytes: as much as a frame of a disk has.
const BEST_READ: u32 = 64 << 10;

/// What a component is mounted as.
pub enum Shown {
    /// A file.
    Stream(Arc<dyn Disk>),
    /// A directory, with what its files hold.
    Tree(Listing, Option<Arc<dyn Disk>>),
}

/// See the module.
pub struct Names {
    parts: Vec<Part>,
    /// Entries of the root, where it is no tree's, sorted; each with its part.
    root: Option<Vec<(String, usize)>>,
    /// Who the files that no listing tells of belong to.
    owner: (u32, u32),
}

/// A component, and its inodes.
struct Part {
    /// Its first inode.
    first: u64,
    shown: Content,
}

enum Content {
    Stream(Arc<dyn Disk>),
    Tree(Box<Tree>),
}

struct Tree {
    listing: Listing,
    contents: Option<Arc<dyn Disk>>,
    /// By position in the listing: where a file's bytes begin in the contents.
    starts: HashMap<u32, u64>,
    /// By position of a directory: what is in it, sorted by name.
    children: HashMap<u32, Vec<u32>>,
    /// By position of a directory: the one that it is in.
    parents: HashMap<u32, u32>,
    /// By position of what has more names than one: how many.
    links: HashMap<u32, u32>,
}

/// Something that has an inode.
pub struct Found<'a> {
    /// What `stat` tells of it.
    pub attr: FileAttr,
    /// What it is.
    pub kind: Kind<'a>,
    /// Its entry in a listing.
    pub entry: Option<&'a Entry>,
}

/// What has an inode.
pub enum Kind<'a> {
    /// A directory.
    Directory,
    /// A file: bytes from there on, as many as its length.
    File(Option<&'a Arc<dyn Disk>>, u64),
    /// A symbolic link's target.
    Symlink(&'a [u8]),
    /// A device or another thing without bytes.
    Special,
}

impl Names {
    /// Of a capsule's components.
    pub fn new(components: Vec<(String, Shown)>, owner: (u32, u32)) -> Self {
        let lone = matches!(&components[..], [(_, Shown::Tree(..))]);
        let (mut parts, mut root) = (Vec::new(), Vec::new());
        // A lone tree's root directory is the root itself.
        let mut first = if lone {
            INodeNo::ROOT.0
        } else {
            INodeNo::ROOT.0 + 1
        };
        for (name, shown) in components {
            root.push((name, parts.len()));
            let (count, shown) = match shown {
                Shown::Stream(disk) => (1, Content::Stream(disk)),
                Shown::Tree(listing, contents) => {
                    let count = listing.entries().len() as u64;
                    (count, Content::Tree(Box::new(Tree::new(listing, contents))))
                }
            };
            parts.push(Part { first, shown });
            first += count;
        }
        root.sort();
        Self {
            parts,
            root: (!lone).then_some(root),
            owner,
        }
    }

    /// What an inode is.
    pub fn find(&self, inode: u64) -> Option<Found<'_>> {
        if self.root.is_some() && inode == INodeNo::ROOT.0 {
            return Some(Found {
                attr: self.made_up(inode, FileType::Directory, 0),
                kind: Kind::Directory,
                entry: None,
            });
        }
        let (part, at) = self.part(inode)?;
        match &part.shown {
            Content::Stream(disk) => (at == 0).then(|| Found {
                attr: self.made_up(inode, FileType::RegularFile, disk.len()),
                kind: Kind::File(Some(disk), 0),
                entry: None,
            }),
            Content::Tree(tree) => tree.find(at, part.first),
        }
    }

    /// What a directory has by that name: its inode.
    pub fn lookup(&self, directory: u64, name: &OsStr) -> Option<u64> {
        if let Some(root) = self.root.as_ref().filter(|_| directory == INodeNo::ROOT.0) {
            let at = root.binary_search_by(|(other, _)| other.as_bytes().cmp(name.as_bytes()));
            return Some(self.parts[root[at.ok()?].1].first);
        }
        let (part, at) = self.part(directory)?;
        let Content::Tree(tree) = &part.shown else {
            return None;
        };
        let children = tree.children.get(&at)?;
        let name_of = |child: &u32| tree.listing.entries()[*child as usize].path.name();
        let found = children.binary_search_by(|child| name_of(child).cmp(name.as_bytes()));
        Some(part.first + u64::from(tree.target(children[found.ok()?])))
    }

    /// What is in a directory, with the two names that all have: so many from the nth on, each with its inode.
    pub fn list(&self, directory: u64, from: usize, most: usize) -> Option<Vec<(&OsStr, u64)>> {
        type Inside<'a> = Box<dyn Iterator<Item = (&'a OsStr, u64)> + 'a>;
        let top = self.root.as_ref().filter(|_| directory == INodeNo::ROOT.0);
        let (above, inside): (u64, Inside<'_>) = if let Some(root) = top {
            let names = root.iter();
            let entries = names.map(|(name, part)| (OsStr::new(name), self.parts[*part].first));
            (directory, Box::new(entries))
        } else {
            let (part, at) = self.part(directory)?;
            let Content::Tree(tree) = &part.shown else {
                return None;
            };
            let above = tree.parents.get(&at);
            let above = above.map_or(INodeNo::ROOT.0, |above| part.first + u64::from(*above));
            let entries = tree.children.get(&at)?.iter().map(|child| {
                let name = tree.listing.entries()[*child as usize].path.name();
                let inode = part.first + u64::from(tree.target(*child));
                (OsStr::from_bytes(name), inode)
            });
            (above, Box::new(entries))
        };
        let own = [(OsStr::new("."), directory), (OsStr::new(".."), above)];
        Some(
            own.into_iter()
                .chain(inside)
                .skip(from)
                .take(most)
                .collect(),
        )
    }

    /// How many inodes there are, and how many bytes their files hold.
    pub fn totals(&self) -> (u64, u64) {
        let one = |part: &Part| match &part.shown {
            Content::Stream(disk) => (1, disk.len()),
            Content::Tree(tree) => (
                tree.listing.entries().len() as u64,
                tree.contents.as_ref().map_or(0, |contents| contents.len()),
            ),
        };
        let all = self.parts.iter().map(one);
        all.fold((0, 0), |(inodes, bytes), (more, long)| {
            (inodes + more, bytes + long)
        })
    }

    /// The part that has an inode, and its position there.
    fn part(&self, inode: u64) -> Option<(&Part, u32)> {
        let after = self.parts.partition_point(|part| part.first <= inode);
        let part = self.parts.get(after.checked_sub(1)?)?;
        Some((part, u32::try_from(inode - part.first).ok()?))
    }

    /// What no listing tells of.
    fn made_up(&self, inode: u64, kind: FileType, size: u64) -> FileAttr {
        let perm = match kind {
            FileType::Directory => 0o555,
            _ => 0o444,
        };
        attr(inode, kind, size, perm, self.owner, UNIX_EPOCH)
    }
}

impl Tree {
    fn new(listing: Listing, contents: Option<Arc<dyn Disk>>) -> Self {
        let (mut starts, mut start) = (HashMap::new(), 0);
        for (at, size, _) in listing.files() {
            starts.insert(at as u32, start);
            start += size;
        }
        let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
        let (mut parents, mut links) = (HashMap::new(), HashMap::new());
        // A directory comes right before everything in it: so the last one by its length of path is the one that something is in.
        let mut open: Vec<u32> = Vec::new();
        for (at, entry) in listing.entries().iter().enumerate() {
            let (at, depth) = (at as u32, entry.path.names().count());
            open.truncate(depth);
            let parent = open.last().copied();
            if let Some(parent) = parent {
                children.entry(parent).or_default().push(at);
            }
            match &entry.kind {
                EntryKind::Directory => {
                    children.entry(at).or_default();
                    parents.extend(parent.map(|parent| (at, parent)));
                    open.push(at);
                }
                EntryKind::HardLink { to } => *links.entry(*to).or_insert(1) += 1,
                _ => {}
            }
        }
        let entries = listing.entries();
        for names in children.values_mut() {
            names.sort_by_key(|child| entries[*child as usize].path.name());
        }
        Self {
            listing,
            contents,
            starts,
            children,
            parents,
            links,
        }
    }

    /// What an entry is, if it is another name of something.
    fn target(&self, at: u32) -> u32 {
        match self.listing.entries()[at as usize].kind {
            EntryKind::HardLink { to } => to,
            _ => at,
        }
    }

    fn find(&self, at: u32, first: u64) -> Option<Found<'_>> {
        let entry = self.listing.entries().get(at as usize)?;
        let (kind, what, size) = match &entry.kind {
            EntryKind::Directory => (FileType::Directory, Kind::Directory, 0),
            EntryKind::File { size, .. } => {
                let start = self.starts.get(&at).copied().unwrap_or_default();
                let what = Kind::File(self.contents.as_ref(), start);
                (FileType::RegularFile, what, *size)
            }
            EntryKind::Symlink { target } => {
                let what = Kind::Symlink(target);
                (FileType::Symlink, what, target.len() as u64)
            }
            EntryKind::CharDevice { .. } => (FileType::CharDevice, Kind::Special, 0),
            EntryKind::BlockDevice { .. } => (FileType::BlockDevice, Kind::Special, 0),
            EntryKind::Fifo => (FileType::NamedPipe, Kind::Special, 0),
            EntryKind::Socket => (FileType::Socket, Kind::Special, 0),
            // Nobody is told of their inodes.
            EntryKind::HardLink { .. } => return None,
        };
        let meta = &entry.meta;
        let owner = (meta.uid, meta.gid);
        let mut attr = attr(
            first + u64::from(at),
            kind,
            size,
            meta.mode,
            owner,
            time(meta.mtime),
        );
        if let EntryKind::CharDevice { major, minor } | EntryKind::BlockDevice { major, minor } =
            entry.kind
        {
            attr.rdev = device(major, minor);
        }
        match kind {
            FileType::Directory => {
                let inside = self.children.get(&at).into_iter().flatten();
                let below = inside.filter(|child| self.children.contains_key(child));
                attr.nlink = 2 + below.count() as u32;
            }
            _ => attr.nlink = self.links.get(&at).copied().unwrap_or(1),
        }
        Some(Found {
            attr,
            kind: what,
            entry: Some(entry),
        })
    }
}

fn attr(
    inode: u64,
    kind: FileType,
    size: u64,
    perm: u16,
    (uid, gid): (u32, u32),
    time: SystemTime,
) -> FileAttr {
    FileAttr {
        ino: INodeNo(inode),
        size,
        blocks: size.div_ceil(BLOCK),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm,
        nlink: 1 + u32::from(kind == FileType::Directory),
        uid,
        gid,
        rdev: 0,
        blksize: BEST_READ,
        flags: 0,
    }
}

/// A time as listings have it.
fn time((seconds, nanos): (i64, u32)) -> SystemTime {
    let nanos = Duration::from_nanos(nanos.into());
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let time = match seconds {
        0.. => UNIX_EPOCH.checked_add(whole),
        _ => UNIX_EPOCH.checked_sub(whole),
    };
    time.and_then(|time| time.checked_add(nanos))
        .unwrap_or(UNIX_EPOCH)
}

/// A device's number as the kernel's FUSE protocol has it: 12 bits of the major one, 20 of the minor one.
const fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

#[cfg(test)]
mod tests;
