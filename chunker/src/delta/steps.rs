//! How new content is old content with small changes, stretch by stretch: bsdiff's search (C. Percival, "Naive differences of
//! executable code", 2003), in the few megabytes of old content that a frame refers to.
//!
//! A stretch of the content lies at one distance from old content as long as most bytes are equal; what lies between two
//! stretches is new. Where `align` samples, this looks at each byte, so it finds short stretches too.

use crate::layer::Step;

/// Bytes that old and new content must have in common for a place to be looked at.
const SEED_LEN: usize = 8;
/// Places of one seed that are looked at, the last ones.
const MAX_PLACES: usize = 16;
/// A place is better than the one before where it has so many more equal bytes: what a step costs.
const LEAST_GAIN: usize = 8;
/// Longer matches need not be told apart.
const MAX_MATCH: usize = 32 << 10;
/// Bytes that must be equal for one that is not: as such bytes are dear, and might be found elsewhere.
const UNEQUAL: i64 = 2;
/// What equals the old content so far ahead needs no search.
const LONG: usize = 64;

/// Where each seed lies in old content: the last place, and for each place the one before.
struct Places {
    bits: u32,
    last: Vec<u32>,
    before: Vec<u32>,
}

const NONE: u32 = u32::MAX;

impl Places {
    fn of(old: &[u8]) -> Self {
        let count = (old.len() + 1).saturating_sub(SEED_LEN);
        let bits = count.max(1 << 10).next_power_of_two().ilog2();
        let mut places = Self {
            bits,
            last: vec![NONE; 1 << bits],
            before: vec![NONE; count],
        };
        for at in 0..count {
            let last = &mut places.last[hash(&old[at..], bits)];
            places.before[at] = std::mem::replace(last, at as u32);
        }
        places
    }

    /// The place with the longest match of the first bytes of `new`.
    fn longest(&self, old: &[u8], new: &[u8]) -> (usize, usize) {
        let mut best = (0, 0);
        if new.len() < SEED_LEN {
            return best;
        }
        let mut at = self.last[hash(new, self.bits)];
        let new = &new[..new.len().min(MAX_MATCH)];
        for _ in 0..MAX_PLACES {
            if at == NONE {
                break;
            }
            let len = common(&old[at as usize..], new);
            if len > best.1 {
                best = (at as usize, len);
            }
            at = self.before[at as usize];
        }
        best
    }
}

fn hash(bytes: &[u8], bits: u32) -> usize {
    let word = u64::from_le_bytes(bytes[..SEED_LEN].try_into().expect("eight bytes"));
    (word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - bits)) as usize
}

fn common(a: &[u8], b: &[u8]) -> usize {
    let words = a.chunks_exact(8).zip(b.chunks_exact(8));
    let equal = 8 * words.take_while(|(a, b)| a == b).count();
    let rest = a[equal..].iter().zip(&b[equal..]);
    equal + rest.take_while(|(a, b)| a == b).count()
}

/// The steps that make `new` of `old`.
pub(crate) fn steps(old: &[u8], new: &[u8]) -> Vec<Step> {
    let places = Places::of(old);
    let mut steps = Vec::new();
    // What was decided so far ends here in both.
    let (mut done, mut done_old) = (0usize, 0usize);
    // The distance of the last stretch: old minus new.
    let mut distance = 0isize;
    let (mut at, mut pos, mut len) = (0usize, 0usize, 0usize);
    let under = |at: usize, distance: isize| old.get(at.wrapping_add_signed(distance));
    while at < new.len() {
        at += len;
        // Equal bytes at the old distance, within the match that was found last.
        let (mut score, mut scored) = (0usize, at);
        while at < new.len() {
            let here = at.wrapping_add_signed(distance);
            let equal = old.get(here..).map_or(0, |old| common(old, &new[at..]));
            if equal >= LONG {
                at += equal;
                (score, scored, len) = (0, at, 0);
                continue;
            }
            (pos, len) = places.longest(old, &new[at..]);
            while scored < at + len {
                score += usize::from(under(scored, distance) == Some(&new[scored]));
                scored += 1;
            }
            if (len == score && len != 0) || len > score + LEAST_GAIN {
                break;
            }
            if scored <= at {
                scored = at + 1;
                score = 0;
            } else {
                score -= usize::from(under(at, distance) == Some(&new[at]));
            }
            at += 1;
        }
        if len == score && at < new.len() {
            continue;
        }
        let at_end = at >= new.len();
        // The stretch before goes on as long as bytes are equal, mostly.
        let ahead = (done..at).zip(done_old..old.len());
        let mut forward = best_len(ahead.map(|(new_at, old_at)| new[new_at] == old[old_at]));
        // The next began as long before.
        let mut back = if at_end {
            0
        } else {
            let behind = (done..at).rev().zip((0..pos).rev());
            best_len(behind.map(|(new_at, old_at)| new[new_at] == old[old_at]))
        };
        if done + forward > at - back {
            let overlap = done + forward - (at - back);
            let cut = border(
                old,
                new,
                overlap,
                done + forward - overlap,
                done_old + forward - overlap,
                pos - back,
            );
            forward = forward - overlap + cut;
            back -= cut;
        }
        let next_old = if at_end {
            done_old + forward
        } else {
            pos - back
        };
        steps.push(Step {
            over: forward as u32,
            new: (at - back - done - forward) as u32,
            seek: next_old as i32 - (done_old + forward) as i32,
        });
        (done, done_old) = (at - back, next_old);
        distance = pos as isize - at as isize;
    }
    steps
}

/// The length up to which most are equal: where the equal ones less twice the others are most.
fn best_len(equal: impl Iterator<Item = bool>) -> usize {
    let (mut score, mut best, mut len) = (0i64, 0, 0);
    for (i, equal) in equal.enumerate() {
        score += if equal { 1 } else { -UNEQUAL };
        if score > best {
            (best, len) = (score, i + 1);
        }
    }
    len
}

/// Where in an overlap the first stretch had better end.
fn border(old: &[u8], new: &[u8], len: usize, at: usize, first: usize, second: usize) -> usize {
    let (mut score, mut best, mut cut) = (0i64, 0, 0);
    for i in 0..len {
        score += i64::from(new[at + i] == old[first + i]);
        score -= i64::from(new[at + i] == old[second + i]);
        if score > best {
            (best, cut) = (score, i + 1);
        }
    }
    cut
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};

    use super::*;

    /// What steps make of the content's own bytes and the old ones; how many bytes lie over others.
    fn walk(old: &[u8], new: &[u8], steps: &[Step]) -> usize {
        let (mut at, mut pos, mut unequal) = (0usize, 0usize, 0);
        for step in steps {
            let over = step.over as usize;
            let pairs = new[at..at + over].iter().zip(&old[pos..pos + over]);
            unequal += pairs.filter(|(new, old)| new != old).count();
            at += over + step.new as usize;
            pos = (pos + over)
                .checked_add_signed(step.seek as isize)
                .expect("before the old content");
        }
        assert_eq!(at, new.len());
        unequal
    }

    #[test]
    fn moved_edited_and_new_content_is_told_apart() {
        let mut random = SmallRng::seed_from_u64(1);
        let (mut old, mut fresh) = (vec![0; 50_000], vec![0; 700]);
        random.fill_bytes(&mut old);
        random.fill_bytes(&mut fresh);
        let mut new = [&old[20_000..30_000], &fresh, &old[..10_000]].concat();
        let edits: Vec<usize> = (0..new.len()).step_by(40).collect();
        for at in &edits {
            new[at + random.random_range(0..30)] ^= 1;
        }
        let steps = steps(&old, &new);
        let unequal = walk(&old, &new, &steps);
        let fresh: u32 = steps.iter().map(|step| step.new).sum();
        assert!(steps.len() <= 4, "{steps:?}");
        assert!((650..760).contains(&fresh), "{steps:?}");
        assert!(unequal <= edits.len(), "{unequal}");
    }

    #[test]
    fn there_are_steps_for_anything() {
        for (old, new) in [(0, 1), (0, 100), (5, 100), (100, 5), (100, 100)] {
            let (old, new) = (vec![7; old], vec![7; new]);
            walk(&old, &new, &steps(&old, &new));
        }
        // Equal but for few bytes of much: each place is not searched to its end.
        let old = vec![0; 1 << 20];
        let mut new = old.clone();
        new.iter_mut().step_by(100_000).for_each(|byte| *byte = 1);
        assert!(walk(&old, &new, &steps(&old, &new)) <= 11);
    }

    proptest! {
        #[test]
        fn steps_make_any_content(old in prop::collection::vec(0..3u8, 0..600), new in prop::collection::vec(0..3u8, 1..600), cut: prop::sample::Index) {
            walk(&old, &new, &steps(&old, &new));
            // And where most is equal.
            let moved = [&old[cut.index(old.len() + 1)..], &new[..], &old[..]].concat();
            walk(&old, &moved, &steps(&old, &moved));
        }
    }
}
