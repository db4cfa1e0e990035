//! What is damaged, dishonest or out of order is refused, with an error that says where.

mod layer_support;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use capsule_chunker::content::{BytesSource, Content, ReadError};
use capsule_chunker::layer::codec::{Compressor, FrameFault, Packed};
use capsule_chunker::layer::read::{LayerCache, LayerContent, LayerError, ReadOptions};
use capsule_chunker::layer::restore::RestoreError;
use capsule_chunker::layer::{Cuts, IndexFault};
use capsule_proto::index::{
    Codec, Directory, Frame, Index, IndexBuilder, IndexHeader, Reference, ReferenceTo, Run,
    RunFrom, Source, SourceKind, Space,
};
use capsule_proto::{FrameHash, RootHash};
use layer_support::*;
use positioned_io::ReadAt;

/// Index and pack of half a megabyte in frames of 64 KiB.
fn layer() -> (TestSource, Vec<u8>, Vec<u8>) {
    let source = TestSource::made_of(&[
        Stretch::Text {
            len: 400_000,
            seed: 5,
        },
        Stretch::Random {
            len: 150_000,
            seed: 5,
        },
    ]);
    let encoded = encode_to_memory(&source, &options(Cuts::Bytes, 65_536, 2)).unwrap();
    let root = target(&encoded);
    (source, encoded.0.into_index(root), encoded.1)
}

/// A layer of one frame and one run of it, with any claims about it.
fn one_frame(packed: &[u8], claim: impl FnOnce(&mut Frame)) -> Result<Vec<u8>, LayerError> {
    let mut frame = plain_frame(packed, Codec::Zstd, 1000);
    claim(&mut frame);
    let len = u64::from(frame.len);
    let mut builder = IndexBuilder::new();
    let id = builder.push_frame(frame).unwrap();
    builder
        .push_run(Run {
            start: 0,
            len,
            from: RunFrom::Frame { id, offset: 0 },
        })
        .unwrap();
    let content = open(
        builder.finish(&header(len, Vec::new())),
        packed.to_vec(),
        Vec::new(),
    )?;
    let mut buf = vec![0; len as usize];
    content.read(0, &mut buf)?;
    Ok(buf)
}

fn plain_frame(packed: &[u8], codec: Codec, len: u32) -> Frame {
    Frame {
        pack_offset: 0,
        pack_len: packed.len() as u32,
        len,
        codec,
        hash: FrameHash([0; 16]),
        depth: 0,
        references: Vec::new(),
        spans: Vec::new(),
    }
}

fn header(target_size: u64, sources: Vec<Source>) -> IndexHeader {
    let parent = sources.first().map(|source| source.root);
    IndexHeader {
        space: Space::Stream,
        parent,
        target: RootHash::of(b""),
        target_size,
        sources,
    }
}

fn parent(size: u64) -> Source {
    Source {
        kind: SourceKind::Parent,
        root: RootHash::of(b"parent"),
        space: Space::Stream,
        size,
    }
}

fn zstd(content: &[u8]) -> Vec<u8> {
    match Compressor::new(3).compress(content).unwrap() {
        Packed::Zstd(packed) => packed,
        Packed::Stored | Packed::Lzma(_) => panic!("it should compress with zstd"),
    }
}

#[test]
fn a_wrong_byte_in_the_pack_is_laid_to_its_frame() {
    let (source, index, pack) = layer();
    let frames = Index::decode(&index).unwrap().frames;
    for at in (0..pack.len()).step_by(pack.len() / 50) {
        let mut damaged = pack.clone();
        damaged[at] ^= 0x10;
        let hit = frames
            .iter()
            .position(|frame| {
                (frame.pack_offset..frame.pack_offset + u64::from(frame.pack_len))
                    .contains(&(at as u64))
            })
            .unwrap();
        let content = open(index.clone(), damaged, Vec::new()).unwrap();
        let mut all = vec![0; source.bytes.len()];
        let error = content.read(0, &mut all).unwrap_err();
        assert!(
            matches!(&error, LayerError::Frame { frame, at, .. } if *frame as usize == hit && *at == frames[hit].pack_offset),
            "byte {at}: {error}"
        );
        assert!(matches!(
            restore_all(&content, 2),
            Err(RestoreError::Layer {
                source: LayerError::Frame { .. },
                ..
            })
        ));
        // What lies in other frames is still there.
        let (start, len) = if hit == 0 {
            (source.bytes.len() - 100, 100)
        } else {
            (0, 100)
        };
        content.read(start as u64, &mut all[..len]).unwrap();
        assert_eq!(all[..len], source.bytes[start..start + len]);
    }
}

#[test]
fn a_pack_cut_short_is_laid_to_the_first_frame_that_is_not_there() {
    let (source, index, pack) = layer();
    let last = Index::decode(&index).unwrap().frames.len() as u32 - 1;
    let content = open(index, pack[..pack.len() - 1].to_vec(), Vec::new()).unwrap();
    let error = content
        .read_at(0, &mut vec![0; source.bytes.len()])
        .unwrap_err();
    let ReadError::Decode { offset: 0, source } = &error else {
        panic!("{error}")
    };
    assert!(
        matches!(source.downcast_ref(), Some(LayerError::Pack { frame, .. }) if *frame == last),
        "{error}"
    );
}

#[test]
fn frames_that_are_not_what_the_index_says_are_refused() {
    let thousand = text(1, 1000);
    let hash = FrameHash::of(&thousand);
    let packed = zstd(&thousand);
    assert_eq!(
        one_frame(&packed, |frame| frame.hash = hash).unwrap(),
        thousand
    );

    let fault = |packed: &[u8], claim: fn(&mut Frame)| match one_frame(packed, claim).unwrap_err() {
        LayerError::Frame {
            frame: 0,
            at: 0,
            fault,
        } => fault,
        other => panic!("{other}"),
    };
    assert!(matches!(fault(&packed, |_| ()), FrameFault::Hash { .. }));
    assert_eq!(
        fault(&packed, |frame| frame.len = 1001),
        FrameFault::Length {
            expected: 1001,
            found: 1000
        }
    );
    // Longer than claimed, and a bomb: no byte beyond the claimed length is ever made.
    assert!(matches!(
        fault(&packed, |frame| frame.len = 999),
        FrameFault::Zstd(_)
    ));
    assert!(matches!(
        fault(&zstd(&vec![0; 64 << 20]), |_| ()),
        FrameFault::Zstd(_)
    ));
    assert!(matches!(
        fault(b"not a zstd frame at all", |_| ()),
        FrameFault::Zstd(_)
    ));
    let twice = [packed.clone(), packed.clone()].concat();
    assert_eq!(
        fault(&twice, |frame| frame.len = 2000),
        FrameFault::Trailing {
            packed: twice.len(),
            used: packed.len()
        }
    );
    assert!(matches!(
        fault(&packed, |frame| frame.pack_len -= 1),
        FrameFault::Zstd(_)
    ));
}

// Its header claims a window of 2 GiB: nothing of that size is allocated for a frame of 1000 bytes.
#[test]
fn claims_within_a_zstd_frame_allocate_nothing() {
    let huge_window = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00];
    let error = one_frame(&huge_window, |_| ()).unwrap_err();
    assert!(
        matches!(error, LayerError::Frame { frame: 0, .. }),
        "{error}"
    );
}

#[test]
fn an_index_that_contradicts_itself_is_refused_where_it_is_read() {
    let stored = text(2, 100);
    let build = |frames: &[Frame], run: Run, sources: Vec<Source>, size: u64| {
        let mut builder = IndexBuilder::new();
        frames
            .iter()
            .for_each(|frame| assert!(builder.push_frame(frame.clone()).is_ok()));
        builder.push_run(run).unwrap();
        builder.finish(&header(size, sources))
    };
    let good = Frame {
        hash: FrameHash::of(&stored),
        ..plain_frame(&stored, Codec::Stored, 100)
    };
    let of_frame = |start, len, id, offset| Run {
        start,
        len,
        from: RunFrom::Frame { id, offset },
    };
    let read = |index, range: std::ops::Range<u64>, sources: Vec<Arc<dyn Content>>| {
        let content = open(index, stored.repeat(4), sources)?;
        content.read(
            range.start,
            &mut vec![0; (range.end - range.start) as usize],
        )
    };

    let beyond = build(
        std::slice::from_ref(&good),
        of_frame(0, 60, 0, 50),
        vec![],
        60,
    );
    assert!(read(beyond.clone(), 0..50, vec![]).is_ok());
    assert!(matches!(
        read(beyond, 40..60, vec![]),
        Err(LayerError::BeyondFrame {
            start: 40,
            frame: 0
        })
    ));

    let gap = build(
        std::slice::from_ref(&good),
        of_frame(20, 60, 0, 0),
        vec![],
        100,
    );
    for range in [0..1, 10..30, 70..90] {
        let error = read(gap.clone(), range, vec![]).unwrap_err();
        assert!(matches!(error, LayerError::Index(_)), "{error}");
    }

    let source: Arc<dyn Content> = Arc::new(BytesSource(text(3, 30)));
    let short_parent = build(
        std::slice::from_ref(&good),
        of_frame(0, 10, 0, 0),
        vec![parent(30)],
        40,
    );
    let missing = read(short_parent.clone(), 5..40, vec![source]).unwrap_err();
    assert!(matches!(missing, LayerError::Index(_)), "{missing}");
    assert!(matches!(
        read(short_parent.clone(), 0..1, vec![]),
        Err(LayerError::Sources {
            expected: 1,
            found: 0
        })
    ));
    let other: Arc<dyn Content> = Arc::new(BytesSource(text(3, 29)));
    assert!(matches!(
        read(short_parent, 0..1, vec![other]),
        Err(LayerError::SourceSize {
            source_id: 0,
            expected: 30,
            found: 29
        })
    ));

    // References: beyond an earlier frame's end, and to a frame that is no less deep.
    let refers = |depth, len| Frame {
        pack_offset: 100,
        depth,
        references: vec![Reference {
            to: ReferenceTo::Frame(0),
            offset: 1,
            len,
        }],
        ..plain_frame(&stored, Codec::ZstdReferences, 100)
    };
    let long = build(
        &[good.clone(), refers(1, 100)],
        of_frame(0, 100, 1, 0),
        vec![],
        100,
    );
    assert!(matches!(
        read(long, 0..1, vec![]),
        Err(LayerError::Reference {
            frame: 1,
            to: 0,
            ..
        })
    ));
    let deep = Frame {
        pack_offset: 200,
        references: vec![Reference {
            to: ReferenceTo::Frame(1),
            offset: 0,
            len: 1,
        }],
        ..refers(1, 9)
    };
    let index = build(
        &[good, refers(1, 9), deep],
        of_frame(0, 100, 2, 0),
        vec![],
        100,
    );
    assert!(matches!(
        read(index, 0..1, vec![]),
        Err(LayerError::Reference {
            frame: 2,
            to: 1,
            ..
        })
    ));
}

// The builder makes no such index, so bytes of a good one are changed: small pages lie in it as they are.
#[test]
fn references_outside_to_later_frames_in_a_circle_or_too_deep_are_refused() {
    let stored = text(2, 100);
    let good = Frame {
        hash: FrameHash::of(&stored),
        ..plain_frame(&stored, Codec::Stored, 100)
    };
    let refers = Frame {
        pack_offset: 100,
        depth: 1,
        references: vec![Reference {
            to: ReferenceTo::Frame(0),
            offset: 0,
            len: 40,
        }],
        ..plain_frame(&stored, Codec::ZstdReferences, 100)
    };
    let mut builder = IndexBuilder::new();
    builder.push_frame(good).unwrap();
    let id = builder.push_frame(refers).unwrap();
    let from = RunFrom::Frame { id, offset: 0 };
    builder
        .push_run(Run {
            start: 0,
            len: 100,
            from,
        })
        .unwrap();
    let index = builder.finish(&header(100, vec![]));
    let error = |pattern: &[u8], at: usize, byte: u8| {
        let mut index = index.clone();
        let mut places = (0..index.len()).filter(|at| index[*at..].starts_with(pattern));
        let (Some(place), None) = (places.next(), places.next()) else {
            panic!("{pattern:?} is there once");
        };
        index[place + at] = byte;
        let read = open(index, stored.repeat(2), vec![])
            .and_then(|content| content.read(0, &mut [0]))
            .unwrap_err();
        assert!(matches!(read, LayerError::Index(_)), "{read}");
    };
    // One frame back, from its first byte on, 40 bytes.
    let reference = [3, 0, 40];
    // To itself; to one before the first; to a source that there is not; to a distance that is none, of a later frame.
    error(&reference, 0, 1);
    error(&reference, 0, 5);
    error(&reference, 0, 2);
    error(&reference, 0, 0x7f);
    // Before the first byte.
    error(&reference, 1, 1);
    // Codecs, then depths: deeper than may be, and less deep than what it refers to.
    let depths = [0, 2, 0, 1];
    error(&depths, 3, 9);
    error(&depths, 3, 0);
}

// Each frame refers to four of the depth below, each time with another in between: 4^8 decodings for one byte, if each was made
// where it is referred to.
#[test]
fn frames_that_refer_to_many_are_made_once_each() {
    let mut builder = IndexBuilder::new();
    let (mut pack, mut ids) = (Vec::new(), Vec::<u32>::new());
    for depth in 0..=8u8 {
        let below = std::mem::take(&mut ids);
        for n in 0..6u8 {
            let content = [depth, n].repeat(20);
            let wanted =
                [n, n + 1, n + 2, n + 3].map(|i| below.get(usize::from(i) % below.len().max(1)));
            let references: Vec<_> = wanted
                .into_iter()
                .flatten()
                .map(|id| Reference {
                    to: ReferenceTo::Frame(*id),
                    offset: 0,
                    len: 40,
                })
                .collect();
            let packed = Compressor::new(1).compress_against(&content, &[]).unwrap();
            let codec = if references.is_empty() {
                Codec::Zstd
            } else {
                Codec::ZstdReferences
            };
            let hash = FrameHash::of(&content);
            let frame = Frame {
                pack_offset: pack.len() as u64,
                hash,
                depth,
                references,
                ..plain_frame(&packed, codec, 40)
            };
            ids.push(builder.push_frame(frame).unwrap());
            pack.extend(packed);
        }
    }
    builder
        .push_run(Run {
            start: 0,
            len: 40,
            from: RunFrom::Frame {
                id: ids[0],
                offset: 0,
            },
        })
        .unwrap();
    let index = builder.finish(&header(40, vec![]));
    let made = Arc::<AtomicU64>::default();
    let read = |cache_len| {
        let content = LayerContent::open(
            Arc::new(index.clone()),
            Arc::new(Counted(pack.clone(), made.clone())),
            vec![],
            &LayerCache::new(&ReadOptions { cache_len }),
        )?;
        content.read(0, &mut [0; 40])
    };
    // Whatever is kept.
    for cache_len in [0, 1 << 20] {
        read(cache_len).unwrap();
        let made = made.swap(0, Ordering::Relaxed);
        assert!(made <= 9 * 6, "{made}");
    }
}

/// An index of which only the start has arrived.
struct Partly {
    bytes: Vec<u8>,
    there: usize,
    refused: AtomicU64,
}

impl ReadAt for Partly {
    fn read_at(&self, pos: u64, buf: &mut [u8]) -> io::Result<usize> {
        if pos as usize + buf.len() > self.there.min(self.bytes.len()) {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "not here yet"));
        }
        self.bytes.as_slice().read_at(pos, buf)
    }
}

#[test]
fn pages_of_the_index_are_read_when_they_are_needed() {
    let (_, bytes, pack) = layer();
    let there = Directory::needed(&bytes).unwrap();
    let index = Arc::new(Partly {
        bytes,
        there,
        refused: AtomicU64::new(0),
    });
    let content = LayerContent::open(
        index.clone(),
        Arc::new(pack),
        vec![],
        &LayerCache::new(&ReadOptions::default()),
    )
    .unwrap();
    assert_eq!(index.refused.load(Ordering::Relaxed), 0);
    let error = content.read(0, &mut [0]).unwrap_err();
    assert!(
        matches!(error, LayerError::Index(IndexFault::Read { at, .. }) if at == there as u64),
        "{error}"
    );
}

#[test]
fn a_damaged_index_is_never_read_past_its_checks() {
    let (source, index, pack) = layer();
    for at in 0..index.len() {
        let mut damaged = index.clone();
        damaged[at] ^= 0x21;
        // Either refused, or other runs of frames that do verify; never a panic or a huge allocation.
        if let Ok(content) = open(damaged, pack.clone(), vec![]) {
            let len = content.len().min(source.len()) as usize;
            let _ = content.read(0, &mut vec![0; len]);
        }
        let _ = open(index[..at].to_vec(), pack.clone(), vec![])
            .map(|content| content.read(0, &mut [0; 9]));
    }
}
