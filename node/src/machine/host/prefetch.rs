//! What resuming reads first: brought before the guest runs, by what those read who resumed it before; and published for those who do it next.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capsule_chunker::content::ReadError;
use capsule_proto::record::MAX_PREFETCH_RANGES;
use capsule_proto::{CapsuleId, GroupRanges, RootHash};
use futures::{StreamExt, TryStreamExt, stream};

use super::parts::{Reading, describe};
use super::{Host, Running};
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
/// What is known of a capsule is told again, unless more was read beside it than this part of it.
const MISSED_PART: u64 = 16;

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
    note_first_reads(&running);
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
    let known = known(running);
    for (component, ranges) in first_reads(running) {
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
    let mut first = first_reads(running);
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

/// What was told of the capsule from which a guest was resumed.
fn known(running: &Running) -> Vec<Reads> {
    running.parts.described.iter().flat_map(told).collect()
}

/// What is known to be read first of each component: what this guest read until it had settled; before that, what was told of the capsule, or else
/// what it has read until this is asked first, as a capture reads too.
fn first_reads(running: &Running) -> Vec<Reads> {
    let mut first = lock(&running.first_reads);
    if first.is_empty() && running.parts.state.is_some() {
        let known = known(running);
        if !known.is_empty() {
            return known;
        }
        *first = reads(running);
    }
    first.clone()
}

/// Notes what a guest has read first that has settled now.
fn note_first_reads(running: &Running) {
    if running.parts.state.is_none() {
        return;
    }
    let (known, read) = (known(running), reads(running));
    let mut first = lock(&running.first_reads);
    if first.is_empty() {
        *first = if tells(&known, &read) {
            known
        } else {
            read.into_iter().map(|read| better(&known, read)).collect()
        };
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

/// Whether what is known tells what was read, but for a little, as no two guests read quite the same. It does not where it was handed on from a capsule
/// before, and much has happened since.
fn tells(known: &[Reads], read: &[Reads]) -> bool {
    let pages_of = |component: &str| {
        let mut known = known.iter().filter(|(name, _)| name == component);
        known
            .next()
            .map_or_else(GroupRanges::new, |(_, ranges)| pages(ranges))
    };
    let (mut told, mut missed) = (0, 0);
    for (component, ranges) in read {
        let (known, read) = (pages_of(component), pages(ranges));
        told += known.count();
        missed += read.difference(&known).count();
    }
    missed * MISSED_PART <= told
}

/// What was read of a component, or what is known of it where that tells it.
fn better(known: &[Reads], read: Reads) -> Reads {
    let of_it = known.iter().find(|(name, _)| *name == read.0);
    match of_it {
        Some(told) if tells(known, std::slice::from_ref(&read)) => told.clone(),
        _ => read,
    }
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
    fn what_is_known_is_told_until_it_misses_much() {
        let known = [
            reads("ram", &[(1000, 100), (0, 50)]),
            reads("disk0", &[(7, 10)]),
        ];
        assert!(tells(&known, &known));
        let little = [
            reads("ram", &[(0, 60), (1000, 3)]),
            reads("disk0", &[(7, 10)]),
        ];
        assert!(tells(&known, &little), "10 pages of 160 are new");
        let much = [reads("ram", &[(0, 60)]), reads("disk0", &[(0, 17)])];
        assert!(!tells(&known, &much), "17 are");
        assert!(!tells(&[], &little), "nothing is known");
        let ram = reads("ram", &[(0, 55)]);
        assert_eq!(better(&known, ram), known[0], "by component");
        assert_eq!(better(&known, much[1].clone()), much[1]);
        assert_eq!(better(&known[..1], much[1].clone()), much[1]);
        assert!(
            !tells(&known[..1], &[reads("disk0", &[(0, 1)])]),
            "not of this one"
        );
    }

    #[test]
    fn ranges_in_any_order_are_pages() {
        let ranges = [(5 * PAGE, 1), (2 * PAGE, 2 * PAGE), (0, PAGE + 1), (9, 0)];
        let ranges = ranges.map(|(start, length)| ByteRange { start, length });
        let all: GroupRanges = [0..4, 5..6].into_iter().collect();
        assert_eq!(pages(&ranges), all);
    }
}
