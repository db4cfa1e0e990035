//! What QEMU prints: kept in a file up to a length, as a guest can have it print without end.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::ChildStderr;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// So much is kept, from the beginning.
const MAX_LOG: usize = 1 << 20;
/// So much of its end is quoted.
const MAX_TAIL: u64 = 2048;
/// So many of its lines.
const MAX_LINES: usize = 5;
/// So long what it printed last may take to arrive.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A log in the making, until it is dropped.
pub(super) struct Log {
    path: PathBuf,
    has_ended: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Log {
    /// Keeps what comes, in a new file.
    pub fn keep(stderr: Option<ChildStderr>, path: &Path) -> io::Result<Self> {
        let mut file = File::create(path)?;
        let has_ended = Arc::new(AtomicBool::new(stderr.is_none()));
        let ended = has_ended.clone();
        let copy = async move {
            let (mut room, mut buffer) = (MAX_LOG, vec![0; 4096]);
            let Some(mut stderr) = stderr else {
                return;
            };
            while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
                let kept = count.min(room);
                room -= kept;
                // Where the file has no room either, QEMU is not to wait for it.
                let _lost = file.write_all(&buffer[..kept]);
            }
            ended.store(true, Ordering::Release);
        };
        Ok(Self {
            path: path.to_owned(),
            has_ended,
            task: tokio::spawn(copy),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns when all that an ended process printed is there, or soon after.
    pub async fn ended(&self) {
        let wait = async {
            while !self.has_ended.load(Ordering::Acquire) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        // What is there will do.
        let _late = timeout(LAST_WORDS, wait).await;
    }

    /// Its end, to be put behind a message.
    pub fn tail(&self) -> String {
        let read = || {
            let file = File::open(&self.path)?;
            let start = file.metadata()?.len().saturating_sub(MAX_TAIL);
            let mut bytes = vec![0; MAX_TAIL as usize];
            let count = file.read_at(&mut bytes, start)?;
            bytes.truncate(count);
            io::Result::Ok(bytes)
        };
        let bytes = read().unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines = text.lines().map(str::trim);
        let mut last: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
        let last = last.split_off(last.len().saturating_sub(MAX_LINES));
        match last.is_empty() {
            true => String::new(),
            false => format!(": {}", last.join("; ")),
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.task.abort();
    }
}
