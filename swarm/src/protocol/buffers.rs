//! Memory for content on its way: buffers that are reused, within a budget that all connections share.
//!
//! Inward the budget is the backpressure: a reader that gets no buffer stops reading its substream, and the peer's
//! window closes. Outward a peer that does not read must not use up what the others are served from: each connection
//! has, beside the budget that all share, a [`Place`] of its own.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Unit of the budget: semaphores count in `u32`.
const UNIT: usize = 1 << 10;
/// Most idle buffers kept for reuse: enough for the steady state of a few fast peers, some 8 MiB at most.
const MAX_IDLE: usize = 8;
/// Shorter buffers are not kept: they are cheap to make, and would take the places of those that are not.
const KEPT: usize = 64 << 10;

/// Hands out buffers within a budget of bytes.
#[derive(Debug)]
pub struct Buffers {
    budget: Arc<Semaphore>,
    idle: Mutex<Vec<Vec<u8>>>,
}

/// Memory for one connection alone, beside the budget: as much as its longest frame.
///
/// With it, whatever the other connections do, one that takes what it is sent is always sent more. The price is a bound:
/// a connection may pin so many bytes more, if it does not read.
#[derive(Clone, Debug)]
pub struct Place(Arc<Semaphore>);

/// Bytes that return their memory when dropped.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    home: Arc<Buffers>,
    _permit: OwnedSemaphorePermit,
}

impl Buffers {
    /// A budget of `bytes`.
    pub fn new(bytes: usize) -> Arc<Self> {
        let budget = Arc::new(Semaphore::new(bytes.div_ceil(UNIT)));
        Arc::new(Self {
            budget,
            idle: Mutex::default(),
        })
    }

    /// Waits for room for `len` bytes. Content is whatever the buffer held before; its length is `len`.
    pub async fn filled(self: &Arc<Self>, len: usize) -> Buffer {
        let permit = self.budget.clone().acquire_many_owned(units(len)).await;
        let mut buffer = self.take(permit.expect("the budget is never closed"), len);
        buffer.bytes.resize(len, 0);
        buffer
    }

    /// An empty buffer for `len` bytes: from the connection's own place while that is free, else from the budget;
    /// `None` if there is room in neither now.
    pub fn try_empty(self: &Arc<Self>, place: &Place, len: usize) -> Option<Buffer> {
        let units = units(len);
        let own = place.0.clone().try_acquire_many_owned(units);
        let permit = own.or_else(|_| self.budget.clone().try_acquire_many_owned(units));
        let mut buffer = self.take(permit.ok()?, len);
        buffer.bytes.clear();
        Some(buffer)
    }

    /// Gives idle memory back to the system: nothing has moved for a while.
    pub fn trim(&self) {
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// Memory for `len` bytes: idle memory, unless it is much more than was asked of the budget.
    fn take(self: &Arc<Self>, permit: OwnedSemaphorePermit, len: usize) -> Buffer {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = idle.iter().rposition(|bytes| bytes.capacity() <= 2 * len);
        let bytes = fitting.map(|at| idle.swap_remove(at));
        drop(idle);
        Buffer {
            bytes: bytes.unwrap_or_else(|| Vec::with_capacity(len)),
            home: self.clone(),
            _permit: permit,
        }
    }
}

impl Place {
    /// Room for one frame of `len` bytes.
    pub fn new(len: usize) -> Self {
        Self(Arc::new(Semaphore::new(len.div_ceil(UNIT))))
    }
}

fn units(len: usize) -> u32 {
    u32::try_from(len.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

impl Deref for Buffer {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut idle = self
            .home
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE && self.bytes.capacity() >= KEPT {
            idle.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_budget_holds_and_memory_comes_back() {
        let buffers = Buffers::new(3 * KEPT);
        let nothing = Place::new(0);
        let first = buffers.filled(2 * KEPT).await;
        assert!(buffers.try_empty(&nothing, 2 * KEPT).is_none());
        let address = first.as_ptr();
        drop(first);
        let second = buffers.try_empty(&nothing, 2 * KEPT).unwrap();
        assert_eq!(second.as_ptr(), address);
        assert!(second.is_empty());
    }

    #[tokio::test]
    async fn who_holds_all_of_the_budget_does_not_hold_others_places() {
        let buffers = Buffers::new(4 * UNIT);
        let (greedy, other) = (Place::new(2 * UNIT), Place::new(2 * UNIT));
        let held: Vec<_> = std::iter::from_fn(|| buffers.try_empty(&greedy, 2 * UNIT)).collect();
        assert_eq!(held.len(), 3, "its own place and all of the budget");
        let one = buffers.try_empty(&other, 2 * UNIT).unwrap();
        assert!(buffers.try_empty(&other, UNIT).is_none());
        drop(one);
        assert!(buffers.try_empty(&other, UNIT).is_some());
    }

    #[test]
    fn a_small_claim_does_not_pin_large_memory() {
        let buffers = Buffers::new(1 << 20);
        let place = Place::new(0);
        drop(buffers.try_empty(&place, 1 << 20).unwrap());
        let small: Vec<_> = (0..8)
            .map(|_| buffers.try_empty(&place, 10).unwrap())
            .collect();
        let pinned: usize = small.iter().map(|buffer| buffer.capacity()).sum();
        assert!(
            pinned <= 8 * UNIT,
            "{pinned} bytes for claims of {UNIT} each"
        );
    }
}
