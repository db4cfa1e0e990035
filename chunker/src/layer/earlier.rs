//! What a layer's own earlier frames have in common with later ones: programs that are nearly alike, or the same data beside other
//! data. Repeats of whole spans are found by `assemble`; this is for what is alike but in part.
//!
//! Only what the old content does not have counts, as a reference to that costs less to decode. A frame that may refer to others
//! is not referred to: of many that are alike all refer to the first, and a reader decodes no more than one frame and those. Decided
//! in the order of the content, in bounded memory.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use crate::delta::{Limits, Seed, Similar, Vote, cover};

/// Bytes of earlier frames that are remembered.
const MAX_KEPT: usize = 128 << 20;
/// How much of them a frame may refer to, at least: else as much as it is long.
const REFERENCES_LEN: u64 = 1 << 20;
/// Windows of them are as long as those of old content.
const WINDOW_LEN: u64 = 128 << 10;
/// New content is to have one seed in so many from earlier frames, as else nobody could refer to it for nothing. What resembles old
/// content may have any: there is less that is alike by chance.
const LEAST_SHARE: usize = 32;

/// The frames so far.
pub(super) struct Earlier<'a> {
    /// What the old content has.
    similar: &'a Similar,
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
    seeds: Vec<u64>,
}

/// A part of an earlier frame.
#[derive(Clone)]
pub(super) struct Stretch {
    pub frame: u32,
    pub range: Range<usize>,
    content: Arc<Vec<u8>>,
}

impl Stretch {
    pub fn bytes(&self) -> &[u8] {
        &self.content[self.range.clone()]
    }
}

impl<'a> Earlier<'a> {
    /// No frames yet.
    pub fn new(similar: &'a Similar) -> Self {
        Self {
            similar,
            places: HashMap::new(),
            frames: VecDeque::new(),
            kept: 0,
            room: MAX_KEPT,
        }
    }

    /// What of earlier frames the next one had better refer to; remembers it where that is nothing.
    pub fn next(&mut self, id: u32, content: &[u8], alike: bool) -> Vec<Stretch> {
        let (mut all, mut fresh) = (0, Vec::new());
        self.similar.sample(content, |seed| {
            all += 1;
            if self.similar.places(seed.hash).next().is_none() {
                fresh.push(seed);
            }
        });
        let votes = self.votes(&fresh);
        let stretches = if alike || votes.len() * LEAST_SHARE >= all {
            self.stretches(votes, fresh.len(), content.len() as u64)
        } else {
            Vec::new()
        };
        if stretches.is_empty() {
            self.keep(id, content, &fresh);
        }
        stretches
    }

    fn votes(&self, seeds: &[Seed]) -> Vec<Vote> {
        let place = |(seed, found): (usize, &Seed)| {
            let (of, at) = *self.places.get(&found.hash)?;
            let at = at.into();
            Some(Vote { seed, of, at })
        };
        seeds.iter().enumerate().filter_map(place).collect()
    }

    fn stretches(&self, votes: Vec<Vote>, seeds: usize, len: u64) -> Vec<Stretch> {
        let limits = Limits {
            window_len: WINDOW_LEN,
            bytes: REFERENCES_LEN.max(len),
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

    fn keep(&mut self, id: u32, content: &[u8], seeds: &[Seed]) {
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

    fn random(seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; 100_000];
        SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
        bytes
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let nothing = Similar::nothing();
        let mut earlier = Earlier {
            room: 300_000,
            ..Earlier::new(&nothing)
        };
        for id in 0..5 {
            assert!(earlier.next(id, &random(id.into()), false).is_empty());
        }
        assert_eq!(earlier.kept, 300_000);
        let seeds: usize = earlier.frames.iter().map(|frame| frame.seeds.len()).sum();
        assert_eq!(earlier.places.len(), seeds);
        // One that was forgotten is as new; the last three are found, and what refers to one is not kept.
        let found = earlier.next(5, &random(3), false);
        assert!(found.iter().all(|stretch| stretch.frame == 3));
        let len: usize = found.iter().map(|stretch| stretch.range.len()).sum();
        assert!(len > 90_000, "{len}");
        assert_eq!(found[0].bytes(), &random(3)[found[0].range.clone()]);
        assert!(earlier.next(6, &random(1), false).is_empty());
        assert_eq!(earlier.frames.back().map(|frame| frame.id), Some(6));
    }

    #[test]
    fn new_content_needs_more_in_common_than_changed_content() {
        let nothing = Similar::nothing();
        let mut earlier = Earlier::new(&nothing);
        earlier.next(0, &random(0), false);
        let mut little = random(1);
        little[..2000].copy_from_slice(&random(0)[..2000]);
        assert!(earlier.next(1, &little, false).is_empty());
        assert!(!earlier.next(2, &little, true).is_empty());
    }
}
