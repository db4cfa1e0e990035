//! Frames that refer to earlier ones of their layer: what is alike in part is stored once, comes back as it was, and leads no deeper
//! than one step.

mod layer_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use capsule_chunker::content::{BytesSource, Content};
use capsule_chunker::delta::Outline;
use capsule_chunker::layer::Cuts;
use capsule_chunker::layer::encode::{Effort, EncodeOptions};
use capsule_chunker::layer::read::{LayerCache, LayerContent, ReadOptions};
use capsule_proto::RootHash;
use capsule_proto::index::{Index, ReferenceTo, SourceKind, Space};
use capsule_proto::manifest::ComponentKind;
use layer_support::*;

const LEN: usize = 700_000;

fn with_earlier(effort: Effort, threads: usize) -> EncodeOptions {
    EncodeOptions {
        effort,
        earlier: true,
        ..options(Cuts::Bytes, 256 << 10, threads)
    }
}

/// A program, as another version of its sources would have made it.
fn variant(program: &[u8], every: usize) -> Vec<u8> {
    let mut variant = program.to_vec();
    variant
        .iter_mut()
        .skip(every / 2)
        .step_by(every)
        .for_each(|byte| *byte ^= 1);
    variant
}

/// Three programs that are nearly alike, and data beside them that is not.
fn programs() -> Vec<u8> {
    let first = random(1, LEN);
    let others = [variant(&first, 1900), variant(&first, 2300)];
    [
        &first,
        &random(2, LEN),
        &others[0],
        &random(3, LEN / 2),
        &others[1],
    ]
    .map(Vec::as_slice)
    .concat()
}

/// How many frames refer to others, after a check of what they refer to.
fn referring(index: &Index) -> usize {
    let mut count = 0;
    for frame in &index.frames {
        let frames = frame
            .references
            .iter()
            .filter_map(|reference| match reference.to {
                ReferenceTo::Frame(to) => Some(&index.frames[to as usize]),
                ReferenceTo::Source(_) => None,
            });
        let depths: Vec<u8> = frames.map(|to| to.depth).collect();
        assert!(depths.iter().all(|depth| *depth == 0), "{depths:?}");
        assert_eq!(frame.depth, u8::from(!depths.is_empty()));
        count += usize::from(frame.depth);
    }
    count
}

#[test]
fn what_is_alike_is_stored_once() {
    let new = programs();
    let source = TestSource::new(new.clone());
    for effort in [Effort::Fast, Effort::Max] {
        let (encoded, pack) = encode_to_memory(&source, &with_earlier(effort, 2)).unwrap();
        let index = encoded.into_index(RootHash::of(&new));
        let frames = Index::decode(&index).unwrap();
        assert!(referring(&frames) >= 4, "{}", referring(&frames));
        let least = LEN * 5 / 2;
        assert!(pack.len() < least + least / 20, "{} of {least}", pack.len());
        // Each frame is decoded once, those that are referred to as well.
        let reads = Arc::new(AtomicU64::new(0));
        let cache = LayerCache::new(&ReadOptions::default());
        let counted = Arc::new(Counted(pack, reads.clone()));
        let content = LayerContent::open(Arc::new(index), counted, Vec::new(), &cache).unwrap();
        assert!(restore_all(&content, 3).unwrap().0 == new);
        assert_eq!(reads.load(Ordering::Relaxed), frames.frames.len() as u64);
        let mut some = vec![0; 5000];
        content.read_at((LEN * 2 + 77) as u64, &mut some).unwrap();
        assert!(some == new[LEN * 2 + 77..][..5000]);
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let source = TestSource::new(programs());
    let made = |threads| {
        let (encoded, pack) =
            encode_to_memory(&source, &with_earlier(Effort::Fast, threads)).unwrap();
        (encoded.into_index(RootHash::of(&source.bytes)), pack)
    };
    assert!(made(1) == made(4));
}

#[test]
fn only_the_highest_effort_without_a_bound_refers_to_frames() {
    let options = |effort| EncodeOptions::new(ComponentKind::Tree, effort);
    assert!(options(Effort::Max).earlier && options(Effort::Max).bounded(None).earlier);
    assert!(!options(Effort::Default).earlier);
    assert!(!EncodeOptions::new(ComponentKind::Ram, Effort::Max).earlier);
    let bounded = options(Effort::Max).bounded(Some(65_536));
    assert!(!bounded.earlier && bounded.frame_max == 65_536);
    let (encoded, _) = encode_to_memory(&TestSource::new(programs()), &bounded).unwrap();
    let index = encoded.into_index(RootHash::of(b"any"));
    assert_eq!(referring(&Index::decode(&index).unwrap()), 0);
}

/// An update that may refer to frames of its own.
fn update(old: &[u8], new: &[u8], effort: Effort) -> Update {
    let source = TestSource::new(new.to_vec());
    let outline = Outline::unknown(new.len() as u64);
    let sources = [old_source(old, SourceKind::Parent, Space::Stream)];
    make_update(&source, &outline, &sources, true, &with_earlier(effort, 2))
}

#[test]
fn what_old_content_has_is_not_looked_for_elsewhere() {
    let (old, fresh) = (random(1, LEN), random(4, LEN));
    // Both variants are in part as the old program, and in part as each other.
    let one = [variant(&old, 1900), fresh.clone()].concat();
    let other = [variant(&old, 2300), variant(&fresh, 2100)].concat();
    let new = [one, random(5, LEN), other].concat();
    let Update { index, pack } = update(&old, &new, Effort::Default);
    let frames = Index::decode(&index).unwrap();
    let of_sources = frames.frames.iter().flat_map(|frame| &frame.references);
    let of_sources = of_sources.filter(|reference| matches!(reference.to, ReferenceTo::Source(_)));
    let of_sources: u64 = of_sources.map(|reference| u64::from(reference.len)).sum();
    assert!(of_sources as usize >= LEN * 3 / 2, "{of_sources}");
    assert!(referring(&frames) >= 2);
    // What both variants have of the old program is not taken from the first of them: three frames of `fresh`, and borders.
    let of_frames = frames.frames.iter().flat_map(|frame| &frame.references);
    let of_frames = of_frames.filter(|reference| matches!(reference.to, ReferenceTo::Frame(_)));
    let of_frames: u64 = of_frames.map(|reference| u64::from(reference.len)).sum();
    assert!(of_frames as usize <= LEN * 3 / 2, "{of_frames}");
    assert!(pack.len() < LEN * 2 + LEN / 5, "{}", pack.len());
    let layer = open(index, pack, vec![Arc::new(BytesSource(old))]).unwrap();
    assert!(restore_all(&layer, 2).unwrap().0 == new);
}

#[test]
fn references_of_both_kinds_fit_together() {
    // Pieces of many places of the old content, too short for copies, and between them what is new, but the same in all frames.
    let (old, fresh) = (random(1, 8 << 20), random(2, 24 * 3900));
    let piece = |i: usize| {
        let fresh = &fresh[i % 24 * 3900..][..3900];
        [&old[i * 150_000..][..7000], fresh].concat()
    };
    let new: Vec<u8> = (0..50).flat_map(piece).collect();
    let Update { index, pack } = update(&old, &new, Effort::Max);
    let frames = Index::decode(&index).unwrap();
    assert!(referring(&frames) >= 1);
    let most = frames.frames.iter().map(|frame| frame.references.len());
    assert!(most.max().is_some_and(|most| (20..=64).contains(&most)));
    let layer = open(index, pack, vec![Arc::new(BytesSource(old.clone()))]).unwrap();
    assert!(restore_all(&layer, 2).unwrap().0 == new);
}
