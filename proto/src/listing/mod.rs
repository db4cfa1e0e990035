//! Tree listings: what a directory tree is, apart from its files' bytes.
//!
//! A listing is canonical and uncompressed; its BLAKE3 hash names the tree. Entries are sorted so that a
//! directory comes right before everything in it. The tree's *contents* are its regular files' bytes, one after another in
//! listing order; a layer addresses them as one long content. Reading and writing directories belongs to the chunker.
//! Byte-level description: `proto/docs/listing.md`.

mod path;

pub use path::{EntryPath, MAX_DEPTH, MAX_NAME_LEN, MAX_PATH_LEN};

use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::RootHash;
use crate::ranges::MAX_CONTENT_LEN;

const MAGIC: &[u8; 4] = b"CAPT";
const VERSION: u8 = 1;

/// Longest listing, in bytes: about ten million entries.
pub const MAX_LISTING_LEN: usize = 1 << 30;
/// Most extended attributes of an entry.
pub const MAX_XATTRS: usize = 256;
/// Longest extended attribute value, in bytes: Linux's XATTR_SIZE_MAX.
pub const MAX_XATTR_LEN: usize = 64 << 10;
/// Largest sum of the entries' weights ([`Entry::weight`]), about the bytes of memory that they take: paths share their
/// beginnings, so a listing within [`MAX_LISTING_LEN`] could otherwise unfold to hundreds of times its length.
pub const MAX_LISTING_WEIGHT: u64 = 4 << 30;

/// A directory tree's entries, in canonical order; the first is the root directory itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    entries: Vec<Entry>,
}

/// One name in a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it lies, below the root of the tree.
    pub path: EntryPath,
    /// Owner, mode, time and extended attributes. A hard link's are those of the entry it links to, repeated.
    pub meta: Metadata,
    /// What it is.
    pub kind: EntryKind,
}

/// What `stat` tells of an entry, apart from its kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits, set-user-id, set-group-id and sticky: 0 to 0o7777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds since 1970 (may be negative) and nanoseconds below 10^9.
    pub mtime: (i64, u32),
    /// Extended attributes, sorted by name, without repetition.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A regular file: its length in bytes and the BLAKE3 hash of them.
    File {
        /// Length in bytes.
        size: u64,
        /// BLAKE3 hash of the bytes.
        root: RootHash,
    },
    /// A symbolic link, with its target as it is.
    Symlink {
        /// The link's text: 1 to 4,095 bytes without NUL.
        target: Vec<u8>,
    },
    /// Another name of an entry that comes before and is neither a directory nor itself a hard link.
    HardLink {
        /// Position of that entry in the listing.
        to: u32,
    },
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A device of kind "block".
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket's name.
    Socket,
}

impl Entry {
    /// What the entry counts against [`MAX_LISTING_WEIGHT`]: 128, its path's length, and for each extended attribute 64 and
    /// the lengths of name and value.
    pub fn weight(&self) -> u64 {
        let xattr = |(name, value): &(Vec<u8>, Vec<u8>)| 64 + name.len() + value.len();
        (128 + self.path.as_bytes().len() + self.meta.xattrs.iter().map(xattr).sum::<usize>())
            as u64
    }
}

impl Listing {
    /// Checks entries that were read from a directory; they must be in canonical order already, as hard links name positions in it.
    pub fn new(entries: Vec<Entry>) -> Result<Self, DecodeError> {
        let listing = Self { entries };
        // The rules live in one place, the decoder.
        Self::decode(&listing.encode())
    }

    /// The entries, in canonical order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The tree's root hash: the hash of the canonical encoding.
    pub fn root(&self) -> RootHash {
        RootHash::of(&self.encode())
    }

    /// Total bytes of the regular files: the length of the tree's contents.
    pub fn content_size(&self) -> u64 {
        self.files().map(|(_, size, _)| size).sum()
    }

    /// The regular files in order: position of the entry, length and hash.
    pub fn files(&self) -> impl Iterator<Item = (usize, u64, RootHash)> + '_ {
        self.entries
            .iter()
            .enumerate()
            .filter_map(|(i, entry)| match entry.kind {
                EntryKind::File { size, root } => Some((i, size, root)),
                _ => None,
            })
    }

    /// The canonical encoding.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::with_header(MAGIC, VERSION);
        let mut previous: &[u8] = &[];
        writer.list(&self.entries, |w, entry| {
            // Names share long beginnings with the entry before.
            let path = entry.path.as_bytes();
            let shared = path
                .iter()
                .zip(previous)
                .take_while(|(a, b)| a == b)
                .count();
            w.varint(shared as u64);
            w.bytes(&path[shared..]);
            previous = path;
            entry.meta.encode(w);
            entry.kind.encode(w);
        });
        writer.finish()
    }

    /// Parses and checks a listing; accepts only the canonical form.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader =
            Reader::with_header(bytes, MAGIC, VERSION, "tree listing", MAX_LISTING_LEN)?;
        let mut checker = Checker::default();
        // The shortest entry is 9 bytes: two path numbers, six metadata numbers, a kind.
        reader.list("entries", u32::MAX as usize, 9, |r| checker.entry(r))?;
        if checker.entries.is_empty() {
            return Err(reader.invalid("entries", 0, "a listing begins with its root directory"));
        }
        reader.finish()?;
        Ok(Self {
            entries: checker.entries,
        })
    }
}

/// The entries so far, and the rules between them, checked as they are read.
#[derive(Default)]
struct Checker {
    entries: Vec<Entry>,
    /// The directories that the previous entry lies in, or is.
    open: Vec<EntryPath>,
    content: u64,
    weight: u64,
}

impl Checker {
    fn entry(&mut self, r: &mut Reader<'_>) -> Result<(), DecodeError> {
        let start = r.at();
        let path = self.path(r)?;
        let meta = Metadata::decode(r)?;
        let kind = EntryKind::decode(r)?;
        let entry = Entry { path, meta, kind };
        self.rules(&entry).map_err(|why| DecodeError::Invalid {
            what: "entry",
            at: start,
            why,
        })?;
        if entry.kind == EntryKind::Directory {
            self.open.push(entry.path.clone());
        }
        self.entries.push(entry);
        Ok(())
    }

    fn rules(&mut self, entry: &Entry) -> Result<(), &'static str> {
        self.weight += entry.weight();
        if self.weight > MAX_LISTING_WEIGHT {
            return Err("the listing is too large to hold: split the tree into several");
        }
        match entry.kind {
            EntryKind::Directory => Ok(()),
            _ if entry.path.is_root() => Err("the root of a tree is a directory"),
            EntryKind::File { size, .. } => {
                self.content += size;
                if self.content > MAX_CONTENT_LEN {
                    Err("the contents exceed the largest content")
                } else {
                    Ok(())
                }
            }
            EntryKind::HardLink { to } => match self.entries.get(to as usize) {
                Some(linked)
                    if matches!(
                        linked.kind,
                        EntryKind::Directory | EntryKind::HardLink { .. }
                    ) =>
                {
                    Err("a hard link names no directory and no hard link")
                }
                Some(linked) if linked.meta == entry.meta => Ok(()),
                Some(_) => Err("a hard link repeats the metadata of the entry that it names"),
                None => Err("a hard link names an earlier entry"),
            },
            _ => Ok(()),
        }
    }

    fn path(&mut self, r: &mut Reader<'_>) -> Result<EntryPath, DecodeError> {
        let start = r.at();
        let invalid = |why| DecodeError::Invalid {
            what: "path",
            at: start,
            why,
        };
        let previous = self.entries.last().map(|entry| &entry.path);
        let before = previous.map_or(&[][..], |path| path.as_bytes());
        let shared = r.varint("path", before.len() as u64)? as usize;
        let rest = r.bytes("path", MAX_PATH_LEN)?;
        if rest.first().is_some_and(|b| before.get(shared) == Some(b)) {
            return Err(invalid("the shared beginning is not the longest"));
        }
        let path = EntryPath::new([&before[..shared], rest].concat()).map_err(invalid)?;
        match previous {
            None if path.is_root() => return Ok(path),
            None => return Err(invalid("a listing begins with its root directory")),
            Some(previous) if *previous >= path => {
                return Err(invalid("paths are sorted, without repetition"));
            }
            Some(_) => {}
        }
        let parent = path
            .parent()
            .expect("a path after the first is not the root");
        // In canonical order a directory that was left never comes back.
        while self.open.last().is_some_and(|dir| *dir != parent) {
            self.open.pop();
        }
        if self.open.is_empty() {
            return Err(invalid(
                "an entry lies in a directory that is listed before it",
            ));
        }
        Ok(path)
    }
}

impl Metadata {
    fn encode(&self, w: &mut Writer) {
        w.varint(self.mode.into());
        w.varint(self.uid.into());
        w.varint(self.gid.into());
        w.signed(self.mtime.0);
        w.varint(self.mtime.1.into());
        w.list(&self.xattrs, |w, (name, value)| {
            w.bytes(name);
            w.bytes(value);
        });
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mode = r.varint("mode", 0o7777)? as u16;
        let uid = r.varint("uid", u32::MAX.into())? as u32;
        let gid = r.varint("gid", u32::MAX.into())? as u32;
        let mtime = (
            r.signed("mtime")?,
            r.varint("mtime nanoseconds", 999_999_999)? as u32,
        );
        let start = r.at();
        let xattrs = r.list("xattrs", MAX_XATTRS, 2, |r| {
            Ok((
                r.bytes("xattr name", MAX_NAME_LEN)?.to_vec(),
                r.bytes("xattr value", MAX_XATTR_LEN)?.to_vec(),
            ))
        })?;
        if !xattrs.is_sorted_by(|(a, _), (b, _)| a < b)
            || xattrs
                .iter()
                .any(|(name, _)| name.is_empty() || name.contains(&0))
        {
            return Err(r.invalid(
                "xattrs",
                start,
                "names are not empty, without NUL, sorted, without repetition",
            ));
        }
        Ok(Self {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        })
    }
}

impl EntryKind {
    fn encode(&self, w: &mut Writer) {
        let mut device = |tag, major: &u32, minor: &u32| {
            w.u8(tag);
            w.varint((*major).into());
            w.varint((*minor).into());
        };
        match self {
            Self::CharDevice { major, minor } => device(4, major, minor),
            Self::BlockDevice { major, minor } => device(5, major, minor),
            Self::Directory => w.u8(0),
            Self::File { size, root } => {
                w.u8(1);
                w.varint(*size);
                w.hash(root);
            }
            Self::Symlink { target } => {
                w.u8(2);
                w.bytes(target);
            }
            Self::HardLink { to } => {
                w.u8(3);
                w.varint((*to).into());
            }
            Self::Fifo => w.u8(6),
            Self::Socket => w.u8(7),
        }
    }

    fn decode(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let start = r.at();
        let number = |r: &mut Reader<'_>| {
            Ok::<_, DecodeError>(r.varint("device number", u32::MAX.into())? as u32)
        };
        Ok(match r.u8("entry kind")? {
            0 => Self::Directory,
            1 => Self::File {
                size: r.varint("file size", MAX_CONTENT_LEN)?,
                root: r.hash("file hash")?,
            },
            2 => {
                let target = r.bytes("symlink target", MAX_PATH_LEN - 1)?.to_vec();
                if target.is_empty() || target.contains(&0) {
                    return Err(r.invalid(
                        "symlink target",
                        start,
                        "the target is not empty and has no NUL byte",
                    ));
                }
                Self::Symlink { target }
            }
            3 => Self::HardLink {
                to: r.varint("hard link", u32::MAX.into())? as u32,
            },
            4 => Self::CharDevice {
                major: number(r)?,
                minor: number(r)?,
            },
            5 => Self::BlockDevice {
                major: number(r)?,
                minor: number(r)?,
            },
            6 => Self::Fifo,
            7 => Self::Socket,
            _ => return Err(r.invalid("entry kind", start, "kinds are 0 to 7")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(path: &str) -> Entry {
        Entry {
            path: EntryPath::new(path).unwrap(),
            meta: Metadata::default(),
            kind: EntryKind::Directory,
        }
    }

    fn file(path: &str) -> Entry {
        Entry {
            kind: EntryKind::File {
                size: 3,
                root: RootHash::of(b"abc"),
            },
            ..dir(path)
        }
    }

    #[test]
    fn a_directory_comes_right_before_its_content() {
        let listing = Listing::new(vec![
            dir(""),
            dir("a"),
            file("a/x"),
            file("a-b"),
            file("ab"),
        ])
        .unwrap();
        assert_eq!(Listing::decode(&listing.encode()), Ok(listing.clone()));
        assert_eq!(listing.content_size(), 9);
        assert!(Listing::new(vec![dir(""), dir("a"), file("a-b"), file("a/x")]).is_err());
    }

    #[test]
    fn an_entry_lies_in_a_directory_of_the_listing() {
        // Not below a file, a symlink, or nothing.
        let link = Entry {
            kind: EntryKind::Symlink {
                target: b"/etc".into(),
            },
            ..dir("l")
        };
        assert!(Listing::new(vec![dir(""), link, file("l/passwd")]).is_err());
        assert!(Listing::new(vec![dir(""), file("f"), file("f/x")]).is_err());
        assert!(Listing::new(vec![dir(""), file("missing/x")]).is_err());
        assert!(Listing::new(vec![file("x")]).is_err());
        assert!(Listing::new(vec![]).is_err());
    }

    #[test]
    fn hard_links_point_back() {
        let link = |to| Entry {
            kind: EntryKind::HardLink { to },
            ..dir("z")
        };
        assert!(Listing::new(vec![dir(""), file("a"), link(1)]).is_ok());
        for to in [0, 2, 3] {
            assert!(
                Listing::new(vec![dir(""), file("a"), link(to)]).is_err(),
                "{to}"
            );
        }
        // One file has one metadata, or the same tree would have several listings.
        let other = Entry {
            meta: Metadata {
                mode: 0o600,
                ..Metadata::default()
            },
            ..link(1)
        };
        assert!(Listing::new(vec![dir(""), file("a"), other]).is_err());
        let again = Entry {
            kind: EntryKind::HardLink { to: 2 },
            ..dir("zz")
        };
        assert!(Listing::new(vec![dir(""), file("a"), link(1), again]).is_err());
    }

    // Long paths cost a few bytes each where they share their beginning: they must not unfold without bound.
    #[test]
    fn shared_beginnings_cannot_unfold_without_bound() {
        // The rule counts; unfolding 4 GiB in a test would not tell more.
        let mut checker = Checker {
            weight: MAX_LISTING_WEIGHT - file("x").weight(),
            ..Checker::default()
        };
        assert_eq!(checker.rules(&file("x")), Ok(()));
        assert!(checker.rules(&file("x")).is_err());
    }
}
