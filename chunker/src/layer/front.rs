//! Another order of a layer's frames: what is read first lies together, at the front of the pack.
//!
//! A pack is asked for in chunk groups, and a frame of memory is shorter than one: in the order of the content, who reads here and there fetches
//! mostly what lies between. Frames stay as they are; only where they lie changes, and so their ids.

use std::ops::Range;

use capsule_proto::index::{BuildError, Frame, Index, IndexBuilder, ReferenceTo, RunFrom};
use capsule_proto::ranges::groups_touching;
use capsule_proto::{GROUP_LEN, GroupRanges};

/// An order of a layer's frames.
#[derive(Debug, PartialEq, Eq)]
pub struct Front {
    /// Ids as they were, in the new order.
    order: Vec<u32>,
    /// How many of them are read first.
    first: usize,
}

impl Front {
    /// The order in which the frames that these ranges of the content take come first, each set in the order in which it was; none where that is
    /// the order already.
    pub fn of(index: &Index, mut reads: Vec<Range<u64>>) -> Option<Self> {
        reads.sort_unstable_by_key(|range| range.start);
        let mut is_first = vec![false; index.frames.len()];
        let mut at = 0;
        for run in &index.runs {
            while reads.get(at).is_some_and(|range| range.end <= run.start) {
                at += 1;
            }
            if let RunFrom::Frame { id, .. } = run.from
                && reads.get(at).is_some_and(|range| range.start < run.end())
            {
                is_first[id as usize] = true;
            }
        }
        // Frames refer to earlier ones, which come with them.
        for (id, frame) in index.frames.iter().enumerate().rev() {
            if !is_first[id] {
                continue;
            }
            for reference in &frame.references {
                if let ReferenceTo::Frame(earlier) = reference.to {
                    is_first[earlier as usize] = true;
                }
            }
        }
        let ids = 0..index.frames.len() as u32;
        let (mut order, rest): (Vec<u32>, Vec<u32>) = ids.partition(|id| is_first[*id as usize]);
        let first = order.len();
        order.extend(rest);
        (!order.is_sorted()).then_some(Self { order, first })
    }

    /// Bytes of the chunk groups that what is read first touches: as the frames lay, and in front.
    pub fn fetched(&self, index: &Index) -> (u64, u64) {
        let (mut groups, mut len) = (GroupRanges::new(), 0_u64);
        for place in self.places(index).take(self.first) {
            groups.insert(groups_touching(&place));
            len += place.end - place.start;
        }
        (groups.count() * GROUP_LEN, len.next_multiple_of(GROUP_LEN))
    }

    /// Where the frames lie in the pack as it was, in the new order.
    pub fn places<'a>(&'a self, index: &'a Index) -> impl Iterator<Item = Range<u64>> + 'a {
        let frames = self.order.iter().map(|id| &index.frames[*id as usize]);
        frames.map(|frame| frame.pack_offset..frame.pack_offset + u64::from(frame.pack_len))
    }

    /// The index with the frames in the new order.
    pub fn index(&self, index: &Index) -> Result<Vec<u8>, BuildError> {
        let mut ids = vec![0; self.order.len()];
        for (id, was) in (0..).zip(&self.order) {
            ids[*was as usize] = id;
        }
        let mut builder = IndexBuilder::new();
        for was in &self.order {
            let frame = &index.frames[*was as usize];
            let mut references = frame.references.clone();
            for reference in &mut references {
                if let ReferenceTo::Frame(id) = &mut reference.to {
                    *id = ids[*id as usize];
                }
            }
            builder.push_frame(Frame {
                pack_offset: builder.pack_len(),
                references,
                ..frame.clone()
            })?;
        }
        for run in &index.runs {
            let mut run = *run;
            if let RunFrom::Frame { id, .. } = &mut run.from {
                *id = ids[*id as usize];
            }
            builder.push_run(run)?;
        }
        Ok(builder.finish(index.directory.header()))
    }
}

#[cfg(test)]
mod tests {
    use capsule_proto::index::{Codec, IndexHeader, Reference, Run, Space};
    use capsule_proto::{FrameHash, RootHash};

    use super::*;

    /// Frames of 10 bytes each, of which number n is stored in n + 1 bytes, the content in their order; `references` are pairs of frames.
    fn index(count: u32, references: &[(u32, u32)]) -> Index {
        stored(count, references, |id| id + 1)
    }

    /// The same, of which each is stored in so many bytes.
    fn stored(count: u32, references: &[(u32, u32)], len: impl Fn(u32) -> u32) -> Index {
        let mut builder = IndexBuilder::new();
        for id in 0..count {
            let to = references.iter().filter(|(from, _)| *from == id);
            let references: Vec<_> = to
                .map(|(_, to)| Reference {
                    to: ReferenceTo::Frame(*to),
                    offset: 0,
                    len: 10,
                })
                .collect();
            let frame = Frame {
                pack_offset: builder.pack_len(),
                pack_len: len(id),
                len: 10,
                codec: match references.is_empty() {
                    true => Codec::Zstd,
                    false => Codec::ZstdReferences,
                },
                hash: FrameHash::of(&[id as u8]),
                depth: u8::from(!references.is_empty()),
                references,
                spans: Vec::new(),
            };
            builder.push_frame(frame).unwrap();
            let (start, len) = (10 * u64::from(id), 10);
            let from = RunFrom::Frame { id, offset: 0 };
            builder.push_run(Run { start, len, from }).unwrap();
        }
        let header = IndexHeader {
            space: Space::Stream,
            parent: None,
            target: RootHash::of(b"target"),
            target_size: 10 * u64::from(count),
            sources: Vec::new(),
        };
        Index::decode(&builder.finish(&header)).unwrap()
    }

    /// The frames' places in the pack, by the content's order.
    fn lie(index: &Index) -> Vec<u64> {
        let frame = |run: &Run| match run.from {
            RunFrom::Frame { id, .. } => &index.frames[id as usize],
            other => panic!("{other:?}"),
        };
        let frames = index.runs.iter().map(frame);
        frames.map(|frame| frame.pack_offset).collect()
    }

    #[test]
    fn what_is_read_first_lies_in_front_with_what_it_refers_to() {
        let before = index(5, &[(4, 1)]);
        let front = Front::of(&before, vec![40..41, 25..26, 29..30]).unwrap();
        let places: Vec<_> = front.places(&before).collect();
        assert_eq!(places, [1..3, 3..6, 10..15, 0..1, 6..10]);
        let after = Index::decode(&front.index(&before).unwrap()).unwrap();
        assert_eq!(lie(&after), [10, 0, 2, 11, 5]);
        assert_eq!(after.frames[2].references[0].to, ReferenceTo::Frame(0));
        assert_eq!(after.directory.header(), before.directory.header());
        let hashes = |index: &Index| -> Vec<_> {
            let frames = index.runs.iter().map(|run| match run.from {
                RunFrom::Frame { id, .. } => index.frames[id as usize].hash,
                other => panic!("{other:?}"),
            });
            frames.collect()
        };
        assert_eq!(hashes(&after), hashes(&before));
    }

    #[test]
    fn what_is_fetched_of_it_is_counted_in_chunk_groups() {
        const LEN: u32 = 5000;
        let index = stored(100, &[], |_| LEN);
        // Bytes 50,000 to 55,000 lie in group 3; 100,000 to 105,000 in 6; 115,000 to 120,000 in 7: the last two in neighbours.
        let front = Front::of(&index, vec![100..101, 200..201, 230..231]).unwrap();
        assert_eq!(front.fetched(&index), (3 * GROUP_LEN, GROUP_LEN));
        let front = Front::of(&index, vec![10..500, 500..990]).unwrap();
        let all = (98 * u64::from(LEN)).next_multiple_of(GROUP_LEN);
        assert_eq!(front.fetched(&index), (31 * GROUP_LEN, all));
    }

    #[test]
    fn an_order_that_is_right_stays() {
        let before = index(4, &[]);
        let of = |reads: &[(u64, u64)]| {
            let reads = reads.iter().map(|(start, end)| *start..*end);
            Front::of(&before, reads.collect())
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[(0, 5), (19, 20)]), None, "the first two");
        assert_eq!(of(&[(0, 40)]), None, "all");
        assert_eq!(of(&[(40, 50)]), None, "beyond the end");
        assert!(of(&[(10, 11)]).is_some());
        // Ranges that lie within each other.
        assert_eq!(of(&[(0, 40), (5, 6), (30, 31)]), None);
    }
}
