//! What a layer's own earlier frames have in common with later ones: programs that are nearly alike, or the same data beside other
//! data. Repeats of whole spans are found by `assemble`; this is for what is alike but in part.
//!
//! Only what the old content does not have counts, as a reference to that costs less to decode. What a reader decodes for a frame
//! stays bounded: it refers to few earlier frames, none of which refers to others, and all of them together to no more windows of old content than
//! one frame may alone. Decided in the order of the content, in bounded memory.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use capsule_proto::index::MAX_REFERENCES;

use crate::delta::{Limits, Seed, Similar, Vote, Window, cover, cover_old};

use super::encode::Against;

/// Bytes of earlier frames that are remembered.
const MAX_KEPT: usize = 128 << 20;
/// How many of them a frame may refer to.
const MAX_FRAMES: usize = 2;
/// How much of them a frame may refer to, at least: else as much as it is long.
const REFERENCES_LEN: u64 = 1 << 20;
/// Windows of them are as long as those of old content.
const WINDOW_LEN: u64 = 128 << 10;
/// A frame is referred to for at least so many seeds.
const LEAST_VOTES: usize = 2;
/// New content is to have one seed in so many from an earlier frame, as else nobody could refer to it for nothing. What resembles
/// old content may have any: there is less that is alike by chance.
const LEAST_SHARE: usize = 32;

/// The frames so far.
pub(super) struct Earlier<'a> {
    against: Option<&'a Against<'a>>,
    /// What the old content has.
    similar: &'a Similar,
    /// How frames refer to old content.
    limits: Limits,
    /// Where seeds lie: frame and byte in it.
    places: HashMap<u64, (u32, u32)>,
    /// The frames that seeds lie in, in order.
    frames: VecDeque<Kept>,
    /// Their bytes, and how many there may be.
    kept: usize,
    room: usize,
}

struct Kept {
    id: u32,
    content: Arc<Vec<u8>>,
    /// How many windows of old content it may refer to.
    windows: usize,
    seeds: Vec<u64>,
}

/// A part of an earlier frame.
#[derive(Clone)]
pub(super) struct Stretch {
    pub frame: u32,
    pub range: Range<usize>,
    content: Arc<Vec<u8>>,
}

/// What a frame is compressed against.
#[derive(Clone, Default)]
pub(super) struct Referred {
    /// Of old content.
    pub windows: Vec<Window>,
    /// Of earlier frames.
    pub earlier: Vec<Stretch>,
}

impl Stretch {
    pub fn bytes(&self) -> &[u8] {
        &self.content[self.range.clone()]
    }
}

impl<'a> Earlier<'a> {
    /// No frames yet. `similar` is of what the layer is made against.
    pub fn new(against: Option<&'a Against<'a>>, similar: &'a Similar, limits: Limits) -> Self {
        Self {
            against,
            similar,
            limits,
            places: HashMap::new(),
            frames: VecDeque::new(),
            kept: 0,
            room: MAX_KEPT,
        }
    }

    /// What the next frame had better refer to. Remembers it where that is no earlier frame.
    pub fn next(&mut self, id: u32, content: &[u8], alike: bool) -> Referred {
        let windows = match self.against {
            Some(against) if alike => {
                cover_old(self.similar, against.sources, content, &self.limits)
            }
            _ => Vec::new(),
        };
        let (mut all, mut fresh) = (0, Vec::new());
        self.similar.sample(content, |seed| {
            all += 1;
            if self.similar.places(seed.hash).next().is_none() {
                fresh.push(seed);
            }
        });
        let mut votes = self.votes(&fresh);
        let frames = self.frames(&votes, windows.len());
        votes.retain(|vote| frames.contains(&vote.of));
        let earlier = if alike || votes.len() * LEAST_SHARE >= all {
            let count = MAX_REFERENCES - windows.len();
            self.stretches(votes, fresh.len(), content.len() as u64, count)
        } else {
            Vec::new()
        };
        if earlier.is_empty() {
            self.keep(id, content, &fresh, windows.len());
        }
        Referred { windows, earlier }
    }

    fn votes(&self, seeds: &[Seed]) -> Vec<Vote> {
        let place = |(seed, found): (usize, &Seed)| {
            let (of, at) = *self.places.get(&found.hash)?;
            let at = at.into();
            Some(Vote { seed, of, at })
        };
        seeds.iter().enumerate().filter_map(place).collect()
    }

    /// The frames with the most votes, as far as a reader may be asked to decode them and what they refer to.
    fn frames(&self, votes: &[Vote], windows: usize) -> Vec<u32> {
        let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
        for vote in votes {
            *counts.entry(vote.of).or_default() += 1;
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.retain(|(_, count)| *count >= LEAST_VOTES);
        counts.sort_by_key(|(frame, count)| (Reverse(*count), *frame));
        let mut left = self.limits.count.saturating_sub(windows);
        let fits = |frame: &u32| {
            let takes = self.frame(*frame).windows;
            let fits = left > 0 && takes <= left;
            left -= if fits { takes } else { 0 };
            fits
        };
        let frames = counts.into_iter().map(|(frame, _)| frame);
        frames.filter(fits).take(MAX_FRAMES).collect()
    }

    fn stretches(&self, votes: Vec<Vote>, seeds: usize, len: u64, count: usize) -> Vec<Stretch> {
        let limits = Limits {
            window_len: WINDOW_LEN,
            bytes: REFERENCES_LEN.max(len),
            count,
        };
        let len_of = |frame: u32| self.frame(frame).content.len() as u64;
        let windows = cover(votes, seeds, len_of, &limits).into_iter();
        windows
            .map(|window| Stretch {
                frame: window.of,
                range: window.range.start as usize..window.range.end as usize,
                content: self.frame(window.of).content.clone(),
            })
            .collect()
    }

    fn frame(&self, id: u32) -> &Kept {
        let place = self.frames.partition_point(|frame| frame.id < id);
        &self.frames[place]
    }

    fn keep(&mut self, id: u32, content: &[u8], seeds: &[Seed], windows: usize) {
        let mut own = Vec::new();
        for seed in seeds {
            self.places.entry(seed.hash).or_insert_with(|| {
                own.push(seed.hash);
                (id, seed.at as u32)
            });
        }
        if own.is_empty() {
            return;
        }
        self.kept += content.len();
        self.frames.push_back(Kept {
            id,
            content: Arc::new(content.to_vec()),
            windows,
            seeds: own,
        });
        while self.kept > self.room
            && let Some(oldest) = self.frames.pop_front()
        {
            self.kept -= oldest.content.len();
            for seed in oldest.seeds {
                self.places.remove(&seed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;
    use crate::layer::encode::Effort;

    fn random(seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; 100_000];
        SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
        bytes
    }

    fn of_nothing(nothing: &Similar) -> Earlier<'_> {
        Earlier::new(None, nothing, Effort::Max.references())
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let nothing = Similar::nothing();
        let mut earlier = Earlier {
            room: 300_000,
            ..of_nothing(&nothing)
        };
        for id in 0..5 {
            let referred = earlier.next(id, &random(id.into()), false);
            assert!(referred.earlier.is_empty());
        }
        assert_eq!(earlier.kept, 300_000);
        let seeds: usize = earlier.frames.iter().map(|frame| frame.seeds.len()).sum();
        assert_eq!(earlier.places.len(), seeds);
        // One that was forgotten is as new; the last three are found, and what refers to one is not kept.
        let found = earlier.next(5, &random(3), false).earlier;
        assert!(found.iter().all(|stretch| stretch.frame == 3));
        let len: usize = found.iter().map(|stretch| stretch.range.len()).sum();
        assert!(len > 90_000, "{len}");
        assert_eq!(found[0].bytes(), &random(3)[found[0].range.clone()]);
        assert!(earlier.next(6, &random(1), false).earlier.is_empty());
        assert_eq!(earlier.frames.back().map(|frame| frame.id), Some(6));
    }

    #[test]
    fn new_content_needs_more_in_common_than_changed_content() {
        let nothing = Similar::nothing();
        let mut earlier = of_nothing(&nothing);
        earlier.next(0, &random(0), false);
        let with_a_little = |seed| [&random(0)[..2000], &random(seed)[2000..]].concat();
        assert!(earlier.next(1, &with_a_little(1), false).earlier.is_empty());
        let found = earlier.next(2, &with_a_little(2), true).earlier;
        assert_eq!(found.iter().map(|s| s.frame).collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn few_frames_are_referred_to_and_few_windows_through_them() {
        let nothing = Similar::nothing();
        let mut earlier = of_nothing(&nothing);
        for id in 0..8 {
            earlier.next(id, &random(id.into()), false);
        }
        let parts: Vec<u8> = (0..8)
            .flat_map(|of| random(of)[..12_000].to_vec())
            .collect();
        let frames = |earlier: &mut Earlier<'_>, id, alike| {
            let found = earlier.next(id, &parts, alike).earlier;
            let mut frames: Vec<u32> = found.iter().map(|stretch| stretch.frame).collect();
            frames.dedup();
            frames
        };
        assert_eq!(frames(&mut earlier, 8, true).len(), MAX_FRAMES);
        assert_eq!(frames(&mut earlier, 9, false).len(), MAX_FRAMES);
        // Of those that refer to much old content there is room for one.
        for kept in earlier.frames.iter_mut() {
            kept.windows = earlier.limits.count / 2 + 1;
        }
        assert_eq!(frames(&mut earlier, 10, true).len(), 1);
    }
}
