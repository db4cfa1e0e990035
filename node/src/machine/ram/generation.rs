//! What a machine wrote between two stops: a sparse file with the memory's offsets, and what is known of each page.
//!
//! While it is written to, it is a file `generation-N.ram`. When it is sealed, `generation-N.pages` beside it tells which pages it
//! has: 8 bytes that name the format, the number of pages (8 bytes, little-endian), and two bits a page, in words of 8 bytes, little-endian,
//! the first page in the lowest bits (0 inherited, 1 zeros, 2 data). A file without one is left over from a machine that did not stop, and
//! means nothing.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{FallocateFlags, copy_file_range, fallocate};

use super::pages::{PAGE, Page, Pages};

const MAGIC: &[u8; 8] = b"capram1\n";
const HEAD: usize = 16;
const PREFIX: &str = "generation-";
const RAM: &str = ".ram";
const PAGES: &str = ".pages";

/// See the module.
pub struct Generation {
    /// Which it is.
    pub number: u64,
    /// Where its bytes are.
    pub path: PathBuf,
    /// What it says of each page.
    pub pages: Pages,
    file: File,
    /// Pages that the machine wrote.
    data: AtomicU64,
    /// Pages for which the file system had no room. The kernel hands them on once and forgets them, so they are kept here until there is some.
    /// Held shared while others are written or read.
    homeless: RwLock<Homeless>,
}

type Homeless = BTreeMap<u64, Box<[u8]>>;

impl Generation {
    /// A new one, in which nothing is written.
    pub fn create(dir: &Path, number: u64, count: u64) -> io::Result<Self> {
        let path = name(dir, number, RAM);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path)?;
        file.set_len(count * PAGE)?;
        Ok(Self {
            number,
            path,
            pages: Pages::new(count),
            file,
            data: AtomicU64::new(0),
            homeless: RwLock::default(),
        })
    }

    /// One that was sealed.
    fn load(dir: &Path, number: u64, count: u64) -> io::Result<Self> {
        let invalid = |path: &Path, why: &str| {
            let message = format!("{}: {why}", path.display());
            io::Error::new(ErrorKind::InvalidData, message)
        };
        let sidecar = name(dir, number, PAGES);
        let fits = HEAD as u64 + Pages::bytes_of(count);
        if std::fs::metadata(&sidecar)?.len() != fits {
            return Err(invalid(&sidecar, "is of a memory of another size"));
        }
        let bytes = std::fs::read(&sidecar)?;
        let pages = bytes.split_at_checked(HEAD).and_then(|(head, pages)| {
            let known = head == header(count);
            known.then(|| Pages::of_bytes(pages, count)).flatten()
        });
        let pages = pages.ok_or_else(|| invalid(&sidecar, "is damaged"))?;
        let path = name(dir, number, RAM);
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        if file.metadata()?.len() != count * PAGE {
            return Err(invalid(&path, "is of another size than its pages"));
        }
        let data = pages.data().into();
        Ok(Self {
            number,
            path,
            pages,
            file,
            data,
            homeless: RwLock::default(),
        })
    }

    /// Those in a directory that are sealed, oldest first; what is left over there goes.
    pub fn load_all(dir: &Path, count: u64) -> io::Result<Vec<Self>> {
        let mut sealed = Vec::new();
        let mut bytes = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            let Some(file) = path.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            let Some(rest) = file.strip_prefix(PREFIX) else {
                continue;
            };
            let number = |suffix| rest.strip_suffix(suffix)?.parse::<u64>().ok();
            match (number(PAGES), number(RAM)) {
                (Some(number), _) => sealed.push(number),
                (_, Some(number)) => bytes.push(number),
                // Was being written when it ended.
                _ => std::fs::remove_file(&path)?,
            }
        }
        sealed.sort_unstable();
        for number in bytes {
            if sealed.binary_search(&number).is_err() {
                std::fs::remove_file(name(dir, number, RAM))?;
            }
        }
        let load = |number| Self::load(dir, number, count);
        sealed.into_iter().map(load).collect()
    }

    /// Tells what it has, so that it is found again. Nothing is written to it from now on.
    pub fn seal(&self, dir: &Path, count: u64) -> io::Result<()> {
        self.settle()?;
        let coming = name(dir, self.number, ".coming");
        let bytes = [&header(count)[..], &self.pages.bytes()].concat();
        std::fs::write(&coming, bytes)?;
        std::fs::rename(coming, name(dir, self.number, PAGES))
    }

    /// Takes it from the directory; who reads it reads on.
    pub fn remove(&self, dir: &Path) -> io::Result<()> {
        match std::fs::remove_file(name(dir, self.number, PAGES)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => std::fs::remove_file(&self.path),
        }
    }

    /// Bytes of data that the machine wrote.
    pub fn written(&self) -> u64 {
        self.data.load(Ordering::Relaxed) * PAGE
    }

    /// Reads bytes of pages that it has.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let homeless = self.homeless();
        self.file.read_exact_at(into, offset)?;
        let end = offset + into.len() as u64;
        for (page, kept) in homeless.range(offset / PAGE..end.div_ceil(PAGE)) {
            let start = page * PAGE;
            let (from, to) = (start.max(offset), (start + PAGE).min(end));
            into[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&kept[(from - start) as usize..(to - start) as usize]);
        }
        Ok(())
    }

    /// Writes whole pages, which are then `kind`. What the machine wrote is never lost for want of room.
    pub fn put(&self, first: u64, bytes: &[u8], kind: Page) -> io::Result<()> {
        let homeless = self.homeless();
        let written = match homeless.is_empty() {
            true => self.file.write_all_at(bytes, first * PAGE),
            false => Err(ErrorKind::StorageFull.into()),
        };
        drop(homeless);
        match written {
            Ok(()) => {}
            Err(error) if kind == Page::Data && is_full(&error) => {
                let mut homeless = self.homeless_mut();
                for (page, content) in (first..).zip(bytes.chunks(PAGE as usize)) {
                    match self.file.write_all_at(content, page * PAGE) {
                        Ok(()) => drop(homeless.remove(&page)),
                        Err(error) if is_full(&error) => {
                            drop(homeless.insert(page, content.into()))
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
            Err(error) => return Err(error),
        }
        for page in first..first + bytes.len() as u64 / PAGE {
            self.say(page, kind);
        }
        Ok(())
    }

    /// Writes the pages for which there was no room.
    pub fn settle(&self) -> io::Result<()> {
        let mut homeless = self.homeless_mut();
        while let Some(page) = homeless.first_entry() {
            self.file.write_all_at(page.get(), page.key() * PAGE)?;
            page.remove();
        }
        Ok(())
    }

    fn homeless(&self) -> RwLockReadGuard<'_, Homeless> {
        self.homeless.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn homeless_mut(&self) -> RwLockWriteGuard<'_, Homeless> {
        let homeless = self.homeless.write();
        homeless.unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes pages zeros, and gives back what they took.
    pub fn zero(&self, first: u64, end: u64) -> io::Result<()> {
        if !self.homeless().is_empty() {
            self.homeless_mut()
                .retain(|page, _| !(first..end).contains(page));
        }
        let mut took = false;
        for page in first..end {
            took |= matches!(self.say(page, Page::Zero), Page::Data | Page::Clean);
        }
        if took {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(&self.file, how, first * PAGE, (end - first) * PAGE) {
                // A file system that cannot: the room is not given back, and that is all.
                Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Copies pages of data from another one.
    pub fn copy(&self, from: &Self, first: u64, end: u64) -> io::Result<()> {
        let (mut read, mut write) = (first * PAGE, first * PAGE);
        while read < end * PAGE {
            let len = (end * PAGE - read) as usize;
            let some = copy_file_range(
                &from.file,
                Some(&mut read),
                &self.file,
                Some(&mut write),
                len,
            )?;
            if some == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        for page in first..end {
            self.say(page, Page::Data);
        }
        Ok(())
    }

    fn say(&self, page: u64, what: Page) -> Page {
        let before = self.pages.set(page, what);
        match (before == Page::Data, what == Page::Data) {
            (false, true) => _ = self.data.fetch_add(1, Ordering::Relaxed),
            (true, false) => _ = self.data.fetch_sub(1, Ordering::Relaxed),
            _ => {}
        }
        before
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded
    )
}

fn name(dir: &Path, number: u64, suffix: &str) -> PathBuf {
    dir.join(format!("{PREFIX}{number}{suffix}"))
}

fn header(count: u64) -> [u8; HEAD] {
    let mut header = [0; HEAD];
    header[..8].copy_from_slice(MAGIC);
    header[8..].copy_from_slice(&count.to_le_bytes());
    header
}
