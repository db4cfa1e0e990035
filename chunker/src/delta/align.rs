//! Old content that lies under a frame byte by byte: what a difference is taken against.
//!
//! Compiled code that was built again is mostly the same instructions in the same order, with other addresses every few bytes.
//! Matches between such addresses are short; the bytewise difference is zero but for the addresses, and these differ by
//! the same few amounts (C. Percival, "Naive differences of executable code", 2003). So the frame is cut into stretches that each
//! lie at one distance from old content, as far as most bytes are equal.

use std::ops::Range;

use capsule_proto::index::MAX_REFERENCES;

use super::cover::Window;
use super::old::{OldError, OldReader, OldSource};
use super::seeds::{Seed, WINDOW_LEN};
use super::similar::{Place, Similar};

/// A difference can only pay where more than one in 32 of the frame's seeds has old content at its stretch's distance.
const LEAST_ALIGNED: (usize, usize) = (1, 32);

/// A stretch of the frame, and the old content that lies under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    start: usize,
    source: u16,
    /// Old offset of what would lie under the frame's first byte; below zero where only later bytes have something.
    base: i64,
}

/// The old content under each byte of a frame, as references that together are as long as the frame; none where most of the
/// frame has no old content under it.
pub(crate) fn align(
    similar: &Similar,
    sources: &[OldSource],
    content: &[u8],
) -> Result<Option<Vec<Window>>, OldError> {
    let (mut stretches, mut all, mut aligned) = (Vec::<Stretch>::new(), 0usize, 0usize);
    let mut last = 0;
    let mut old = OldReader::new(sources);
    let mut failed = None;
    similar.seeds(content, 0, |Seed { hash, at }| {
        if failed.is_some() || stretches.len() > MAX_REFERENCES {
            return;
        }
        all += 1;
        let at = at as usize;
        let goes_on = stretches.last().is_some_and(|stretch| {
            similar
                .places(hash)
                .any(|place| lies_at(&place, at) == (stretch.source, stretch.base))
        });
        if goes_on {
            aligned += 1;
        } else if let Some(place) = similar.places(hash).next() {
            let (source, base) = lies_at(&place, at);
            let new = Stretch {
                start: at,
                source,
                base,
            };
            let start = match stretches.last() {
                None => Ok(0),
                Some(before) => border(&mut old, before, &new, content, last..at),
            };
            match start {
                Ok(start) => stretches.push(Stretch { start, ..new }),
                Err(error) => failed = Some(error),
            }
            aligned += 1;
        } else {
            return;
        }
        last = at + WINDOW_LEN;
    });
    if let Some(error) = failed {
        return Err(error);
    }
    let (part, of) = LEAST_ALIGNED;
    if stretches.is_empty() || stretches.len() > MAX_REFERENCES || aligned * of <= all * part {
        return Ok(None);
    }
    Ok(windows(&stretches, sources, content.len()))
}

/// The source, and where the frame's first byte would lie in it.
fn lies_at(place: &Place, at: usize) -> (u16, i64) {
    (place.source, place.at as i64 - at as i64)
}

/// Where between two seeds one stretch had better end and the next begin: where most bytes are equal.
fn border(
    old: &mut OldReader<'_>,
    before: &Stretch,
    after: &Stretch,
    content: &[u8],
    between: Range<usize>,
) -> Result<usize, OldError> {
    if between.is_empty() {
        return Ok(after.start);
    }
    let first = old.under(before.source, before.base, between.clone())?;
    let second = old.under(after.source, after.base, between.clone())?;
    let equal = |old: &[u8], i: usize| i64::from(old.get(i) == Some(&content[between.start + i]));
    let (mut score, mut best, mut cut) = (0, 0, between.start);
    for i in 0..between.len() {
        score += equal(&first, i) - equal(&second, i);
        if score > best {
            (best, cut) = (score, between.start + i + 1);
        }
    }
    Ok(cut)
}

/// The old ranges, one after another; none where one would not lie within its source.
fn windows(stretches: &[Stretch], sources: &[OldSource], len: usize) -> Option<Vec<Window>> {
    let ends = stretches.iter().skip(1).map(|next| next.start).chain([len]);
    let mut windows: Vec<Window> = Vec::with_capacity(stretches.len());
    for (stretch, end) in stretches.iter().zip(ends) {
        let old_len = sources[usize::from(stretch.source)].content.len();
        let start = u64::try_from(stretch.base.checked_add(stretch.start as i64)?).ok()?;
        let end = u64::try_from(stretch.base.checked_add(end as i64)?).ok()?;
        if end > old_len {
            return None;
        }
        if start < end {
            windows.push(Window {
                of: stretch.source.into(),
                range: start..end,
            });
        }
    }
    Some(windows)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use capsule_proto::RootHash;
    use capsule_proto::index::{Source, SourceKind, Space};
    use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};

    use super::*;
    use crate::content::BytesSource;
    use crate::delta::SimilarOptions;

    fn aligned(old: &[u8], new: &[u8]) -> Option<Vec<Range<u64>>> {
        let sources = [OldSource {
            name: Source {
                kind: SourceKind::Parent,
                root: RootHash::of(old),
                space: Space::Stream,
                size: old.len() as u64,
            },
            content: Arc::new(BytesSource(old.to_vec())),
        }];
        let similar = Similar::build(&sources, &SimilarOptions::default(), &())
            .unwrap()
            .unwrap();
        let windows = align(&similar, &sources, new).unwrap()?;
        Some(windows.into_iter().map(|window| window.range).collect())
    }

    #[test]
    fn what_lies_under_moved_and_edited_content_is_found() {
        let mut random = SmallRng::seed_from_u64(1);
        let mut old = vec![0; 300_000];
        random.fill_bytes(&mut old);
        // Three pieces from other places, and an edit in every 500 bytes.
        let places = [100_000..140_000usize, 20_000..50_000, 200_001..230_001];
        let mut new: Vec<u8> = places
            .iter()
            .flat_map(|place| old[place.clone()].to_vec())
            .collect();
        for at in (0..new.len()).step_by(500) {
            new[at + random.random_range(0..400)] ^= 1;
        }
        let found = aligned(&old, &new).expect("it lies in three places");
        let len: u64 = found.iter().map(|range| range.end - range.start).sum();
        assert_eq!(len, new.len() as u64);
        let near = |a: u64, b: usize| a.abs_diff(b as u64) < 8;
        assert_eq!(found.len(), 3);
        for (found, place) in found.iter().zip(&places) {
            assert!(
                near(found.start, place.start) && near(found.end, place.end),
                "{found:?} for {place:?}"
            );
        }
        let differ = |old: &[u8], new: &[u8]| old.iter().zip(new).filter(|(a, b)| a != b).count();
        let under: Vec<u8> = found
            .iter()
            .flat_map(|range| old[range.start as usize..range.end as usize].to_vec())
            .collect();
        assert!(differ(&under, &new) < 250);
    }

    #[test]
    fn what_has_nothing_under_it_gets_nothing() {
        let mut random = SmallRng::seed_from_u64(2);
        let (mut old, mut new) = (vec![0; 100_000], vec![0; 50_000]);
        random.fill_bytes(&mut old);
        random.fill_bytes(&mut new);
        assert_eq!(aligned(&old, &new), None);
        // The old content begins only in the frame's middle: what is before it would lie before the old content.
        new[20_000..].copy_from_slice(&old[..30_000]);
        assert_eq!(aligned(&old, &new), None);
        // Or ends in it.
        random.fill_bytes(&mut new);
        new[..30_000].copy_from_slice(&old[70_000..]);
        assert_eq!(aligned(&old, &new), None);
    }
}
