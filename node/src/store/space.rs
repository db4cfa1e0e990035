//! The quota: how many bytes of blobs there are, and how many there may be.
//!
//! Counts what the store holds, not what the file system spends on it; "disk full" is told by the file
//! system itself.

use std::sync::atomic::{AtomicU64, Ordering};

use super::error::Full;

/// Bytes in use and the limit.
#[derive(Debug)]
pub(super) struct Space {
    used: AtomicU64,
    /// `u64::MAX`: none.
    quota: AtomicU64,
}

/// How full the store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of blobs, small blobs and outboards.
    pub used: u64,
    /// The limit, if there is one.
    pub quota: Option<u64>,
}

impl Space {
    pub(super) fn new(quota: Option<u64>) -> Self {
        Self {
            used: AtomicU64::new(0),
            quota: AtomicU64::new(quota.unwrap_or(u64::MAX)),
        }
    }

    /// Takes bytes, if the quota allows.
    pub(super) fn reserve(&self, bytes: u64) -> Result<(), Full> {
        let quota = self.quota.load(Ordering::Relaxed);
        let take = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= quota);
        match self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
        {
            Ok(_) => Ok(()),
            Err(used) => Err(Full::Quota {
                needed: bytes,
                used,
                quota,
            }),
        }
    }

    /// Counts bytes that are there, whatever the quota: at open.
    pub(super) fn count(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Gives bytes back.
    pub(super) fn release(&self, bytes: u64) {
        // Saturating: a miscount must not make the store look full for ever.
        let give = |used: u64| Some(used.saturating_sub(bytes));
        let _ = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, give);
    }

    pub(super) fn set_quota(&self, quota: Option<u64>) {
        self.quota
            .store(quota.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(super) fn usage(&self) -> Usage {
        let quota = self.quota.load(Ordering::Relaxed);
        Usage {
            used: self.used.load(Ordering::Relaxed),
            quota: (quota != u64::MAX).then_some(quota),
        }
    }
}
