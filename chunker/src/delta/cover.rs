//! The stretches of old content that a frame is best compressed against.
//!
//! Each seed that the frame shares with old content votes for the windows that it lies in; the window with the most votes is taken,
//! its votes count no more, and so on (a greedy cover), as long as a window still brings something.

use std::ops::Range;

use capsule_proto::index::MAX_REFERENCES;

use super::old::OldSource;
use super::seeds::{Seed, WINDOW_LEN};
use super::similar::Similar;

/// Windows begin at multiples of this.
const STEP: u64 = 16 << 10;
/// Around what is shared, so much is taken too: equal stretches reach beyond their seeds.
const MARGIN: u64 = 4 << 10;
/// What lies between seeds further apart than this is left out: content that is not shared costs time, and pushes the rest
/// away.
const GAP: u64 = 32 << 10;
/// A window brings at least so many seeds.
const LEAST_VOTES: usize = 2;

/// How much a frame may refer to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Longest window, in bytes: a multiple of 16 KiB.
    pub window_len: u64,
    /// Most bytes together: the time to compress follows them.
    pub bytes: u64,
}

/// A window of old content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// Position among the sources.
    pub source: u16,
    /// The bytes.
    pub range: Range<u64>,
}

/// Chooses windows for a frame's content: in the order of the old content, without overlaps.
pub(crate) fn cover(
    similar: &Similar,
    sources: &[OldSource],
    content: &[u8],
    limits: &Limits,
) -> Vec<Window> {
    // One vote a seed and place: seed, source, byte.
    let mut votes: Vec<(usize, u16, u64)> = Vec::new();
    let mut count = 0;
    similar.seeds(content, 0, |Seed { hash, .. }| {
        votes.extend(
            similar
                .places(hash)
                .map(|place| (count, place.source, place.at)),
        );
        count += 1;
    });
    votes.sort_unstable_by_key(|(seed, source, at)| (*source, *at, *seed));
    let mut covered = vec![false; count];
    let mut windows: Vec<Window> = Vec::new();
    let mut left = limits.bytes;
    while left > 0
        && windows.len() < MAX_REFERENCES
        && let Some(window) = best(&votes, &covered, limits.window_len)
    {
        for (seed, ..) in &votes[window.clone()] {
            covered[*seed] = true;
        }
        let source = votes[window.start].1;
        let len = sources[usize::from(source)].content.len();
        for stretch in votes[window].chunk_by(|before, after| after.2 - before.2 <= GAP) {
            let (first, last) = (stretch[0].2, stretch[stretch.len() - 1].2);
            let start = first.saturating_sub(MARGIN);
            let end = (last + WINDOW_LEN as u64 + MARGIN).min(len);
            left = left.saturating_sub(end - start);
            windows.push(Window {
                source,
                range: start..end,
            });
        }
    }
    // What was found last brings least.
    windows.truncate(MAX_REFERENCES);
    join(windows)
}

/// The votes of the window that covers the most seeds not covered yet.
fn best(votes: &[(usize, u16, u64)], covered: &[bool], window_len: u64) -> Option<Range<usize>> {
    let mut best = None;
    let mut most = LEAST_VOTES - 1;
    let mut start = 0;
    while start < votes.len() {
        let (_, source, at) = votes[start];
        let from = at - at % STEP;
        let end = start
            + votes[start..].partition_point(|vote| vote.1 == source && vote.2 < from + window_len);
        // A seed that lies in a window twice is counted twice; that is rare, and brings something too.
        let fresh = votes[start..end]
            .iter()
            .filter(|(seed, ..)| !covered[*seed])
            .count();
        if fresh > most {
            most = fresh;
            let first = votes[start..end]
                .iter()
                .position(|(seed, ..)| !covered[*seed]);
            let last = votes[start..end]
                .iter()
                .rposition(|(seed, ..)| !covered[*seed]);
            best = first
                .zip(last)
                .map(|(first, last)| start + first..start + last + 1);
        }
        start += votes[start..].partition_point(|vote| vote.1 == source && vote.2 < from + STEP);
    }
    best
}

/// In order, overlapping ones joined.
fn join(mut windows: Vec<Window>) -> Vec<Window> {
    windows.sort_unstable_by_key(|window| (window.source, window.range.start));
    let mut joined: Vec<Window> = Vec::with_capacity(windows.len());
    for window in windows {
        match joined.last_mut() {
            Some(last) if last.source == window.source && window.range.start <= last.range.end => {
                last.range.end = last.range.end.max(window.range.end);
            }
            _ => joined.push(window),
        }
    }
    joined
}
