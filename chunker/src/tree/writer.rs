//! Writing a tree's regular files from its contents, which come in order.
//!
//! Small files are gathered into batches and written by a few threads, as each costs more in system calls than in bytes;
//! large ones are written and hashed as they come, by the thread that brings them. Every file is checked against its hash before it gets
//! its name. Memory: at most [`BATCH_LEN`] plus one small file a batch, and two batches a thread. What has no content is made in `finish`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use capsule_proto::RootHash;
use capsule_proto::listing::{Entry, Listing};
use rustix::io::Errno;

use super::existing;
use super::finish;
use super::meta;
use super::place::{self, Partial, Target};
use super::restore::{RestoreError, RestoreOptions, Restored};
use super::root::{Parents, Root};
use super::workers::{Batch, Workers, finish_file};
use crate::content::Progress;
use crate::layer::restore::Sink;

/// Files up to this length are gathered: for them system calls cost more than a copy of the bytes.
const SMALL_LEN: u64 = 256 << 10;
/// A batch is handed over when it holds so many bytes.
const BATCH_LEN: usize = 1 << 20;
/// Or so many files, as empty ones have no bytes.
const BATCH_FILES: usize = 256;
/// From this length on, hashing in parallel pays.
const PARALLEL_HASH_LEN: usize = 128 << 10;

static ZEROS: [u8; 1 << 18] = [0; 1 << 18];

/// Writes a tree into a directory, from its contents in order.
///
/// [`new`](Self::new), then [`data`](Self::data) and [`zeros`](Self::zeros) for all of [`wanted`](Self::wanted) in order, then
/// [`finish`](Self::finish). Ranges that are not wanted may be handed over too, so that one pass over a layer serves. After an error,
/// or when dropped before `finish`, the files put in place are right, the rest is missing.
pub struct TreeWriter {
    target: Arc<Target>,
    files: Vec<FileAt>,
    len: u64,
    /// The file that holds `position`.
    next: usize,
    position: u64,
    batch: Batch,
    /// Where in the batch the file begins that is being gathered.
    gathering: usize,
    large: Option<Large>,
    workers: Workers,
}

/// Where a regular file lies in the contents.
#[derive(Clone, Copy)]
pub(super) struct FileAt {
    pub start: u64,
    pub entry: u32,
    /// Already right in the directory: its contents are passed over.
    pub keep: bool,
}

/// A large file, in the making.
struct Large {
    partial: Partial,
    file: File,
    hasher: blake3::Hasher,
    /// Whether the file is as long as what came.
    ends_written: bool,
}

#[derive(Clone, Copy)]
enum Piece<'a> {
    Data(&'a [u8]),
    Zeros(u64),
}

impl<'a> Piece<'a> {
    fn len(self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeros(len) => len,
        }
    }

    fn split_at(self, at: u64) -> (Self, Self) {
        match self {
            Self::Data(data) => {
                let (head, tail) = data.split_at(at as usize);
                (Self::Data(head), Self::Data(tail))
            }
            Self::Zeros(len) => (Self::Zeros(at), Self::Zeros(len - at)),
        }
    }
}

impl TreeWriter {
    /// Prepares the directory, which is made if it is missing: makes all directories, finds which files are already right.
    ///
    /// `progress` hears of the bytes compared, and may stop that.
    pub fn new(
        dest: &Path,
        listing: Arc<Listing>,
        options: &RestoreOptions,
        progress: &dyn Progress,
    ) -> Result<Self, RestoreError> {
        let root = open_dest(dest, options.force)?;
        let target = Arc::new(Target::new(root, listing, options.force));
        existing::make_directories(&target)?;
        let (mut files, mut len) = (Vec::new(), 0);
        for (entry, size, _) in target.listing.files() {
            files.push(FileAt {
                start: len,
                entry: entry as u32,
                keep: false,
            });
            len += size;
        }
        if options.force {
            existing::find_kept(&target, &mut files, progress)?;
        }
        let workers = Workers::start(&target);
        Ok(Self {
            target,
            files,
            len,
            next: 0,
            position: 0,
            batch: Batch::default(),
            gathering: 0,
            large: None,
            workers,
        })
    }

    /// The ranges of the contents that are needed, in order: everything for a new directory.
    pub fn wanted(&self) -> Vec<Range<u64>> {
        let mut wanted: Vec<Range<u64>> = Vec::new();
        for at in (0..self.files.len()).filter(|&at| !self.files[at].keep) {
            let range = self.range(at);
            match wanted.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ if range.is_empty() => {}
                _ => wanted.push(range),
            }
        }
        wanted
    }

    /// Takes the next bytes of the contents.
    pub fn data(&mut self, offset: u64, data: &[u8]) -> Result<(), RestoreError> {
        self.take(offset, Piece::Data(data))
    }

    /// Takes a run of zeros, which become a hole where they are long enough.
    pub fn zeros(&mut self, offset: u64, len: u64) -> Result<(), RestoreError> {
        self.take(offset, Piece::Zeros(len))
    }

    /// Completes the tree: links, special files, metadata; then waits until all is durable.
    pub fn finish(mut self) -> Result<Restored, RestoreError> {
        self.pass_to(self.len)?;
        self.pass_empty()?;
        self.send()?;
        if !self.workers.join() {
            return Err(RestoreError::Failed);
        }
        self.target.check()?;
        finish::finish(&self.target)?;
        Ok(self.target.restored())
    }

    fn range(&self, file: usize) -> Range<u64> {
        self.files[file].start..self.files.get(file + 1).map_or(self.len, |next| next.start)
    }

    /// Takes a piece; after a failure nothing more.
    fn take(&mut self, offset: u64, piece: Piece<'_>) -> Result<(), RestoreError> {
        self.target.check()?;
        self.distribute(offset, piece)
            .inspect_err(|_| self.target.fail(RestoreError::Failed))
    }

    /// Gives each file its part of a piece.
    fn distribute(&mut self, offset: u64, piece: Piece<'_>) -> Result<(), RestoreError> {
        self.pass_to(offset)?;
        let mut rest = piece;
        while rest.len() > 0 {
            self.pass_empty()?;
            if self.next == self.files.len() {
                return Err(RestoreError::OutOfOrder {
                    expected: self.len,
                    found: offset + piece.len(),
                });
            }
            let range = self.range(self.next);
            let (part, after) = rest.split_at(rest.len().min(range.end - self.position));
            if !self.files[self.next].keep {
                self.part(range, part)?;
            }
            self.position += part.len();
            self.next += usize::from(self.position == self.range(self.next).end);
            rest = after;
        }
        Ok(())
    }

    /// Goes on to an offset; between here and there only files may lie that are kept.
    fn pass_to(&mut self, offset: u64) -> Result<(), RestoreError> {
        while self.position < offset {
            self.pass_empty()?;
            if self.files.get(self.next).is_none_or(|file| !file.keep) {
                break;
            }
            let range = self.range(self.next);
            self.position = range.end.min(offset);
            self.next += usize::from(self.position == range.end);
        }
        if self.position == offset {
            return Ok(());
        }
        Err(RestoreError::OutOfOrder {
            expected: self.position,
            found: offset,
        })
    }

    /// Gathers the empty files that lie here.
    fn pass_empty(&mut self) -> Result<(), RestoreError> {
        while self.next < self.files.len() && self.range(self.next).is_empty() {
            if !self.files[self.next].keep {
                self.gathered()?;
            }
            self.next += 1;
        }
        Ok(())
    }

    /// Takes part of the file at hand.
    fn part(&mut self, range: Range<u64>, piece: Piece<'_>) -> Result<(), RestoreError> {
        let ends = self.position + piece.len() == range.end;
        if range.end - range.start > SMALL_LEN {
            return self.part_of_large(range, piece, ends);
        }
        match piece {
            Piece::Data(data) => self.batch.bytes.extend_from_slice(data),
            Piece::Zeros(len) => self
                .batch
                .bytes
                .resize(self.batch.bytes.len() + len as usize, 0),
        }
        if ends { self.gathered() } else { Ok(()) }
    }

    /// The file at hand is complete in the batch.
    fn gathered(&mut self) -> Result<(), RestoreError> {
        let end = self.batch.bytes.len();
        self.batch
            .files
            .push((self.files[self.next].entry, self.gathering..end));
        self.gathering = end;
        if end >= BATCH_LEN || self.batch.files.len() >= BATCH_FILES {
            self.send()
        } else {
            Ok(())
        }
    }

    fn send(&mut self) -> Result<(), RestoreError> {
        self.gathering = 0;
        let batch = std::mem::take(&mut self.batch);
        if batch.files.is_empty() || self.workers.send(batch) {
            return Ok(());
        }
        // The threads are gone: one has failed.
        self.target.check()?;
        Err(RestoreError::Failed)
    }

    fn part_of_large(
        &mut self,
        range: Range<u64>,
        piece: Piece<'_>,
        ends: bool,
    ) -> Result<(), RestoreError> {
        let target = self.target.clone();
        let entry = &target.listing.entries()[self.files[self.next].entry as usize];
        let mut large = match self.large.take() {
            Some(large) => large,
            None => Large::begin(&target, entry).map_err(target.failed(entry, "making"))?,
        };
        large
            .take(self.position - range.start, piece)
            .map_err(|e| RestoreError::io(target.root.display(&entry.path), "writing", e))?;
        if ends {
            return large.complete(&target, entry, range.end - range.start);
        }
        self.large = Some(large);
        Ok(())
    }
}

impl Sink for TreeWriter {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        TreeWriter::data(self, offset, bytes).map_err(io::Error::other)
    }

    fn zeros(&mut self, offset: u64, len: u64) -> io::Result<()> {
        TreeWriter::zeros(self, offset, len).map_err(io::Error::other)
    }
}

impl Large {
    fn begin(target: &Target, entry: &Entry) -> Result<Self, Errno> {
        let dir = Parents::new(&target.root).of(&entry.path)?;
        let (partial, file) = target.partial_file(&dir)?;
        Ok(Self {
            partial,
            file,
            hasher: blake3::Hasher::new(),
            ends_written: true,
        })
    }

    fn take(&mut self, offset: u64, piece: Piece<'_>) -> io::Result<()> {
        match piece {
            Piece::Data(data) if data.len() < PARALLEL_HASH_LEN => {
                self.hasher.update(data);
                self.ends_written = place::write_sparse(&self.file, offset, data)?;
            }
            Piece::Data(data) => {
                let Self { hasher, file, .. } = self;
                let (_, written) = rayon::join(
                    || hasher.update_rayon(data),
                    || place::write_sparse(file, offset, data),
                );
                self.ends_written = written?;
            }
            Piece::Zeros(mut len) => {
                self.ends_written = false;
                while len > 0 {
                    let part = len.min(ZEROS.len() as u64);
                    self.hasher.update_rayon(&ZEROS[..part as usize]);
                    len -= part;
                }
            }
        }
        Ok(())
    }

    fn complete(self, target: &Target, entry: &Entry, size: u64) -> Result<(), RestoreError> {
        let hash = RootHash::from_bytes(*self.hasher.finalize().as_bytes());
        finish_file(
            target,
            entry,
            self.partial,
            &self.file,
            hash,
            (!self.ends_written).then_some(size),
        )
    }
}

/// Opens the directory to write, made if it is missing.
fn open_dest(dest: &Path, force: bool) -> Result<Root, RestoreError> {
    if !meta::proc_is_mounted() {
        return Err(RestoreError::NoProc);
    }
    match rustix::fs::mkdir(dest, rustix::fs::Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(RestoreError::io(dest, "making", e)),
    }
    let root = Root::open(dest).map_err(|e| match e {
        Errno::NOTDIR => RestoreError::NotADirectory { path: dest.into() },
        e => RestoreError::io(dest, "opening", e),
    })?;
    if !force
        && !place::names(root.fd())
            .map_err(|e| RestoreError::io(dest, "reading", e))?
            .is_empty()
    {
        return Err(RestoreError::NotEmpty { path: dest.into() });
    }
    Ok(root)
}
