//! Memory for content on its way: buffers that are reused, within a budget that all connections share.
//!
//! The budget is the backpressure: a reader that gets no buffer stops reading its substream, and the peer's
//! window closes.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Unit of the budget: semaphores count in `u32`.
const UNIT: usize = 1 << 10;
/// Most idle buffers kept for reuse: enough for the steady state of a few fast peers, some 8 MiB at most.
const MAX_IDLE: usize = 8;

/// Hands out buffers within a budget of bytes.
#[derive(Debug)]
pub struct Buffers {
    budget: Arc<Semaphore>,
    idle: Mutex<Vec<Vec<u8>>>,
}

/// Bytes that return their memory when dropped.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    home: Arc<Buffers>,
    permit: OwnedSemaphorePermit,
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
        let mut buffer = self.take(permit.expect("the budget is never closed"));
        buffer.bytes.resize(len, 0);
        buffer
    }

    /// An empty buffer with a claim to `len` bytes, if there is room now.
    pub fn try_empty(self: &Arc<Self>, len: usize) -> Option<Buffer> {
        let permit = self
            .budget
            .clone()
            .try_acquire_many_owned(units(len))
            .ok()?;
        let mut buffer = self.take(permit);
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

    fn take(self: &Arc<Self>, permit: OwnedSemaphorePermit) -> Buffer {
        let bytes = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        Buffer {
            bytes: bytes.unwrap_or_default(),
            home: self.clone(),
            permit,
        }
    }
}

impl Buffer {
    /// Gives back what is claimed beyond `len` bytes.
    pub fn claim_only(&mut self, len: usize) {
        let excess = self.permit.num_permits().saturating_sub(len.div_ceil(UNIT));
        drop(self.permit.split(excess));
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
        if idle.len() < MAX_IDLE {
            idle.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_budget_holds_and_memory_comes_back() {
        let buffers = Buffers::new(3 * UNIT);
        let first = buffers.filled(2 * UNIT).await;
        assert!(buffers.try_empty(2 * UNIT).is_none());
        let address = first.as_ptr();
        drop(first);
        let mut second = buffers.try_empty(2 * UNIT).unwrap();
        assert_eq!(second.as_ptr(), address);
        assert!(second.is_empty());
        second.claim_only(UNIT);
        assert!(buffers.try_empty(2 * UNIT).is_some());
    }
}
