//! What is encoded comes back: any range, all of it, on any number of threads; and the hashes are the content's.

mod layer_support;

use capsule_chunker::bao::tree_of;
use capsule_chunker::content::{Content, Progress};
use capsule_chunker::layer::Cuts;
use capsule_chunker::layer::encode::{ContentHashes, Outputs, encode};
use capsule_proto::index::{Codec, Index, RunFrom};
use capsule_proto::{FrameHash, RootHash};
use layer_support::*;
use proptest::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering};

/// Checks everything that can be told of an encoded source; returns its index.
fn check(source: &TestSource, encoded: TestEncoded, frame_max: u32, seed: u64) -> Index {
    let target = target(&encoded);
    let (encoded, pack) = encoded;
    match &encoded.content {
        ContentHashes::Stream(tree, outboard) => {
            let (expected, expected_outboard) = tree_of(&source.bytes);
            assert_eq!(
                (tree.root, tree.size),
                (RootHash::of(&source.bytes), source.len())
            );
            assert_eq!((*tree, outboard), (expected, &expected_outboard));
        }
        ContentHashes::Parts(roots) => assert_eq!(*roots, source.part_roots()),
        ContentHashes::Known => panic!("made from nothing"),
    }
    assert_eq!(
        (encoded.pack.root, encoded.pack.size),
        (RootHash::of(&pack), pack.len() as u64)
    );
    assert_eq!(encoded.pack_outboard, tree_of(&pack).1);
    let stats = encoded.stats;
    assert_eq!(stats.content, stats.zero + stats.repeated + stats.framed);

    let bytes = encoded.into_index(target);
    let index = Index::decode(&bytes).unwrap();
    let content = open(bytes, pack, Vec::new()).unwrap();
    assert_eq!(content.len(), source.len());
    check_ranges(&content, &source.bytes, seed, 12);
    let (restored, root) = restore_all(&content, 3).unwrap();
    assert!(restored == source.bytes);
    assert_eq!(root, RootHash::of(&source.bytes));
    check_frames(&index, &source.bytes, frame_max);
    index
}

/// Frames and spans have the hashes of what they hold, as the runs tell.
fn check_frames(index: &Index, plain: &[u8], frame_max: u32) {
    let mut contents: Vec<_> = index
        .frames
        .iter()
        .map(|frame| vec![0; frame.len as usize])
        .collect();
    for run in &index.runs {
        if let RunFrom::Frame { id, offset } = run.from {
            let bytes = &plain[run.start as usize..run.end() as usize];
            contents[id as usize][offset as usize..offset as usize + bytes.len()]
                .copy_from_slice(bytes);
        }
    }
    for (frame, content) in index.frames.iter().zip(&contents) {
        assert!(frame.len <= frame_max);
        assert_eq!(frame.hash, FrameHash::of(content));
        let mut rest = content.as_slice();
        for span in &frame.spans {
            let (now, later) = rest.split_at(span.len as usize);
            assert_eq!(span.hash, FrameHash::of(now));
            rest = later;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn streams_come_back(
        stretches in stretches(24),
        pages: bool,
        frame_max in prop::sample::select(vec![4096u32, 65_536, 256 << 10, 1 << 20]),
        seed: u64,
    ) {
        let source = TestSource::made_of(&stretches);
        let cuts = if pages { Cuts::Pages } else { Cuts::Bytes };
        let encoded = encode_to_memory(&source, &options(cuts, frame_max, 2)).unwrap();
        check(&source, encoded, frame_max, seed);
    }

    #[test]
    fn trees_come_back(
        stretches in stretches(24),
        ends in prop::collection::vec(any::<usize>(), 0..200),
        again in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        frame_max in prop::sample::select(vec![65_536u32, 1 << 20]),
        seed: u64,
    ) {
        // Some ends twice, for empty files.
        let again: Vec<_> = again.iter().filter(|_| !ends.is_empty()).map(|i| ends[i.index(ends.len())]).collect();
        let source = TestSource::made_of(&stretches).with_parts(&[ends, again].concat());
        let encoded = encode_to_memory(&source, &options(Cuts::Bytes, frame_max, 2)).unwrap();
        check(&source, encoded, frame_max, seed);
    }
}

/// More than a few slabs of everything at once, with files that are longer than a slab.
fn large_source() -> TestSource {
    let stretches = [
        Stretch::Text {
            len: 9 << 20,
            seed: 1,
        },
        Stretch::Zeros {
            len: 3 << 20,
            hole: true,
        },
        Stretch::Random {
            len: 5_000_001,
            seed: 2,
        },
        Stretch::Zeros {
            len: (8 << 20) + 77,
            hole: false,
        },
        Stretch::Again(0),
        Stretch::Again(2),
        Stretch::Zeros {
            len: 123_456,
            hole: true,
        },
    ];
    TestSource::made_of(&stretches)
}

#[test]
fn large_content_comes_back_the_same_on_any_number_of_threads() {
    let parts = [
        5,
        5,
        100,
        70_000,
        9 << 20,
        (9 << 20) + 10,
        16_000_000,
        16_000_000,
        40_000_000,
    ];
    for (source, cuts) in [
        (large_source(), Cuts::Bytes),
        (large_source(), Cuts::Pages),
        (large_source().with_parts(&parts), Cuts::Bytes),
    ] {
        let one = encode_to_memory(&source, &options(cuts, 1 << 20, 1)).unwrap();
        let many = encode_to_memory(&source, &options(cuts, 1 << 20, 5)).unwrap();
        assert!(one.1 == many.1);
        assert_eq!(one.0.pack, many.0.pack);
        let root = target(&one);
        let index = one.0.into_index(root);
        check(&source, many, 1 << 20, 7);
        assert_eq!(
            index,
            encode_to_memory(&source, &options(cuts, 1 << 20, 2))
                .unwrap()
                .0
                .into_index(root)
        );
    }
}

#[test]
fn holes_are_not_read_and_zeros_and_repeats_not_stored() {
    let source = large_source();
    let encoded = encode_to_memory(&source, &options(Cuts::Bytes, 1 << 20, 2)).unwrap();
    let holes: u64 = source
        .extents
        .iter()
        .filter(|extent| extent.zero)
        .map(|extent| extent.range.end - extent.range.start)
        .sum();
    assert_eq!(
        source.bytes_read.load(Ordering::Relaxed),
        source.len() - holes
    );
    let stats = encoded.0.stats;
    assert!(
        stats.zero >= (11 << 20) && stats.repeated > 13_000_000,
        "{stats}"
    );
    let index = check(&source, encoded, 1 << 20, 8);
    // Random bytes are stored, text is not.
    assert!(
        index
            .frames
            .iter()
            .any(|frame| frame.codec == Codec::Stored)
    );
    assert!(
        index
            .frames
            .iter()
            .any(|frame| frame.codec == Codec::Zstd && frame.pack_len < frame.len / 3)
    );
}

#[test]
fn nothing_and_empty_files_are_content_too() {
    for source in [
        TestSource::default(),
        TestSource::default().with_parts(&[]),
        TestSource::default().with_parts(&[0, 0, 0]),
    ] {
        let encoded = encode_to_memory(&source, &options(Cuts::Bytes, 1 << 20, 2)).unwrap();
        check(&source, encoded, 1 << 20, 0);
    }
}

#[test]
fn tiny_files_have_no_spans_of_their_own() {
    let lens: Vec<u64> = (0..100_000).map(|i| i % 60).collect();
    let bytes = text(3, lens.iter().sum::<u64>() as usize);
    let source = TestSource {
        parts: Some(lens),
        ..TestSource::new(bytes)
    };
    let encoded = encode_to_memory(&source, &options(Cuts::Bytes, 1 << 20, 2)).unwrap();
    let index = check(&source, encoded, 1 << 20, 1);
    let spans: usize = index
        .frames
        .iter()
        .map(|frame| frame.spans.len().max(1))
        .sum();
    assert!(spans <= source.bytes.len() / 8192 + 1, "{spans}");
}

#[test]
fn progress_adds_up() {
    #[derive(Default)]
    struct Count(AtomicU64, AtomicU64);
    impl Progress for Count {
        fn read(&self, bytes: u64) {
            self.0.fetch_add(bytes, Ordering::Relaxed);
        }
        fn written(&self, bytes: u64) {
            self.1.fetch_add(bytes, Ordering::Relaxed);
        }
    }
    let (source, count) = (large_source(), Count::default());
    let mut pack = Vec::new();
    let outputs = Outputs {
        pack: &mut pack,
        pack_outboard: Vec::new(),
        content_outboard: Vec::<u8>::new(),
    };
    encode(&source, &options(Cuts::Pages, 1 << 20, 2), outputs, &count).unwrap();
    assert_eq!(
        (count.0.into_inner(), count.1.into_inner()),
        (source.len(), pack.len() as u64)
    );
}
