//! Hashing: what local data has of a layer's frames is not read from the pack, and what local data no longer has is noticed.

mod layer_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use capsule_chunker::content::{Content, Extents, ReadError, Source};
use capsule_chunker::layer::encode::{Effort, EncodeOptions, Outputs, encode};
use capsule_chunker::layer::read::{LayerCache, LayerContent, ReadOptions};
use capsule_chunker::layer::{Cuts, LayerSource};
use capsule_chunker::like::Likeness;
use capsule_proto::index::Index;
use capsule_proto::{GROUP_LEN, GroupRanges, RootHash};
use layer_support::*;
use positioned_io::ReadAt;
use proptest::prelude::*;

/// A pack of which only some chunk groups are here.
struct Partial {
    bytes: Vec<u8>,
    here: GroupRanges,
}

impl ReadAt for Partial {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<usize> {
        let end = offset + buf.len() as u64;
        let groups = offset / GROUP_LEN..end.div_ceil(GROUP_LEN);
        if !self.here.contains_run(&groups) {
            return Err(std::io::Error::other("it is not here"));
        }
        self.bytes.as_slice().read_at(offset, buf)
    }
}

/// An index, and the pack.
type Layer = (Vec<u8>, Vec<u8>);

fn layer(bytes: &[u8], cuts: Cuts, frame_max: u32) -> Layer {
    let mut pack = Vec::new();
    let outputs = Outputs {
        pack: &mut pack,
        pack_outboard: Vec::new(),
        content_outboard: Vec::<u8>::new(),
    };
    let options = EncodeOptions {
        effort: Effort::Default,
        earlier: true,
        ..options(cuts, frame_max, 2)
    };
    let encoded = encode(&TestSource::new(bytes.to_vec()), &options, outputs, &()).unwrap();
    (encoded.into_index(RootHash::of(bytes)), pack)
}

fn open_with(index: &[u8], pack: impl ReadAt + Send + Sync + 'static) -> LayerContent {
    let cache = LayerCache::new(&ReadOptions::default());
    LayerContent::open(Arc::new(index.to_vec()), Arc::new(pack), Vec::new(), &cache).unwrap()
}

/// Opens a layer of which only what local data lacks is here; and how much of the pack that is.
fn with_local(layer: &Layer, likeness: &Likeness) -> (LayerContent, u64) {
    let (index, pack) = layer;
    let (local, here) = likeness.local(&open_with(index, Vec::new()), &()).unwrap();
    let bytes = here.bytes(pack.len() as u64);
    let partial = Partial {
        bytes: pack.clone(),
        here,
    };
    (open_with(index, partial).with_local(local), bytes)
}

fn wanting(layer: &Layer) -> Likeness {
    let mut likeness = Likeness::new();
    likeness
        .want(&open_with(&layer.0, Vec::new()), &())
        .unwrap();
    likeness
}

/// Files of a disk, each in whole pages, in an order.
fn disk(files: &[Vec<u8>], order: &[usize]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for file in order {
        bytes.extend(&files[*file]);
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
    }
    bytes
}

fn files() -> Vec<Vec<u8>> {
    (0..40)
        .map(|i| random(i, 1000 + 40_000 * i as usize))
        .collect()
}

/// Of frames that refer to others some are found, or those that they refer to, or neither.
#[test]
fn frames_that_refer_to_others_are_made_of_what_is_here() {
    let (first, other) = (random(1, 900_000), random(2, 200_000));
    let mut second = first.clone();
    second.iter_mut().step_by(1900).for_each(|byte| *byte ^= 1);
    let there = [&first[..], &other, &second].concat();
    let target = layer(&there, Cuts::Bytes, 128 << 10);
    let frames = Index::decode(&target.0).unwrap().frames;
    assert!(frames.iter().filter(|frame| frame.depth > 0).count() >= 4);
    let whole = target.1.len() as u64;
    for (here, most) in [(&first, 400_000), (&second, whole), (&other, 1_050_000)] {
        let mut likeness = wanting(&target);
        let source = Arc::new(TestSource::new(here.clone()));
        likeness.look_in(source, Cuts::Bytes, &()).unwrap();
        let (content, fetched) = with_local(&target, &likeness);
        assert!(fetched <= most, "{fetched} of {whole}");
        assert!(restore_all(&content, 2).unwrap().0 == there);
        check_ranges(&content, &there, 3, 9);
    }
}

#[test]
fn a_disk_with_the_same_files_elsewhere_is_mostly_found() {
    let files = files();
    let there = disk(&files, &(0..40).collect::<Vec<_>>());
    let here = disk(&files, &(0..40).rev().collect::<Vec<_>>());
    let target = layer(&there, Cuts::Pages, 256 << 10);
    // In local data, and in a layer that is held.
    let mut scanned = wanting(&target);
    assert!(scanned.is_open());
    scanned
        .look_in(Arc::new(TestSource::new(here.clone())), Cuts::Pages, &())
        .unwrap();
    let held = layer(&here, Cuts::Pages, 256 << 10);
    let mut tabled = wanting(&target);
    tabled
        .look_in_layer(&Arc::new(open_with(&held.0, held.1)), None, &())
        .unwrap();
    for likeness in [scanned, tabled] {
        let (content, bytes) = with_local(&target, &likeness);
        assert!(
            bytes < there.len() as u64 * 4 / 10,
            "{bytes} of {}",
            there.len()
        );
        let (restored, root) = restore_all(&content, 3).unwrap();
        assert!(restored == there);
        assert_eq!(root, RootHash::of(&there));
        check_ranges(&content, &there, 7, 20);
        // Encoded anew, it is a layer of its own, from nothing.
        let source = LayerSource::new(Arc::new(content), None);
        let mut pack = Vec::new();
        let outputs = Outputs {
            pack: &mut pack,
            pack_outboard: Vec::new(),
            content_outboard: Vec::new(),
        };
        let encoded = encode(&source, &options(Cuts::Pages, 1 << 20, 2), outputs, &()).unwrap();
        let again = open_with(&encoded.into_index(root), pack);
        assert!(restore_all(&again, 2).unwrap().0 == there);
    }
}

#[test]
fn where_all_is_found_nothing_of_the_pack_is_read() {
    let there = random(1, 3 << 20);
    let target = layer(&there, Cuts::Pages, 256 << 10);
    let mut likeness = wanting(&target);
    let same = Arc::new(TestSource::new(there.clone()));
    likeness.look_in(same, Cuts::Pages, &()).unwrap();
    let (content, bytes) = with_local(&target, &likeness);
    assert_eq!(bytes, 0);
    assert!(restore_all(&content, 2).unwrap().0 == there);
}

/// Frames of which many are equal, and short.
#[test]
fn tiny_frames_make_no_tiny_spans() {
    let there = random(1, 5000);
    let target = layer(&there, Cuts::Bytes, 1);
    let mut likeness = wanting(&target);
    let local = Arc::new(TestSource::new(random(2, 3 << 20)));
    likeness.look_in(local, Cuts::Bytes, &()).unwrap();
    assert!(likeness.is_open());
}

/// Content that changes.
struct Drifting {
    bytes: Vec<u8>,
    drifted: AtomicBool,
}

impl Content for Drifting {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let start = offset as usize;
        buf.copy_from_slice(&self.bytes[start..start + buf.len()]);
        if self.drifted.load(Ordering::Relaxed) {
            buf.iter_mut().for_each(|byte| *byte ^= 1);
        }
        Ok(())
    }
}

impl Source for Drifting {
    fn extents(&self) -> Extents<'_> {
        let all = capsule_chunker::content::Extent {
            range: 0..self.len(),
            zero: false,
        };
        Box::new(std::iter::once(Ok(all)))
    }
    fn check_unchanged(&self) -> Result<(), ReadError> {
        Ok(())
    }
}

#[test]
fn local_data_that_changed_is_noticed_at_reading() {
    let there = random(1, 2 << 20);
    let target = layer(&there, Cuts::Bytes, 1 << 20);
    let local = Arc::new(Drifting {
        bytes: [random(2, 777), there.clone()].concat(),
        drifted: AtomicBool::new(false),
    });
    let mut likeness = wanting(&target);
    likeness.look_in(local.clone(), Cuts::Bytes, &()).unwrap();
    let (content, bytes) = with_local(&target, &likeness);
    assert!(bytes < there.len() as u64 / 2, "{bytes}");
    local.drifted.store(true, Ordering::Relaxed);
    let error = restore_all(&content, 2).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("no longer has"), "{error}");
    // What was noticed is not kept.
    local.drifted.store(false, Ordering::Relaxed);
    assert!(restore_all(&content, 2).unwrap().0 == there);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    // Whatever is found, what is read is the content.
    #[test]
    fn what_is_found_is_right(
        ours in stretches(10),
        theirs in stretches(10),
        shared in stretches(6),
        pages: bool,
        frame_max in prop::sample::select(vec![4096u32, 65_536, 1 << 20]),
    ) {
        let cuts = if pages { Cuts::Pages } else { Cuts::Bytes };
        let made = |stretches: &[Stretch]| TestSource::made_of(stretches).bytes;
        let there = [made(&theirs), made(&shared)].concat();
        let here = [made(&ours), made(&shared)].concat();
        prop_assume!(!there.is_empty());
        let target = layer(&there, cuts, frame_max);
        let mut likeness = wanting(&target);
        likeness.look_in(Arc::new(TestSource::new(here.clone())), cuts, &()).unwrap();
        let held = layer(&here, cuts, 1 << 20);
        likeness.look_in_layer(&Arc::new(open_with(&held.0, held.1)), None, &()).unwrap();
        let (content, bytes) = with_local(&target, &likeness);
        prop_assert!(bytes <= target.1.len() as u64);
        prop_assert!(restore_all(&content, 2).unwrap().0 == there);
    }
}
