//! Layers that this encoder does not write yet: copies, inherited ranges, references and differences, against plain bytes.

mod layer_support;

use std::num::NonZeroUsize;
use std::sync::Arc;

use capsule_chunker::content::{BytesSource, Content};
use capsule_chunker::layer::codec::{Compressor, Packed, Step, lzma_against, patch};
use capsule_proto::index::{
    Codec, Frame, Index, IndexBuilder, IndexHeader, Reference, ReferenceTo, Run, RunFrom, Source,
    SourceKind, Space, Span,
};
use capsule_proto::{FrameHash, GroupRanges, RootHash};
use layer_support::*;
use proptest::prelude::*;
use proptest::sample::Index as Pick;

/// What a run of the target is to be.
#[derive(Clone, Debug)]
enum Plan {
    Inherit,
    Zero,
    Copy {
        source: Pick,
        from: Pick,
    },
    /// Part of a frame that exists already.
    Earlier {
        frame: Pick,
        from: Pick,
    },
    New {
        codec: u8,
        references: Vec<(bool, Pick, Pick, u32)>,
        seed: u64,
    },
}

fn plans() -> impl Strategy<Value = Vec<(Plan, usize)>> {
    let references = prop::collection::vec(
        (any::<bool>(), any::<Pick>(), any::<Pick>(), 1..60_000u32),
        1..5,
    );
    let plan = prop_oneof![
        Just(Plan::Inherit),
        Just(Plan::Zero),
        (any::<Pick>(), any::<Pick>()).prop_map(|(source, from)| Plan::Copy { source, from }),
        (any::<Pick>(), any::<Pick>()).prop_map(|(frame, from)| Plan::Earlier { frame, from }),
        (0..7u8, references, any::<u64>()).prop_map(|(codec, references, seed)| Plan::New {
            codec,
            references,
            seed
        }),
    ];
    prop::collection::vec((plan, 1..60_000usize), 0..30)
}

/// A layer in the making, and what it must come to.
struct Making {
    sources: Vec<Vec<u8>>,
    target: Vec<u8>,
    pack: Vec<u8>,
    builder: IndexBuilder,
    frames: Vec<(Vec<u8>, u8)>,
}

impl Making {
    fn new() -> Self {
        let sources = vec![text(1, 500_000), random(2, 300_000), text(3, 100_000)];
        Self {
            sources,
            target: Vec::new(),
            pack: Vec::new(),
            builder: IndexBuilder::new(),
            frames: Vec::new(),
        }
    }

    fn run(&mut self, from: RunFrom, bytes: &[u8]) {
        let run = Run {
            start: self.target.len() as u64,
            len: bytes.len() as u64,
            from,
        };
        self.builder.push_run(run).unwrap();
        self.target.extend_from_slice(bytes);
    }

    fn add(&mut self, plan: &Plan, len: usize) {
        match plan {
            // Beyond the parent's end there is nothing to inherit.
            Plan::Inherit if self.target.len() + len <= self.sources[0].len() => {
                let start = self.target.len();
                self.target
                    .extend_from_slice(&self.sources[0][start..start + len]);
            }
            Plan::Copy { source, from } => {
                let source = source.index(self.sources.len());
                let (offset, bytes) = piece(&self.sources[source], from, len);
                self.run(
                    RunFrom::Copy {
                        source: source as u16,
                        offset: offset as u64,
                    },
                    &bytes,
                );
            }
            Plan::Earlier { frame, from } if !self.frames.is_empty() => {
                let id = frame.index(self.frames.len());
                let (offset, bytes) = piece(&self.frames[id].0, from, len);
                self.run(
                    RunFrom::Frame {
                        id: id as u32,
                        offset: offset as u32,
                    },
                    &bytes,
                );
            }
            Plan::New {
                codec,
                references,
                seed,
            } => self.new_frame(*codec, references, *seed, len),
            Plan::Zero | Plan::Inherit | Plan::Earlier { .. } => {
                self.run(RunFrom::Zero, &vec![0; len])
            }
        }
    }

    fn new_frame(&mut self, codec: u8, wanted: &[(bool, Pick, Pick, u32)], seed: u64, len: usize) {
        let (mut references, mut prefix, mut depth) = (Vec::new(), Vec::new(), 0);
        for (in_frame, which, from, len) in wanted.iter().filter(|_| (2..6).contains(&codec)) {
            let shallow: Vec<_> = (0..self.frames.len())
                .filter(|id| self.frames[*id].1 < 8)
                .collect();
            let (to, content) = if *in_frame && !shallow.is_empty() {
                let id = shallow[which.index(shallow.len())];
                depth = depth.max(self.frames[id].1 + 1);
                (ReferenceTo::Frame(id as u32), &self.frames[id].0)
            } else {
                let source = which.index(self.sources.len());
                (ReferenceTo::Source(source as u16), &self.sources[source])
            };
            let (offset, bytes) = piece(content, from, *len as usize);
            references.push(Reference {
                to,
                offset: offset as u64,
                len: bytes.len() as u32,
            });
            prefix.extend(bytes);
        }
        // Something like the references, as new versions are.
        let mut content = if prefix.is_empty() {
            text(seed, len)
        } else {
            prefix.iter().copied().cycle().take(len).collect()
        };
        content
            .iter_mut()
            .skip(seed as usize % 97)
            .step_by(1013)
            .for_each(|byte| *byte ^= 0x55);
        if codec == 3 {
            content.truncate(prefix.len());
        }
        let mut compressor = Compressor::new(1);
        let (codec, packed) = match codec {
            0 => (Codec::Stored, content.clone()),
            1 => match compressor.compress(&content).unwrap() {
                Packed::Stored => (Codec::Stored, content.clone()),
                Packed::Zstd(packed) => (Codec::Zstd, packed),
                Packed::Lzma(packed) => (Codec::Lzma, packed),
            },
            2 => (
                Codec::ZstdReferences,
                compressor.compress_against(&content, &prefix).unwrap(),
            ),
            4 => (
                Codec::LzmaReferences,
                lzma_against(&content, &prefix).unwrap(),
            ),
            5 => {
                let over = content.len().min(prefix.len());
                let steps = [Step {
                    over: over as u32,
                    new: (content.len() - over) as u32,
                    seek: -(over as i32),
                }];
                match patch(&content, &prefix, &steps).unwrap() {
                    Some(packed) => packed,
                    None => (
                        Codec::LzmaReferences,
                        lzma_against(&content, &prefix).unwrap(),
                    ),
                }
            }
            6 => (Codec::Lzma, lzma_against(&content, &[]).unwrap()),
            _ => {
                let difference: Vec<u8> = content
                    .iter()
                    .zip(&prefix)
                    .map(|(new, old)| new.wrapping_sub(*old))
                    .collect();
                (
                    Codec::Difference,
                    compressor.compress_against(&difference, &[]).unwrap(),
                )
            }
        };
        let middle = content.len() / 2;
        let spans = [&content[..middle], &content[middle..]].map(|bytes| Span {
            len: bytes.len() as u32,
            hash: FrameHash::of(bytes),
        });
        let frame = Frame {
            pack_offset: self.pack.len() as u64,
            pack_len: packed.len() as u32,
            len: content.len() as u32,
            codec,
            hash: FrameHash::of(&content),
            depth,
            references,
            spans: if middle > 0 {
                spans.to_vec()
            } else {
                Vec::new()
            },
        };
        let id = self.builder.push_frame(frame).unwrap();
        self.pack.extend(packed);
        self.frames.push((content.clone(), depth));
        self.run(RunFrom::Frame { id, offset: 0 }, &content);
    }

    fn header(&self) -> IndexHeader {
        let kinds = [
            SourceKind::Parent,
            SourceKind::ParentCapsule,
            SourceKind::SameCapsule,
        ];
        let source = |(kind, bytes): (SourceKind, &Vec<u8>)| Source {
            kind,
            root: RootHash::of(bytes),
            space: Space::Stream,
            size: bytes.len() as u64,
        };
        IndexHeader {
            space: Space::Stream,
            parent: Some(RootHash::of(&self.sources[0])),
            target: RootHash::of(&self.target),
            target_size: self.target.len() as u64,
            sources: kinds.into_iter().zip(&self.sources).map(source).collect(),
        }
    }

    fn contents(&self) -> Vec<Arc<dyn Content>> {
        self.sources
            .iter()
            .map(|bytes| Arc::new(BytesSource(bytes.clone())) as Arc<dyn Content>)
            .collect()
    }
}

fn piece(content: &[u8], from: &Pick, len: usize) -> (usize, Vec<u8>) {
    let offset = from.index(content.len());
    (
        offset,
        content[offset..(offset + len).min(content.len())].to_vec(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_layer_reads_as_its_plan_says(plans in plans(), seed: u64) {
        let mut making = Making::new();
        plans.iter().for_each(|(plan, len)| making.add(plan, *len));
        let (header, sources) = (making.header(), making.contents());
        let index = std::mem::take(&mut making.builder).finish(&header);
        prop_assert!(Index::decode(&index).is_ok());
        let content = open(index, making.pack.clone(), sources).unwrap();
        check_ranges(&content, &making.target, seed, 12);
        let (restored, root) = restore_all(&content, 2).unwrap();
        prop_assert!(restored == making.target);
        prop_assert_eq!(root, header.target);
        prop_assert!(!content.is_its_pack().unwrap() || making.pack.starts_with(&making.target));
        if let Some(mut unproved) = content.unproved().unwrap() {
            let all = &GroupRanges::all(making.pack.len() as u64);
            let proved = unproved.prove(&content, (all, all), u64::MAX, NonZeroUsize::MIN, &());
            prop_assert!(proved.is_ok() && unproved.left() == 0);
        }
    }
}

/// Index and pack of frames of 10,000 bytes by those codecs; the component is those of them that `order` says, without their first bytes.
fn of_frames(codecs: &[u8], order: &[u32], skip: u32) -> (Vec<u8>, Vec<u8>, Vec<Arc<dyn Content>>) {
    let mut making = Making::new();
    let frames = codecs.iter().zip(1u64..);
    frames.for_each(|(codec, seed)| making.new_frame(*codec, &[], seed, 10_000));
    let (content, pack) = (std::mem::take(&mut making.frames), making.pack.clone());
    let mut index = IndexBuilder::new();
    let packed = Index::decode(&std::mem::take(&mut making.builder).finish(&making.header()));
    let packed = packed.unwrap();
    packed.frames.into_iter().for_each(|frame| {
        index.push_frame(frame).unwrap();
    });
    making.builder = index;
    making.target.clear();
    for id in order {
        let from = RunFrom::Frame {
            id: *id,
            offset: skip,
        };
        making.run(from, &content[*id as usize].0[skip as usize..]);
    }
    let (header, sources) = (making.header(), making.contents());
    let index = std::mem::take(&mut making.builder).finish(&header);
    (index, pack, sources)
}

#[test]
fn a_layer_of_stored_frames_in_order_is_its_pack() {
    let is_its_pack = |codecs: &[u8], order: &[u32], skip: u32| {
        let (index, pack, sources) = of_frames(codecs, order, skip);
        let content = open(index, pack, sources).unwrap();
        let is_its_pack = content.is_its_pack().unwrap();
        assert_eq!(content.unproved().unwrap().is_some(), is_its_pack);
        is_its_pack
    };
    assert!(is_its_pack(&[0, 0, 0], &[0, 1, 2], 0));
    assert!(!is_its_pack(&[0, 0, 0], &[0, 2, 1], 0), "another order");
    assert!(!is_its_pack(&[0, 0, 0], &[1, 2], 0), "not from its start");
    assert!(!is_its_pack(&[0, 0, 0], &[0, 1, 2], 5), "parts of frames");
    assert!(!is_its_pack(&[0, 1, 0], &[0, 1, 2], 0), "compressed");
    assert!(!is_its_pack(&[0, 0, 0], &[0, 1, 1], 0), "one of them twice");
}

#[test]
fn frames_of_a_pack_are_proved_as_it_comes() {
    let (index, mut pack, sources) = of_frames(&[0, 0, 0], &[0, 1, 2], 0);
    let (one, none) = (NonZeroUsize::MIN, GroupRanges::new());
    let [first, second, all] = [0..1, 1..2, 0..2].map(GroupRanges::from);
    let content = open(index.clone(), pack.clone(), sources.clone()).unwrap();
    let mut unproved = content.unproved().unwrap().unwrap();
    let mut prove = |here, fresh, most| {
        let proved = unproved.prove(&content, (here, fresh), most, one, &());
        (proved.unwrap(), unproved.left())
    };
    // The first chunk group ends in the middle of the second frame.
    assert_eq!(prove(&first, &first, u64::MAX), (10_000, 20_000));
    assert_eq!(prove(&first, &first, u64::MAX), (0, 20_000), "once");
    assert_eq!(prove(&all, &none, u64::MAX), (0, 20_000), "nothing new");
    assert_eq!(prove(&all, &second, 1), (10_000, 10_000), "all of a frame");
    assert_eq!(prove(&all, &second, u64::MAX), (10_000, 0));

    pack[25_000] ^= 1;
    let content = open(index, pack, sources).unwrap();
    for threads in [1, 4] {
        let threads = NonZeroUsize::new(threads).unwrap();
        let mut unproved = content.unproved().unwrap().unwrap();
        let mut prove = |groups| {
            let proved = unproved.prove(&content, (groups, groups), u64::MAX, threads, &());
            (proved, unproved.left())
        };
        assert_eq!(prove(&first).0.unwrap(), 10_000);
        for _ in 0..2 {
            let (proved, left) = prove(&all);
            let error = proved.unwrap_err().to_string();
            assert!(error.starts_with("frame 2, at byte 20000"), "{error}");
            assert_eq!(left, 20_000);
        }
    }
}

// The content of one layer is the parent of the next.
#[test]
fn layers_stack() {
    let source = TestSource::made_of(&[
        Stretch::Text {
            len: 500_000,
            seed: 9,
        },
        Stretch::Random {
            len: 100_000,
            seed: 1,
        },
    ]);
    let encoded = encode_to_memory(
        &source,
        &options(capsule_chunker::layer::Cuts::Pages, 65_536, 2),
    )
    .unwrap();
    let root = target(&encoded);
    let base = open(encoded.0.into_index(root), encoded.1, Vec::new()).unwrap();

    let edit = b"edited";
    let mut builder = IndexBuilder::new();
    let frame = Frame {
        pack_offset: 0,
        pack_len: 6,
        len: 6,
        codec: Codec::Stored,
        hash: FrameHash::of(edit),
        depth: 0,
        references: Vec::new(),
        spans: Vec::new(),
    };
    let id = builder.push_frame(frame).unwrap();
    builder
        .push_run(Run {
            start: 100_000,
            len: 6,
            from: RunFrom::Frame { id, offset: 0 },
        })
        .unwrap();
    builder
        .push_run(Run {
            start: 500_000,
            len: 50_000,
            from: RunFrom::Copy {
                source: 0,
                offset: 7,
            },
        })
        .unwrap();
    let mut plain = source.bytes[..550_000].to_vec();
    plain[100_000..100_006].copy_from_slice(edit);
    plain[500_000..].copy_from_slice(&source.bytes[7..50_007]);
    let parent = Source {
        kind: SourceKind::Parent,
        root,
        space: Space::Stream,
        size: source.len(),
    };
    let header = IndexHeader {
        space: Space::Stream,
        parent: Some(root),
        target: RootHash::of(&plain),
        target_size: plain.len() as u64,
        sources: vec![parent],
    };
    let content = open(builder.finish(&header), edit.to_vec(), vec![Arc::new(base)]).unwrap();
    check_ranges(&content, &plain, 4, 20);
    assert!(restore_all(&content, 2).unwrap().0 == plain);
}
