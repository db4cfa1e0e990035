//! An index that is read page by page, as ranges of the component are asked for.
//!
//! The index itself may lie anywhere that can be read by offset, and need not be all there: a page that is not there fails
//! with the storage's error when it is wanted. Parsing is `proto::index`'s.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use capsule_proto::codec::DecodeError;
use capsule_proto::index::{Directory, Frame, Reference, Run, RunFrom, Span};
use positioned_io::ReadAt;
use thiserror::Error;

use super::budget::Budget;
use super::cache::Shared;
use super::error::LayerError;

/// First bytes of an index, which tell how long its directory is.
const HEAD_LEN: usize = Directory::HEAD_LEN;

/// Bytes by offset, from many threads.
pub type Storage = Arc<dyn ReadAt + Send + Sync>;

/// What is wrong with an index.
#[derive(Debug, Error)]
pub enum IndexFault {
    /// It could not be read.
    #[error("reading {len} bytes at {at}: {source}")]
    Read {
        /// First byte in the index.
        at: u64,
        /// How many.
        len: usize,
        /// What the storage said.
        source: io::Error,
    },
    /// It is not what its format says.
    #[error("in what begins at byte {at}: {source}")]
    Decode {
        /// First byte in the index of the directory or page.
        at: u64,
        /// What is wrong there.
        source: DecodeError,
    },
    /// A range that is nowhere mentioned, and that no parent has. Parsing refuses pages that leave one; kept so that
    /// reading never makes bytes up.
    #[error("nothing says what bytes {}..{} of the component are", .0.start, .0.end)]
    Missing(Range<u64>),
    /// A frame's id that no page has.
    #[error("there is no frame {0}")]
    NoFrame(u32),
}

/// Where a range of the component comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub range: Range<u64>,
    pub from: PartFrom,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PartFrom {
    Inherited,
    Mentioned(RunFrom),
}

impl Part {
    /// Length in bytes.
    pub const fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Takes the first bytes off.
    pub fn split_off_front(&mut self, len: u64) -> Self {
        let middle = self.range.start + len;
        let front = Self {
            range: self.range.start..middle,
            from: self.from,
        };
        self.range.start = middle;
        self.from = skip(self.from, len);
        front
    }
}

/// What comes so many bytes later.
fn skip(from: PartFrom, by: u64) -> PartFrom {
    match from {
        PartFrom::Mentioned(RunFrom::Copy { source, offset }) => {
            PartFrom::Mentioned(RunFrom::Copy {
                source,
                offset: offset + by,
            })
        }
        // A run that reads beyond its frame is refused when the frame is known; it must not wrap into it.
        PartFrom::Mentioned(RunFrom::Frame { id, offset }) => {
            let offset = u64::from(offset)
                .saturating_add(by)
                .try_into()
                .unwrap_or(u32::MAX);
            PartFrom::Mentioned(RunFrom::Frame { id, offset })
        }
        same => same,
    }
}

/// An index; its pages are kept in the cache.
pub(super) struct Pages {
    storage: Storage,
    directory: Directory,
    cache: Arc<Shared>,
    /// The layer's number in the cache.
    layer: u64,
}

/// A frame's entry in the page that holds it.
#[derive(Clone)]
pub(super) struct FrameEntry {
    page: Arc<Vec<Frame>>,
    at: usize,
}

impl std::ops::Deref for FrameEntry {
    type Target = Frame;

    fn deref(&self) -> &Frame {
        &self.page[self.at]
    }
}

impl FrameEntry {
    /// What decoding needs, without the page.
    pub fn without_spans(&self) -> Frame {
        Frame {
            references: self.references.clone(),
            spans: Vec::new(),
            ..**self
        }
    }
}

impl Pages {
    /// Reads the directory.
    pub fn open(storage: Storage, cache: Arc<Shared>, layer: u64) -> Result<Self, IndexFault> {
        let decode_fault = |source| IndexFault::Decode { at: 0, source };
        let mut head = [0; HEAD_LEN];
        // An index without pages may be shorter than that.
        let mut len = 0;
        while len < HEAD_LEN {
            match storage.read_at(len as u64, &mut head[len..]) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(IndexFault::Read {
                        at: len as u64,
                        len: HEAD_LEN - len,
                        source,
                    });
                }
            }
        }
        // Bounded by the format before anything is allocated.
        let needed = Directory::needed(&head[..len]).map_err(decode_fault)?;
        let directory = Directory::decode(&read(&storage, 0, needed)?).map_err(decode_fault)?;
        Ok(Self {
            storage,
            directory,
            cache,
            layer,
        })
    }

    pub const fn directory(&self) -> &Directory {
        &self.directory
    }

    fn runs(&self, page: usize, budget: &mut Budget<'_>) -> Result<Arc<Vec<Run>>, LayerError> {
        let entry = &self.directory.run_pages()[page];
        let key = (self.layer, page as u64);
        self.cache.runs.get(key, budget, |budget| {
            budget.page()?;
            let bytes = read(&self.storage, entry.at, entry.len as usize)?;
            let runs = self.directory.decode_runs(page, &bytes);
            let runs = runs.map_err(|source| IndexFault::Decode {
                at: entry.at,
                source,
            })?;
            let weight = runs.capacity() * size_of::<Run>();
            Ok((runs, weight))
        })
    }

    /// Looks up a frame.
    pub fn frame(&self, id: u32, budget: &mut Budget<'_>) -> Result<FrameEntry, LayerError> {
        let number = self
            .directory
            .frame_page_of(id)
            .ok_or(IndexFault::NoFrame(id))?;
        let entry = &self.directory.frame_pages()[number];
        let key = (self.layer, number as u64);
        let page = self.cache.entries.get(key, budget, |budget| {
            budget.page()?;
            let frames = self.read_frames(number)?;
            let weight = frames.iter().map(weight_of).sum();
            Ok::<_, LayerError>((frames, weight))
        })?;
        let at = (id - entry.first) as usize;
        if at < page.len() {
            Ok(FrameEntry { page, at })
        } else {
            Err(IndexFault::NoFrame(id).into())
        }
    }

    /// A page of frames; keeps nothing.
    pub fn read_frames(&self, number: usize) -> Result<Vec<Frame>, IndexFault> {
        let entry = &self.directory.frame_pages()[number];
        let bytes = read(&self.storage, entry.at, entry.len as usize)?;
        let frames = self.directory.decode_frames(number, &bytes);
        frames.map_err(|source| IndexFault::Decode {
            at: entry.at,
            source,
        })
    }

    /// Goes through all frames, in order; keeps nothing.
    pub fn each_frame(
        &self,
        mut each: impl FnMut(u32, &Frame) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        for (number, entry) in self.directory.frame_pages().iter().enumerate() {
            let frames = self.read_frames(number)?;
            let mut ids = (entry.first..).zip(&frames);
            ids.try_for_each(|(id, frame)| each(id, frame))?;
        }
        Ok(())
    }

    /// What a range of the component consists of, in order, without gaps.
    pub fn parts(&self, range: Range<u64>) -> Parts<'_> {
        let page = self.directory.run_page_at(range.start).unwrap_or(0);
        Parts {
            pages: self,
            left: range,
            page,
            runs: None,
        }
    }
}

/// Memory that a frame's entry takes.
fn weight_of(frame: &Frame) -> usize {
    size_of::<Frame>()
        + frame.references.capacity() * size_of::<Reference>()
        + frame.spans.capacity() * size_of::<Span>()
}

fn read(storage: &Storage, at: u64, len: usize) -> Result<Vec<u8>, IndexFault> {
    let mut bytes = vec![0; len];
    storage
        .read_exact_at(at, &mut bytes)
        .map_err(|source| IndexFault::Read { at, len, source })?;
    Ok(bytes)
}

/// Walks the parts of a range.
pub(super) struct Parts<'a> {
    pages: &'a Pages,
    left: Range<u64>,
    /// Position of the page that holds, or would hold, the next run.
    page: usize,
    runs: Option<Arc<Vec<Run>>>,
}

impl Parts<'_> {
    /// What was not walked yet.
    pub fn left(&self) -> Range<u64> {
        self.left.clone()
    }

    /// The next part, or none where the range ends. After an error it would be the same again.
    pub fn next(&mut self, budget: &mut Budget<'_>) -> Result<Option<Part>, LayerError> {
        if self.left.is_empty() {
            return Ok(None);
        }
        let run = self.next_run(budget)?;
        let Range { start, end } = self.left;
        let part = match run {
            Some(run) if run.start <= start => {
                let from = skip(PartFrom::Mentioned(run.from), start - run.start);
                Part {
                    range: start..run.end().min(end),
                    from,
                }
            }
            run => Part {
                range: start..run.map_or(end, |run| run.start.min(end)),
                from: PartFrom::Inherited,
            },
        };
        if part.from == PartFrom::Inherited {
            self.check_inherited(&part.range)?;
        }
        self.left.start = part.range.end;
        Ok(Some(part))
    }

    /// The first run that ends behind the start of what is left.
    fn next_run(&mut self, budget: &mut Budget<'_>) -> Result<Option<Run>, LayerError> {
        let pages = self.pages.directory.run_pages().len();
        while self.page < pages {
            if self.runs.is_none() {
                self.runs = Some(self.pages.runs(self.page, budget)?);
            }
            let runs = self.runs.as_ref().expect("just read");
            let at = runs.partition_point(|run| run.end() <= self.left.start);
            if let Some(run) = runs.get(at) {
                return Ok(Some(*run));
            }
            self.page += 1;
            self.runs = None;
        }
        Ok(None)
    }

    /// Only what the parent has can be inherited.
    fn check_inherited(&self, range: &Range<u64>) -> Result<(), IndexFault> {
        if range.end <= self.pages.directory.header().inherited_len() {
            Ok(())
        } else {
            Err(IndexFault::Missing(range.clone()))
        }
    }
}
