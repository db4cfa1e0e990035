//! The stretches of old content that a frame is best compressed against.
//!
//! Each seed that the frame shares with old content votes for the windows that it lies in; the window with the most votes is taken,
//! its votes count no more, and so on (a greedy cover), as long as a window still brings something.

use std::ops::Range;

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
    /// Most windows: what a reader decodes follows them.
    pub count: usize,
}

/// A place of old content where a seed of the frame lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vote {
    /// Position among the frame's seeds.
    pub seed: usize,
    /// Which content: a source, or an earlier frame.
    pub of: u32,
    /// First byte in it.
    pub at: u64,
}

/// A window of old content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    /// Which content, as votes have it.
    pub of: u32,
    /// The bytes.
    pub range: Range<u64>,
}

/// Chooses windows of old content for a frame's content.
pub(crate) fn cover_old(
    similar: &Similar,
    sources: &[OldSource],
    content: &[u8],
    limits: &Limits,
) -> Vec<Window> {
    let (mut votes, mut seeds) = (Vec::new(), 0);
    similar.seeds(content, 0, |Seed { hash, .. }| {
        votes.extend(similar.places(hash).map(|place| Vote {
            seed: seeds,
            of: place.source.into(),
            at: place.at,
        }));
        seeds += 1;
    });
    let len_of = |source: u32| sources[source as usize].content.len();
    cover(votes, seeds, len_of, limits)
}

/// Chooses windows for a frame of so many seeds: in the order of the old content, without overlaps. `len_of` tells how long a
/// content is.
pub(crate) fn cover(
    mut votes: Vec<Vote>,
    seeds: usize,
    len_of: impl Fn(u32) -> u64,
    limits: &Limits,
) -> Vec<Window> {
    votes.sort_unstable_by_key(|vote| (vote.of, vote.at, vote.seed));
    let mut covered = vec![false; seeds];
    let mut windows: Vec<Window> = Vec::new();
    let mut left = limits.bytes;
    while left > 0
        && windows.len() < limits.count
        && let Some(window) = best(&votes, &covered, limits.window_len)
    {
        for vote in &votes[window.clone()] {
            covered[vote.seed] = true;
        }
        let of = votes[window.start].of;
        let len = len_of(of);
        for stretch in votes[window].chunk_by(|before, after| after.at - before.at <= GAP) {
            let (first, last) = (stretch[0].at, stretch[stretch.len() - 1].at);
            let start = first.saturating_sub(MARGIN);
            let end = (last + WINDOW_LEN as u64 + MARGIN).min(len);
            left = left.saturating_sub(end - start);
            windows.push(Window {
                of,
                range: start..end,
            });
        }
    }
    // What was found last brings least.
    windows.truncate(limits.count);
    join(windows)
}

/// The votes of the window that covers the most seeds not covered yet.
fn best(votes: &[Vote], covered: &[bool], window_len: u64) -> Option<Range<usize>> {
    let mut best = None;
    let mut most = LEAST_VOTES - 1;
    let mut start = 0;
    while start < votes.len() {
        let Vote { of, at, .. } = votes[start];
        let from = at - at % STEP;
        let end = start
            + votes[start..].partition_point(|vote| vote.of == of && vote.at < from + window_len);
        // A seed that lies in a window twice is counted twice; that is rare, and brings something too.
        let fresh = votes[start..end]
            .iter()
            .filter(|vote| !covered[vote.seed])
            .count();
        if fresh > most {
            most = fresh;
            let first = votes[start..end]
                .iter()
                .position(|vote| !covered[vote.seed]);
            let last = votes[start..end]
                .iter()
                .rposition(|vote| !covered[vote.seed]);
            best = first
                .zip(last)
                .map(|(first, last)| start + first..start + last + 1);
        }
        start += votes[start..].partition_point(|vote| vote.of == of && vote.at < from + STEP);
    }
    best
}

/// In order, overlapping ones joined.
fn join(mut windows: Vec<Window>) -> Vec<Window> {
    windows.sort_unstable_by_key(|window| (window.of, window.range.start));
    let mut joined: Vec<Window> = Vec::with_capacity(windows.len());
    for window in windows {
        match joined.last_mut() {
            Some(last) if last.of == window.of && window.range.start <= last.range.end => {
                last.range.end = last.range.end.max(window.range.end);
            }
            _ => joined.push(window),
        }
    }
    joined
}
