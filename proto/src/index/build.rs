//! Writing an index, page by page, as its layer is made.

use thiserror::Error;

use super::directory::MAX_PAGES;
use super::page::{self, MAX_DETAILS_PER_PAGE, MAX_FRAMES_PER_PAGE, MAX_RUNS_PER_PAGE};
use super::{Frame, IndexHeader, Run, directory};
use crate::ranges::MAX_CONTENT_LEN;

/// Gathers runs and frames in order; full pages are compressed at once, so memory follows the index, not the content.
#[derive(Debug, Default)]
pub struct IndexBuilder {
    runs: Vec<Run>,
    frames: Vec<Frame>,
    /// References and spans in the open page of frames.
    details: usize,
    run_pages: Vec<(u64, u32, Vec<u8>)>,
    frame_pages: Vec<(u32, u64, Vec<u8>)>,
    next_run: u64,
    frame_count: u64,
    pack_len: u64,
}

/// A run or frame that does not fit what came before it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BuildError {
    /// A run that begins before the end of the previous one, is empty, or ends beyond the largest content.
    #[error(
        "the run at byte {0} is empty, overlaps the one before it, or ends beyond the largest content"
    )]
    RunOutOfOrder(u64),
    /// A frame that does not begin where the previous one ended.
    #[error("frame {0} does not follow the one before it in the pack")]
    FrameOutOfOrder(u64),
    /// A frame that every reader would refuse.
    #[error("frame {id} breaks a rule of the format: {why}")]
    Frame {
        /// The id that it would have had.
        id: u64,
        /// The rule.
        why: &'static str,
    },
    /// More pages of runs or of frames than a directory lists.
    #[error(
        "a layer has at most 2^30 frames and 2^32 runs, fewer with many spans: use a larger frame size"
    )]
    TooManyFrames,
}

impl IndexBuilder {
    /// Starts an empty index.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many frames there are: the next frame's id.
    pub const fn frame_count(&self) -> u64 {
        self.frame_count
    }

    /// Length of the pack so far: the next frame's offset.
    pub const fn pack_len(&self) -> u64 {
        self.pack_len
    }

    /// Adds a run; one that continues the previous run is joined to it.
    pub fn push_run(&mut self, run: Run) -> Result<(), BuildError> {
        use super::RunFrom::{Copy, Frame, Zero};
        let end = run
            .start
            .checked_add(run.len)
            .filter(|&end| end <= MAX_CONTENT_LEN);
        let Some(end) = end.filter(|_| run.len > 0 && run.start >= self.next_run) else {
            return Err(BuildError::RunOutOfOrder(run.start));
        };
        self.next_run = end;
        if let Some(last) = self.runs.last_mut().filter(|last| last.end() == run.start) {
            let joined = match (last.from, run.from) {
                (Zero, Zero) => true,
                (
                    Copy { source, offset },
                    Copy {
                        source: s,
                        offset: o,
                    },
                ) => source == s && offset + last.len == o,
                (Frame { id, offset }, Frame { id: i, offset: o }) => {
                    id == i && u64::from(offset) + last.len == o.into()
                }
                _ => false,
            };
            if joined {
                last.len += run.len;
                return Ok(());
            }
        }
        if self.runs.len() == MAX_RUNS_PER_PAGE as usize {
            self.end_run_page();
        }
        if self.run_pages.len() == MAX_PAGES {
            return Err(BuildError::TooManyFrames);
        }
        self.runs.push(run);
        Ok(())
    }

    /// Adds a frame and returns its id.
    pub fn push_frame(&mut self, frame: Frame) -> Result<u32, BuildError> {
        if frame.pack_offset != self.pack_len {
            return Err(BuildError::FrameOutOfOrder(self.frame_count));
        }
        // Below 2^30, as the pages are.
        let id = self.frame_count as u32;
        frame
            .check(id)
            .map_err(|why| BuildError::Frame { id: id.into(), why })?;
        let details = frame.references.len() + frame.spans.len();
        if self.frames.len() == MAX_FRAMES_PER_PAGE as usize
            || self.details + details > MAX_DETAILS_PER_PAGE
        {
            self.end_frame_page();
        }
        if self.frame_pages.len() == MAX_PAGES {
            return Err(BuildError::TooManyFrames);
        }
        self.details += details;
        self.frame_count += 1;
        self.pack_len += u64::from(frame.pack_len);
        self.frames.push(frame);
        Ok(id)
    }

    /// Writes the index. The caller vouches that the header fits the runs; [`super::Index::decode`] checks it.
    pub fn finish(mut self, header: &IndexHeader) -> Vec<u8> {
        self.end_run_page();
        self.end_frame_page();
        directory::encode(header, &self.run_pages, &self.frame_pages)
    }

    fn end_run_page(&mut self) {
        if let Some(first) = self.runs.first() {
            self.run_pages.push((
                first.start,
                self.runs.len() as u32,
                page::encode_runs(&self.runs),
            ));
            self.runs.clear();
        }
    }

    fn end_frame_page(&mut self) {
        if self.frames.is_empty() {
            return;
        }
        let pack_len = self
            .frames
            .iter()
            .map(|frame| u64::from(frame.pack_len))
            .sum();
        let first = (self.frame_count - self.frames.len() as u64) as u32;
        self.frame_pages.push((
            self.frames.len() as u32,
            pack_len,
            page::encode_frames(first, &self.frames),
        ));
        self.frames.clear();
        self.details = 0;
    }
}
