//! What resuming reads first: brought before the guest runs, by what those read who resumed it before; and published for those who do it next.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capsule_chunker::content::ReadError;
use capsule_proto::record::MAX_PREFETCH_RANGES;
use capsule_proto::{CapsuleId, GroupRanges, RootHash};
use futures::{StreamExt, TryStreamExt, stream};

use super::parts::{Reading, describe};
use super::{Host, Running, by_id};
use crate::control::{
    ByteRange, CapsuleRef, ComponentInfo, Described, Failure, FailureCode, Phase, Prefetch,
    Progress,
};
use crate::machine::touched::PAGE;

/// Ranges that are asked for at a time: enough that a thin link never idles, and in order.
const AT_ONCE: usize = 64;
/// Longest range that is asked for at once.
const MAX_LEN: u64 = 1 << 20;
/// When a resumed guest has run for so long without waiting, what it reads is no longer what resuming takes.
const SETTLED: Duration = Duration::from_secs(10);
/// How often it is looked whether it waits, and how long it may.
const TICK: Duration = Duration::from_millis(500);
const WAITS: Duration = Duration::from_millis(200);
/// What is known of a capsule is told again, with what else was read, if that is so many pages; and without it, if these are more than this part of it.
const LEAST_MISSED: u64 = 16;
const MISSED_PART: u64 = 8;

/// A component, and what is read of it first, in order.
pub type Reads = (String, Vec<ByteRange>);

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
    settled(&running).await;
    note_first_reads(&host, &running).await;
    publish(&host, &running).await;
    std::future::pending().await
}

/// Returns when a guest has run for some seconds without waiting for anything.
pub async fn settled(running: &Running) {
    let mut ran = Duration::ZERO;
    while ran < SETTLED {
        tokio::time::sleep(TICK).await;
        // Over a thin link it may take many minutes to run for these seconds.
        if running.parts.late().is_none_or(|late| late < WAITS) {
            ran += TICK;
        }
    }
}

/// Publishes what was read so far, where the guest was resumed and nobody has told it yet, or what was told misses much.
pub async fn publish(host: &Host, running: &Running) {
    if running.parts.state.is_none() {
        return;
    }
    let known = known(host, running).await;
    for (component, ranges) in first_reads(running, &known) {
        let before = known.iter().find(|(name, _)| *name == component);
        // What was told before it ran stays, unless it turned out to miss much.
        let renews = before.is_some_and(|(_, known)| *known != ranges);
        let mut reading = running.parts.reading.iter();
        let read = reading.find(|read| read.component == component);
        if let Some(root) = read.and_then(|read| running.parts.root_of(read)) {
            tell(host, root, ranges, renews).await;
        }
    }
}

/// Hands what is read first on to what was captured: it lies in the same places there. Who resumes that would have to find out again.
/// Where this guest was not resumed itself, what is known of its capture before this one, by those who resumed that.
pub async fn hand_on(
    host: &Host,
    running: &Running,
    before: Option<CapsuleId>,
    captured: &[ComponentInfo],
) {
    let mut first = first_reads(running, &known(host, running).await);
    if first.is_empty()
        && let Some(before) = before
        && let Ok(described) = describe(host, CapsuleRef(before.to_string())).await
    {
        first = told(&described);
    }
    for (component, ranges) in first {
        let mut all = captured.iter();
        if let Some(found) = all.find(|found| found.name == component) {
            tell(host, found.root, ranges, false).await;
        }
    }
}

/// What is told of a capsule, by component.
fn told(described: &Described) -> Vec<Reads> {
    let told = described.prefetch.iter();
    told.map(|of| (of.component.clone(), of.ranges.clone()))
        .collect()
}

/// What is told by now of the capsule from which a guest was resumed: a node that had just started may have heard of it later.
async fn known(host: &Host, running: &Running) -> Vec<Reads> {
    let Some(then) = &running.parts.described else {
        return Vec::new();
    };
    match describe(host, by_id(&then.capsule)).await {
        Ok(now) => told(&now),
        Err(_) => told(then),
    }
}

/// What is known to be read first of each component: what this guest read until it had settled; before that, what was told of the capsule, or else
/// what it has read until this is asked first, as a capture reads too.
fn first_reads(running: &Running, known: &[Reads]) -> Vec<Reads> {
    let mut first = lock(&running.first_reads);
    if first.is_empty() && running.parts.state.is_some() {
        if !known.is_empty() {
            return known.to_vec();
        }
        *first = reads(running);
    }
    first.clone()
}

/// Notes what a guest has read first that has settled now.
async fn note_first_reads(host: &Host, running: &Running) {
    if running.parts.state.is_none() {
        return;
    }
    let (known, read) = (known(host, running).await, reads(running));
    let mut first = lock(&running.first_reads);
    if first.is_empty() {
        *first = read.into_iter().map(|read| better(&known, read)).collect();
    }
}

/// What was read of each component so far.
fn reads(running: &Running) -> Vec<Reads> {
    let read = running.parts.reading.iter().map(|read| {
        let ranges = read.watched.touched().into_iter().take(MAX_PREFETCH_RANGES);
        let ranges = ranges.map(|(start, length)| ByteRange { start, length });
        (read.component.clone(), ranges.collect())
    });
    read.collect()
}

/// What is to be told of a component: what is known of it, as no two guests read quite the same, and what was read beside that, as over a thin link each such page
/// is waited for by itself. Where that is much, only what was read: what is known was handed on from a capsule before, and much has happened since.
fn better(known: &[Reads], (component, read): Reads) -> Reads {
    let of_it = known.iter().find(|(name, _)| *name == component);
    let Some((_, told)) = of_it else {
        return (component, read);
    };
    let pages_told = pages(told);
    let missed = pages(&read).difference(&pages_told).count();
    let ranges = if missed < LEAST_MISSED {
        told.clone()
    } else if missed * MISSED_PART > pages_told.count() {
        read
    } else {
        let missed = read.iter().flat_map(|range| beside(range, &pages_told));
        let all = told.iter().copied().chain(missed);
        all.take(MAX_PREFETCH_RANGES).collect()
    };
    (component, ranges)
}

/// What of a range is in no page that is told.
fn beside(range: &ByteRange, told: &GroupRanges) -> Vec<ByteRange> {
    let all = pages(std::slice::from_ref(range));
    let missed = all.difference(told);
    let runs = missed.runs().iter().map(|run| ByteRange {
        start: run.start * PAGE,
        length: (run.end - run.start) * PAGE,
    });
    runs.collect()
}

/// The pages of ranges.
fn pages(ranges: &[ByteRange]) -> GroupRanges {
    let page = |range: &ByteRange| {
        let end = range.start.saturating_add(range.length);
        range.start / PAGE..end.div_ceil(PAGE)
    };
    let mut pages: Vec<_> = ranges
        .iter()
        .map(page)
        .filter(|run| !run.is_empty())
        .collect();
    // In order each is put behind the others.
    pages.sort_unstable_by_key(|run| run.start);
    pages.into_iter().collect()
}

async fn tell(host: &Host, component: RootHash, ranges: Vec<ByteRange>, renews: bool) {
    if ranges.is_empty() {
        return;
    }
    let told = Prefetch {
        component,
        ranges,
        renews,
    };
    if let Err(error) = host.daemon.ask(told, |_| {}).await {
        // Who may not publish does not tell: the next has to find out again.
        tracing::debug!(%error, "what was read first is not published");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reads(component: &str, pages: &[(u64, u64)]) -> Reads {
        let range = |&(start, length): &(u64, u64)| ByteRange {
            start: start * PAGE,
            length: length * PAGE,
        };
        (component.to_owned(), pages.iter().map(range).collect())
    }

    #[test]
    fn what_is_known_is_told_with_what_it_misses_until_that_is_much() {
        let known = [
            reads("ram", &[(1000, 100), (0, 150)]),
            reads("disk0", &[(7, 10)]),
        ];
        let told = |component: &str, pages: &[(u64, u64)]| better(&known, reads(component, pages));
        assert_eq!(told("ram", &[(1000, 100), (0, 150)]), known[0]);
        assert_eq!(told("ram", &[(0, 165), (1000, 3)]), known[0], "a little");
        let more = [(1000, 100), (0, 150), (500, 6), (150, 10)];
        assert_eq!(told("ram", &[(500, 6), (0, 160)]), reads("ram", &more));
        let most = [(1000, 100), (0, 150), (150, 31)];
        assert_eq!(told("ram", &[(0, 181)]), reads("ram", &most));
        let much = reads("ram", &[(0, 182)]);
        assert_eq!(better(&known, much.clone()), much);
        assert_eq!(better(&[], much.clone()), much, "nothing is known");
        let disk = reads("disk0", &[(0, 40)]);
        assert_eq!(better(&known, disk.clone()), disk, "by component");
        assert_eq!(told("disk0", &[(0, 17)]), known[1]);
    }

    #[test]
    fn ranges_in_any_order_are_pages() {
        let ranges = [(5 * PAGE, 1), (2 * PAGE, 2 * PAGE), (0, PAGE + 1), (9, 0)];
        let ranges = ranges.map(|(start, length)| ByteRange { start, length });
        let all: GroupRanges = [0..4, 5..6].into_iter().collect();
        assert_eq!(pages(&ranges), all);
    }
}
