//! The balloon: memory that a guest does not need is given back, and is zero in what is captured.

use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};

use super::Qemu;
use crate::control::Failure;

/// So long the guest's driver may take to say how much it uses.
const STATISTICS: Duration = Duration::from_secs(3);
/// So long a shrinking may take.
const SHRINK: Duration = Duration::from_secs(30);
/// So long a growing may take.
const GROW: Duration = Duration::from_secs(30);
/// A balloon that has not moved for so long has come as far as it will: a guest may have nothing more to give, but can always take.
const STILL: Duration = Duration::from_secs(2);
const STILL_GROWING: Duration = Duration::from_secs(8);
/// A guest that takes less than a quarter of a processor for so long is quiet.
const QUIET: Duration = Duration::from_secs(1);
/// So long that is waited for: some are never.
const QUIET_WITHIN: Duration = Duration::from_secs(10);
/// So often it is looked.
const LOOK: Duration = Duration::from_millis(50);
/// What the guest keeps beside what it uses. With less its driver complains, and its processes starve.
const SPARE: u64 = 64 << 20;

/// What came of shrinking a guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shrunk {
    /// The machine has no balloon, or the guest no driver that answers; nothing was changed.
    NoBalloon,
    /// The guest uses what it has; nothing was changed.
    InUse,
    /// The guest gave memory back, which [`Qemu::grow`] returns.
    Shrunk {
        /// Bytes that it had.
        before: u64,
        /// Bytes that it has.
        after: u64,
        /// Bytes that it was to have.
        target: u64,
    },
}

impl Qemu {
    /// Takes from the running guest the memory that it does not use, but for 64 MiB. Where the future is
    /// dropped, the balloon stays as it is until [`Qemu::grow`].
    ///
    /// # Errors
    /// QEMU refuses.
    pub async fn shrink(&self) -> Result<Shrunk, Failure> {
        let Some(available) = self.available().await? else {
            return Ok(Shrunk::NoBalloon);
        };
        let before = self.balloon_size().await?;
        // What the kernel reserved for itself at its start is in no statistics, so it is reckoned from the size, not from the use.
        let target = before
            .saturating_sub(available)
            .saturating_add(SPARE)
            .max(SPARE);
        if target >= before {
            return Ok(Shrunk::InUse);
        }
        let after = self.inflate(target, SHRINK, STILL).await?;
        Ok(Shrunk::Shrunk {
            before,
            after,
            target,
        })
    }

    /// Gives the guest all of its memory; bytes that it has not taken back by then.
    ///
    /// # Errors
    /// QEMU refuses.
    pub async fn grow(&self) -> Result<u64, Failure> {
        if self.balloon.is_none() || self.balloon_size().await? == self.ram_size {
            return Ok(0);
        }
        let size = self.inflate(self.ram_size, GROW, STILL_GROWING).await?;
        Ok(self.ram_size.saturating_sub(size))
    }

    /// Bytes that the balloon has.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub async fn inflated(&self) -> Result<u64, Failure> {
        match self.balloon {
            Some(_) => Ok(self.ram_size.saturating_sub(self.balloon_size().await?)),
            None => Ok(0),
        }
    }

    /// Returns when the guest has little to do, or after some seconds.
    pub async fn quiet(&self) {
        let began = Instant::now();
        let mut before = self.cpu_time();
        while began.elapsed() < QUIET_WITHIN {
            sleep(QUIET).await;
            let now = self.cpu_time();
            if now.saturating_sub(before) < QUIET / 4 {
                return;
            }
            before = now;
        }
    }

    /// Bytes that the guest could give away, as its driver says; none where no driver answers.
    async fn available(&self) -> Result<Option<u64>, Failure> {
        let Some(id) = &self.balloon else {
            return Ok(None);
        };
        let path = format!("/machine/peripheral/{id}");
        let statistics = json!({ "path": path, "property": "guest-stats" });
        let poll = |seconds: u32| {
            let property = "guest-stats-polling-interval";
            json!({ "path": path, "property": property, "value": seconds })
        };
        // What was said before, which may be long ago.
        let old = self.execute("qom-get", statistics.clone()).await?;
        self.execute("qom-set", poll(1)).await?;
        let deadline = Instant::now() + STATISTICS;
        let mut available = None;
        while available.is_none() && Instant::now() < deadline {
            sleep(LOOK).await;
            let now = self.execute("qom-get", statistics.clone()).await?;
            // The time is in seconds, and they may have been asked for in this one.
            let is_new = now != old;
            let value = now["stats"]["stat-available-memory"].as_u64();
            // All ones where the driver does not know.
            available = value.filter(|value| is_new && *value != u64::MAX);
        }
        self.execute("qom-set", poll(0)).await?;
        Ok(available)
    }

    /// Whether the guest's driver has said anything since the machine was started here: it does so when it begins, and when it is resumed.
    pub(super) async fn has_balloon(&self) -> Result<bool, Failure> {
        let Some(id) = &self.balloon else {
            return Ok(false);
        };
        let path = format!("/machine/peripheral/{id}");
        let statistics = json!({ "path": path, "property": "guest-stats" });
        let said = self.execute("qom-get", statistics).await?;
        Ok(said["last-update"].as_u64().is_some_and(|time| time != 0))
    }

    async fn balloon_size(&self) -> Result<u64, Failure> {
        let answer = self.execute("query-balloon", json!({})).await?;
        Ok(answer["actual"].as_u64().unwrap_or(self.ram_size))
    }

    /// Asks for a size, and returns what it is when it is reached, moves no more, or the time is over.
    async fn inflate(&self, target: u64, limit: Duration, still: Duration) -> Result<u64, Failure> {
        self.execute("balloon", json!({ "value": target })).await?;
        let start = Instant::now();
        let (mut now, mut moved) = (self.balloon_size().await?, start);
        while now != target && moved.elapsed() < still && start.elapsed() < limit {
            sleep(LOOK).await;
            let size = self.balloon_size().await?;
            if size != now {
                (now, moved) = (size, Instant::now());
            }
        }
        if now > target && target < self.ram_size {
            // The driver would go on trying, and complain.
            self.execute("balloon", json!({ "value": now })).await?;
        }
        Ok(now)
    }
}
