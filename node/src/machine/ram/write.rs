//! Writing. Whole pages are written as they are, without reading what they replace; parts of pages with what they lack. Zeros take no room.

use std::io;
use std::ops::Range;

use capsule_chunker::content::ReadError;

use super::pages::{PAGE, Page};
use super::read::{Came, Missing};
use super::{PAGES_IN_WINDOW, Ram, Stack, windows};

const ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];

impl Ram {
    /// Writes within the memory. Waits for as long as the base does, where only a part of a page is written.
    ///
    /// # Errors
    /// What the operating system or the base said.
    pub async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), ReadError> {
        let mut fetched = Came::new();
        loop {
            let missing = self.try_write(offset, bytes, &fetched)?;
            if missing.is_empty() {
                return Ok(());
            }
            self.fetch(missing, &mut fetched).await?;
        }
    }

    /// Makes zeros of a range within the memory. Waits as `write` does.
    ///
    /// # Errors
    /// What the operating system or the base said.
    pub async fn zero(&self, range: Range<u64>) -> Result<(), ReadError> {
        let (first, end) = whole(&range);
        if first >= end {
            let zeros = vec![0; (range.end - range.start) as usize];
            return self.write(range.start, &zeros).await;
        }
        let (before, after) = (first * PAGE - range.start, range.end - end * PAGE);
        self.write(range.start, &ZEROS[..before as usize]).await?;
        self.zero_pages(first..end)?;
        self.write(end * PAGE, &ZEROS[..after as usize]).await
    }

    /// Makes zeros of pages.
    pub(super) fn zero_pages(&self, pages: Range<u64>) -> Result<(), ReadError> {
        for pages in windows(pages) {
            let _stripe = self.stripe(pages.start / PAGES_IN_WINDOW);
            let stack = self.stack();
            let zeroed = self.zero_some(&stack, pages.clone());
            zeroed.map_err(|error| failed(&stack, pages.start * PAGE, error))?;
        }
        Ok(())
    }

    /// Writes, if all that it takes is here or among `fetched`; or tells what else it takes, and may have written some.
    pub(super) fn try_write(
        &self,
        offset: u64,
        bytes: &[u8],
        fetched: &Came,
    ) -> Result<Missing, ReadError> {
        let range = offset..offset + bytes.len() as u64;
        let mut missing = Missing::new();
        for page in parts(&range) {
            missing.append(&mut self.try_read(page * PAGE, &mut [0; PAGE as usize], fetched)?);
        }
        if !missing.is_empty() || range.is_empty() {
            return Ok(missing);
        }
        for pages in windows(offset / PAGE..range.end.div_ceil(PAGE)) {
            let from = offset.max(pages.start * PAGE);
            let to = range.end.min(pages.end * PAGE);
            let part = &bytes[(from - offset) as usize..(to - offset) as usize];
            missing.append(&mut self.write_window(from, part, fetched)?);
        }
        Ok(missing)
    }

    /// Writes within a window, as `try_write`.
    fn write_window(
        &self,
        offset: u64,
        bytes: &[u8],
        fetched: &Came,
    ) -> Result<Missing, ReadError> {
        let range = offset..offset + bytes.len() as u64;
        let _stripe = self.stripe(offset / PAGE / PAGES_IN_WINDOW);
        let mut changed = Vec::new();
        for page in parts(&range) {
            let mut whole = ZEROS;
            // What was here is still here, if only the base did not think better of what is zero.
            let missing = self.try_read(page * PAGE, &mut whole, fetched)?;
            if !missing.is_empty() {
                return Ok(missing);
            }
            let (from, to) = (
                range.start.max(page * PAGE),
                range.end.min((page + 1) * PAGE),
            );
            let part = &bytes[(from - offset) as usize..(to - offset) as usize];
            whole[(from - page * PAGE) as usize..(to - page * PAGE) as usize].copy_from_slice(part);
            changed.push((page, whole));
        }
        let stack = self.stack();
        let put = |first, pages: &[u8]| {
            let put = self.put(&stack, first, pages);
            put.map_err(|error| failed(&stack, first * PAGE, error))
        };
        for (page, whole) in &changed {
            put(*page, whole)?;
        }
        let (first, end) = whole(&range);
        if first < end {
            let pages = first * PAGE - offset..end * PAGE - offset;
            put(first, &bytes[pages.start as usize..pages.end as usize])?;
        }
        Ok(Missing::new())
    }

    /// Writes whole pages of a window.
    fn put(&self, stack: &Stack, first: u64, bytes: &[u8]) -> io::Result<()> {
        let is_zero = |page: &[u8]| page == ZEROS;
        let mut page = first;
        let pages: Vec<&[u8]> = bytes.chunks(PAGE as usize).collect();
        for run in pages.chunk_by(|one, other| is_zero(one) == is_zero(other)) {
            let next = page + run.len() as u64;
            if is_zero(run[0]) {
                self.zero_some(stack, page..next)?;
            } else {
                let at = ((page - first) * PAGE) as usize;
                let len = run.len() * PAGE as usize;
                stack.current.put(page, &bytes[at..at + len], Page::Data)?;
            }
            page = next;
        }
        Ok(())
    }

    /// Makes zeros of those pages of a window that are not known to be.
    fn zero_some(&self, stack: &Stack, pages: Range<u64>) -> io::Result<()> {
        let mut page = pages.start;
        while page < pages.end {
            let mut next = page + 1;
            if !self.is_zero(stack, page) {
                while next < pages.end && !self.is_zero(stack, next) {
                    next += 1;
                }
                stack.current.zero(page, next)?;
            }
            page = next;
        }
        Ok(())
    }
}

/// The whole pages of a range: the first, and the one behind the last.
fn whole(range: &Range<u64>) -> (u64, u64) {
    (range.start.div_ceil(PAGE), range.end / PAGE)
}

/// Pages of which a range has a part: two at most.
fn parts(range: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
    let first = (!range.start.is_multiple_of(PAGE)).then_some(range.start / PAGE);
    let last = (!range.end.is_multiple_of(PAGE)).then_some(range.end / PAGE);
    let empty = range.is_empty();
    let last = last.filter(|page| first != Some(*page));
    first.into_iter().chain(last).filter(move |_| !empty)
}

fn failed(stack: &Stack, offset: u64, error: io::Error) -> ReadError {
    ReadError::io(&stack.current.path, offset, error)
}
