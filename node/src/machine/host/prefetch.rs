//! What resuming reads first: brought before the guest runs, by what those read who resumed it before; and published for those who do it next.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use capsule_chunker::content::ReadError;
use capsule_proto::record::MAX_PREFETCH_RANGES;
use futures::{StreamExt, TryStreamExt, stream};

use super::parts::Reading;
use super::{Host, Running};
use crate::control::{ByteRange, Described, Failure, FailureCode, Phase, Prefetch, Progress};

/// Ranges that are asked for at a time: enough that a thin link never idles, and in order.
const AT_ONCE: usize = 64;
/// Longest range that is asked for at once.
const MAX_LEN: u64 = 1 << 20;
/// When a resumed guest has run for so long without waiting, what it reads is no longer what resuming takes.
const SETTLED: Duration = Duration::from_secs(30);
/// How often it is looked whether it waits, and how long it may.
const TICK: Duration = Duration::from_millis(500);
const WAITS: Duration = Duration::from_millis(200);

/// Brings what is known to be read first.
pub async fn bring(host: &Host, described: &Described, reading: &[Reading]) -> Result<(), Failure> {
    let mut wanted = Vec::new();
    for read in reading {
        let of_it = described.prefetch.iter();
        let of_it = of_it.filter(|first| first.component == read.component);
        for range in of_it.flat_map(|first| &first.ranges) {
            let end = range.start.saturating_add(range.length).min(read.size);
            let mut at = range.start;
            while at < end {
                let next = end.min(at + MAX_LEN);
                wanted.push((read.disk.clone(), at..next));
                at = next;
            }
        }
    }
    let total: u64 = wanted
        .iter()
        .map(|(_, range)| range.end - range.start)
        .sum();
    let done = AtomicU64::new(0);
    let came = |len: u64| {
        host.tell(Progress {
            phase: Phase::Fetching,
            done: done.fetch_add(len, Ordering::Relaxed) + len,
            total: Some(total),
            rate: 0,
            peers: 0,
            written: 0,
            what: Some("what it reads first".to_owned()),
        });
    };
    stream::iter(wanted)
        .map(async |(disk, range)| {
            let len = range.end - range.start;
            disk.cache(range).await?;
            came(len);
            Ok::<_, ReadError>(())
        })
        .buffered(AT_ONCE)
        .try_collect::<()>()
        .await
        .map_err(|error| {
            Failure::new(
                FailureCode::Io,
                format!("fetching what is read first: {error}"),
            )
        })
}

/// Publishes what was read by a guest that was resumed, once that is over.
pub async fn publish_later(host: Arc<Host>, running: Arc<Running>) {
    let mut ran = Duration::ZERO;
    while ran < SETTLED {
        tokio::time::sleep(TICK).await;
        // Over a thin link it may take many minutes to run for these seconds.
        if running.parts.late().is_none_or(|late| late < WAITS) {
            ran += TICK;
        }
    }
    publish(&host, &running).await;
    std::future::pending().await
}

/// Publishes what was read so far, where the guest was resumed and nobody has told it yet.
pub async fn publish(host: &Host, running: &Running) {
    if running.parts.state.is_none() {
        return;
    }
    for read in &running.parts.reading {
        let ranges = match read.is_memory() {
            true => running.parts.ram.touched(),
            false => read.watched.touched(),
        };
        if ranges.is_empty() {
            continue;
        }
        let Some(component) = running.parts.root_of(read) else {
            continue;
        };
        let ranges = ranges.into_iter().take(MAX_PREFETCH_RANGES);
        let ranges = ranges.map(|(start, length)| ByteRange { start, length });
        let told = Prefetch {
            component,
            ranges: ranges.collect(),
        };
        if let Err(error) = host.daemon.ask(told, |_| {}).await {
            // Who may not publish does not tell: the next has to find out again.
            tracing::debug!(%error, "what was read first is not published");
        }
    }
}
