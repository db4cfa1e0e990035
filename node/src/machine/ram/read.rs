//! Reading: what is here at once, the rest through the base, page by page, each of which is fetched once for all who wait for it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use capsule_chunker::content::{ReadError, check_range};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared, try_join_all};

use super::generation::Generation;
use super::pages::{PAGE, Page};
use super::{PAGES_IN_WINDOW, Ram, Stack, lock};
use crate::disk::Disk;

/// Most bytes that are read in one go: so much is held in memory.
pub const AT_ONCE: u64 = 1 << 20;

/// A page of the base, on its way to whoever asked. Ends with the last of them.
pub type Fetch = WeakShared<BoxFuture<'static, Fetched>>;
type Fetched = Result<Arc<Vec<u8>>, Arc<ReadError>>;
/// Pages of the base that have come, by their numbers.
pub type Came = BTreeMap<u64, Arc<Vec<u8>>>;
/// Numbers of pages that have to be fetched first.
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
            let mut came = Came::new();
            loop {
                let missing = self.try_read(at, part, &came)?;
                if missing.is_empty() {
                    break;
                }
                self.fetch(missing, &mut came).await?;
            }
        }
        Ok(bytes)
    }

    /// Reads a range within the memory, if all of it is here or among `came`; or tells what else it takes, and may have read some.
    pub(super) fn try_read(
        &self,
        offset: u64,
        into: &mut [u8],
        came: &Came,
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
                Place::Base => self.read_base(from, part, came, &mut missing),
            }
            page = next;
        }
        Ok(missing)
    }

    fn read_base(&self, offset: u64, into: &mut [u8], came: &Came, missing: &mut Missing) {
        let end = offset + into.len() as u64;
        if self.base_is_zero(offset..end) {
            return into.fill(0);
        }
        for page in offset / PAGE..end.div_ceil(PAGE) {
            let (from, to) = ((page * PAGE).max(offset), ((page + 1) * PAGE).min(end));
            let part = &mut into[(from - offset) as usize..(to - offset) as usize];
            if self.base_is_zero(page * PAGE..(page + 1) * PAGE) {
                part.fill(0);
                continue;
            }
            match came.get(&page) {
                Some(bytes) => {
                    let at = (from - page * PAGE) as usize;
                    part.copy_from_slice(&bytes[at..at + part.len()]);
                }
                None => _ = missing.insert(page),
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

    /// Fetches pages of the base, and keeps them.
    pub(super) async fn fetch(&self, missing: Missing, came: &mut Came) -> Result<(), ReadError> {
        let Some(base) = &self.base else {
            return Ok(());
        };
        let fetches = missing.into_iter().map(|page| async move {
            let bytes = self.fetching(base, page).await;
            if let Ok(bytes) = &bytes {
                self.keep(page, bytes);
            }
            lock(&self.fetches).remove(&page);
            let failed = |error: Arc<ReadError>| ReadError::Decode {
                offset: page * PAGE,
                source: Box::new(error),
            };
            bytes.map(|bytes| (page, bytes)).map_err(failed)
        });
        came.extend(try_join_all(fetches).await?);
        Ok(())
    }

    /// The fetch of a page that is under way, or a new one. It belongs to those who wait for it, so that it ends with them.
    fn fetching(&self, base: &Arc<dyn Disk>, page: u64) -> Shared<BoxFuture<'static, Fetched>> {
        let mut fetches = lock(&self.fetches);
        if let Some(fetch) = fetches.get(&page).and_then(WeakShared::upgrade) {
            return fetch;
        }
        // What nobody waits for any longer.
        fetches.retain(|_, fetch| fetch.upgrade().is_some());
        let (base, places, fetched) = (base.clone(), self.places.clone(), self.fetched.clone());
        let fetch = async move {
            let _place = places.acquire().await;
            let start = page * PAGE;
            let end = (start + PAGE).min(base.len());
            let room = Vec::with_capacity(PAGE as usize);
            let mut bytes = base.read(start..end, room).await?;
            fetched.fetch_add(end - start, Ordering::Relaxed);
            bytes.resize(PAGE as usize, 0);
            Ok(Arc::new(bytes))
        };
        let fetch = fetch.boxed().shared();
        if let Some(weak) = fetch.downgrade() {
            fetches.insert(page, weak);
        }
        fetch
    }

    /// Keeps a page of the base, if it is not written to yet.
    fn keep(&self, page: u64, bytes: &[u8]) {
        let _stripe = self.stripe(page / PAGES_IN_WINDOW);
        if matches!(self.find(&self.stack(), page), Place::Base)
            && let Err(error) = self.below.put(page, bytes, Page::Clean)
        {
            // It is read again when it is needed again.
            tracing::debug!(%error, "what was read of a memory's base is not kept");
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
