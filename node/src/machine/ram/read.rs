//! Reading: what is here at once, the rest through the base, by windows, each of which is fetched once for all who wait for it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use capsule_chunker::content::{ReadError, check_range};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared, try_join_all};

use super::generation::Generation;
use super::pages::{PAGE, Page};
use super::{PAGES_IN_WINDOW, Ram, Stack, WINDOW, lock};
use crate::disk::Disk;

/// Most bytes that are read in one go: so much is held in memory.
pub const AT_ONCE: u64 = 1 << 20;

/// A window of the base, on its way to whoever asked. Ends with the last of them.
pub type Fetch = WeakShared<BoxFuture<'static, Fetched>>;
type Fetched = Result<Arc<Vec<u8>>, Arc<ReadError>>;
/// Windows of the base, whole pages, by their numbers.
pub type Windows = BTreeMap<u64, Arc<Vec<u8>>>;
/// Numbers of windows that have to be fetched first.
pub type Missing = BTreeSet<u64>;

/// Where a page is.
#[derive(Clone, Copy)]
enum Place<'a> {
    Zero,
    In(&'a Generation),
    Base,
}

impl Ram {
    /// A range. Waits for as long as the base does.
    ///
    /// # Errors
    /// A range that is not within the memory; or what the operating system or the base said.
    pub async fn read(&self, range: Range<u64>) -> Result<Vec<u8>, ReadError> {
        check_range(self.len, range.start, (range.end - range.start) as usize)?;
        let mut bytes = vec![0; (range.end - range.start) as usize];
        for (at, part) in (range.start..)
            .step_by(AT_ONCE as usize)
            .zip(bytes.chunks_mut(AT_ONCE as usize))
        {
            let mut windows = Windows::new();
            loop {
                let missing = self.try_read(at, part, &windows)?;
                if missing.is_empty() {
                    break;
                }
                self.fetch(missing, &mut windows).await?;
            }
        }
        Ok(bytes)
    }

    /// Reads a range within the memory, if all of it is here or among `windows`; or tells what else it takes, and may have read some.
    pub(super) fn try_read(
        &self,
        offset: u64,
        into: &mut [u8],
        windows: &Windows,
    ) -> Result<Missing, ReadError> {
        let stack = self.stack();
        let mut missing = Missing::new();
        let end = offset + into.len() as u64;
        let mut page = offset / PAGE;
        while page * PAGE < end {
            let place = self.find(&stack, page);
            let mut next = page + 1;
            while next * PAGE < end && self.find(&stack, next).is(&place) {
                next += 1;
            }
            let (from, to) = ((page * PAGE).max(offset), (next * PAGE).min(end));
            let part = &mut into[(from - offset) as usize..(to - offset) as usize];
            match place {
                Place::Zero => part.fill(0),
                Place::In(generation) => {
                    let read = generation.read(from, part);
                    read.map_err(|error| ReadError::io(&generation.path, from, error))?;
                }
                Place::Base => self.read_base(from, part, windows, &mut missing),
            }
            page = next;
        }
        Ok(missing)
    }

    fn read_base(&self, offset: u64, into: &mut [u8], windows: &Windows, missing: &mut Missing) {
        let end = offset + into.len() as u64;
        if self.base_is_zero(offset..end) {
            return into.fill(0);
        }
        for page in offset / PAGE..end.div_ceil(PAGE) {
            let (from, to) = ((page * PAGE).max(offset), ((page + 1) * PAGE).min(end));
            let part = &mut into[(from - offset) as usize..(to - offset) as usize];
            let window = page / PAGES_IN_WINDOW;
            if self.base_is_zero(page * PAGE..(page + 1) * PAGE) {
                part.fill(0);
                continue;
            }
            match windows.get(&window) {
                Some(bytes) => {
                    let at = (from - window * WINDOW) as usize;
                    part.copy_from_slice(&bytes[at..at + part.len()]);
                }
                None => _ = missing.insert(window),
            }
        }
    }

    /// Whether a page is zeros, known without reading it.
    pub(super) fn is_zero(&self, stack: &Stack, page: u64) -> bool {
        match self.find(stack, page) {
            Place::Zero => true,
            Place::In(_) => false,
            Place::Base => self.base_is_zero(page * PAGE..(page + 1) * PAGE),
        }
    }

    fn find<'a>(&'a self, stack: &'a Stack, page: u64) -> Place<'a> {
        let above = [&stack.current]
            .into_iter()
            .chain(stack.frozen.iter().rev());
        let all = above.map(|generation| &**generation).chain([&self.below]);
        for generation in all {
            match generation.pages.get(page) {
                Page::Inherited => {}
                Page::Zero => return Place::Zero,
                Page::Data | Page::Clean => return Place::In(generation),
            }
        }
        Place::Base
    }

    fn base_is_zero(&self, range: Range<u64>) -> bool {
        self.base.as_ref().is_none_or(|base| {
            let range = range.start.min(base.len())..range.end.min(base.len());
            range.is_empty() || base.is_zero(range)
        })
    }

    /// Fetches windows of the base, and keeps them.
    pub(super) async fn fetch(
        &self,
        missing: Missing,
        windows: &mut Windows,
    ) -> Result<(), ReadError> {
        let Some(base) = &self.base else {
            return Ok(());
        };
        let fetches = missing.into_iter().map(|window| async move {
            let bytes = self.fetching(base, window).await;
            if let Ok(bytes) = &bytes {
                self.keep(window, bytes);
            }
            lock(&self.fetches).remove(&window);
            let failed = |error: Arc<ReadError>| ReadError::Decode {
                offset: window * WINDOW,
                source: Box::new(error),
            };
            bytes.map(|bytes| (window, bytes)).map_err(failed)
        });
        windows.extend(try_join_all(fetches).await?);
        Ok(())
    }

    /// The fetch of a window that is under way, or a new one. It belongs to those who wait for it, so that it ends with them.
    fn fetching(&self, base: &Arc<dyn Disk>, window: u64) -> Shared<BoxFuture<'static, Fetched>> {
        let mut fetches = lock(&self.fetches);
        if let Some(fetch) = fetches.get(&window).and_then(WeakShared::upgrade) {
            return fetch;
        }
        // What nobody waits for any longer.
        fetches.retain(|_, fetch| fetch.upgrade().is_some());
        let (base, places, fetched) = (base.clone(), self.places.clone(), self.fetched.clone());
        let fetch = async move {
            let _place = places.acquire().await;
            let start = window * WINDOW;
            let end = (start + WINDOW).min(base.len());
            let mut bytes = base
                .read(start..end, Vec::with_capacity(WINDOW as usize))
                .await?;
            fetched.fetch_add(end - start, Ordering::Relaxed);
            bytes.resize(WINDOW as usize, 0);
            Ok(Arc::new(bytes))
        };
        let fetch = fetch.boxed().shared();
        if let Some(weak) = fetch.downgrade() {
            fetches.insert(window, weak);
        }
        fetch
    }

    /// Keeps those pages of a window of the base that are not written to yet.
    fn keep(&self, window: u64, bytes: &[u8]) {
        let _stripe = self.stripe(window);
        let stack = self.stack();
        let first = window * PAGES_IN_WINDOW;
        let end = (first + PAGES_IN_WINDOW).min(self.pages());
        let is_base = |page| matches!(self.find(&stack, page), Place::Base);
        let mut page = first;
        while page < end {
            let mut next = page + 1;
            if is_base(page) {
                while next < end && is_base(next) {
                    next += 1;
                }
                let kept =
                    &bytes[((page - first) * PAGE) as usize..((next - first) * PAGE) as usize];
                if let Err(error) = self.below.put(page, kept, Page::Clean) {
                    // It is read again when it is needed again.
                    return tracing::debug!(%error, "what was read of a memory's base is not kept");
                }
            }
            page = next;
        }
    }
}

impl Place<'_> {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Place::Zero, Place::Zero) | (Place::Base, Place::Base) => true,
            (Place::In(one), Place::In(other)) => std::ptr::eq(*one, *other),
            _ => false,
        }
    }
}
