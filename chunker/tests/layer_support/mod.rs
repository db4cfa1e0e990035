//! What the tests of layers share: contents, sources that misbehave, and the way from content to a readable layer.
#![allow(dead_code)] // Each test file uses its part.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use capsule_chunker::bao::{TreeHasher, tree_of};
use capsule_chunker::content::{
    BytesSource, Content, Extent, Extents, Parts, ReadError, Source, check_range,
};
use capsule_chunker::delta::{OldSource, Outline, Similar, SimilarOptions};
use capsule_chunker::layer::Cuts;
use capsule_chunker::layer::encode::{
    Against, ContentHashes, Effort, EncodeError, EncodeOptions, Encoded, Outputs, encode,
    encode_update,
};
use capsule_chunker::layer::read::{LayerCache, LayerContent, LayerError, ReadOptions};
use capsule_chunker::layer::restore::{RestoreError, Sink, restore};
use capsule_proto::RootHash;
use capsule_proto::index::{Source as SourceName, SourceKind, Space};
use positioned_io::ReadAt;
use proptest::prelude::*;
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};

/// A stretch of made-up content.
#[derive(Clone, Debug)]
pub enum Stretch {
    Zeros {
        len: usize,
        hole: bool,
    },
    Random {
        len: usize,
        seed: u64,
    },
    Text {
        len: usize,
        seed: u64,
    },
    /// What an earlier stretch is.
    Again(usize),
}

pub fn stretches(max: usize) -> impl Strategy<Value = Vec<Stretch>> {
    let len = || prop_oneof![0..10usize, 4090..4100usize, 0..70_000usize, 0..400_000usize];
    let pages = || (0..40usize).prop_map(|pages| pages * 4096);
    let stretch = prop_oneof![
        (prop_oneof![len(), pages()], any::<bool>())
            .prop_map(|(len, hole)| Stretch::Zeros { len, hole }),
        (len(), 0..4u64).prop_map(|(len, seed)| Stretch::Random { len, seed }),
        (len(), 0..4u64).prop_map(|(len, seed)| Stretch::Text { len, seed }),
        any::<prop::sample::Index>().prop_map(|i| Stretch::Again(i.index(1 << 16))),
    ];
    prop::collection::vec(stretch, 0..max)
}

pub fn random(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Code in the manner of x86: functions of random bytes, whose second halves call others and load data behind them all, every 20 bytes. So
/// many bytes longer than usual is each third function: what follows moves, and all distances between what moved otherwise change.
pub fn program(functions: usize, grown: usize) -> Vec<u8> {
    const LEN: usize = 200;
    let extra = |function: usize| if function % 3 == 1 { grown } else { 0 };
    let mut starts = vec![0];
    for function in 0..functions {
        starts.push(starts[function] + LEN + extra(function));
    }
    let end = starts[functions];
    let mut rng = SmallRng::seed_from_u64(1);
    let mut code = vec![0; end];
    for (function, start) in starts[..functions].iter().enumerate() {
        rng.fill_bytes(&mut code[*start..start + LEN]);
        for at in (start + 101..start + LEN - 8).step_by(20) {
            let (opcode, target): (&[u8], usize) = if rng.random_bool(0.6) {
                (&[0xe8], starts[rng.random_range(0..functions)])
            } else {
                (
                    &[0x48, 0x8b, 0x05],
                    end + 8 * rng.random_range(0..functions),
                )
            };
            let at = at + opcode.len();
            code[at - opcode.len()..at].copy_from_slice(opcode);
            let distance = (target as u32).wrapping_sub(at as u32 + 4);
            code[at..at + 4].copy_from_slice(&distance.to_le_bytes());
        }
        code[start + LEN..starts[function + 1]].fill(0x90);
    }
    code
}

pub fn text(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let words = [
        "frame ", "capsule ", "pack\n", "of ", "the ", "index: ", "42, ",
    ];
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(words[rng.random_range(0..words.len())].as_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A source in memory, with holes and parts as told.
#[derive(Default)]
pub struct TestSource {
    pub bytes: Vec<u8>,
    pub extents: Vec<Extent>,
    pub parts: Option<Vec<u64>>,
    /// Reads from here on fail.
    pub broken_at: Option<u64>,
    /// Reads from here on panic.
    pub panics_at: Option<u64>,
    pub changed: bool,
    pub bytes_read: AtomicU64,
}

impl TestSource {
    pub fn new(bytes: Vec<u8>) -> Self {
        let all = Extent {
            range: 0..bytes.len() as u64,
            zero: false,
        };
        let extents = if bytes.is_empty() { vec![] } else { vec![all] };
        Self {
            bytes,
            extents,
            ..Default::default()
        }
    }

    pub fn made_of(stretches: &[Stretch]) -> Self {
        let mut source = Self::default();
        let mut places: Vec<std::ops::Range<usize>> = Vec::new();
        for stretch in stretches {
            let start = source.bytes.len();
            let mut hole = false;
            match stretch {
                Stretch::Zeros { len, hole: is_hole } => {
                    source.bytes.resize(start + len, 0);
                    hole = *is_hole;
                }
                Stretch::Random { len, seed } => source.bytes.extend(random(*seed, *len)),
                Stretch::Text { len, seed } => source.bytes.extend(text(*seed, *len)),
                Stretch::Again(i) if !places.is_empty() => {
                    source
                        .bytes
                        .extend_from_within(places[i % places.len()].clone());
                }
                Stretch::Again(_) => {}
            }
            let end = source.bytes.len();
            places.push(start..end);
            if start < end {
                source.extents.push(Extent {
                    range: start as u64..end as u64,
                    zero: hole,
                });
            }
        }
        source
    }

    pub fn with_parts(mut self, cuts: &[usize]) -> Self {
        let mut ends: Vec<_> = cuts
            .iter()
            .map(|cut| (cut % (self.bytes.len() + 1)) as u64)
            .collect();
        ends.push(self.bytes.len() as u64);
        ends.sort_unstable();
        let starts = [0].into_iter().chain(ends.iter().copied());
        self.parts = Some(starts.zip(&ends).map(|(start, end)| end - start).collect());
        self
    }

    pub fn part_roots(&self) -> Vec<RootHash> {
        let mut rest = self.bytes.as_slice();
        let lens = self.parts.as_ref().unwrap();
        lens.iter()
            .map(|len| {
                let (part, later) = rest.split_at(*len as usize);
                rest = later;
                RootHash::of(part)
            })
            .collect()
    }
}

impl Content for TestSource {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        check_range(self.len(), offset, buf.len())?;
        assert!(self.panics_at.is_none_or(|at| offset < at), "told to panic");
        if self.broken_at.is_some_and(|at| offset >= at) {
            return Err(ReadError::io(
                "/made/up",
                offset,
                io::Error::other("told to break"),
            ));
        }
        self.bytes_read
            .fetch_add(buf.len() as u64, Ordering::Relaxed);
        buf.copy_from_slice(&self.bytes[offset as usize..offset as usize + buf.len()]);
        Ok(())
    }
}

impl Source for TestSource {
    fn extents(&self) -> Extents<'_> {
        Box::new(self.extents.iter().cloned().map(Ok))
    }

    fn parts(&self) -> Option<Parts<'_>> {
        self.parts
            .as_ref()
            .map(|parts| Box::new(parts.iter().copied()) as Parts)
    }

    fn check_unchanged(&self) -> Result<(), ReadError> {
        match self.changed {
            true => Err(ReadError::Changed {
                path: "/made/up".into(),
                why: "it was told to".into(),
            }),
            false => Ok(()),
        }
    }
}

pub fn options(cuts: Cuts, frame_max: u32, threads: usize) -> EncodeOptions {
    EncodeOptions {
        effort: Effort::Fast,
        frame_max,
        cuts,
        earlier: false,
        threads: NonZeroUsize::new(threads).unwrap(),
    }
}

pub type TestEncoded = (Encoded<Vec<u8>, Vec<u8>>, Vec<u8>);

pub fn encode_to_memory(
    source: &TestSource,
    options: &EncodeOptions,
) -> Result<TestEncoded, EncodeError> {
    let mut pack = Vec::new();
    let outputs = Outputs {
        pack: &mut pack,
        pack_outboard: Vec::new(),
        content_outboard: Vec::new(),
    };
    encode(source, options, outputs, &()).map(|encoded| (encoded, pack))
}

/// Old content to compare with.
pub fn old_source(bytes: &[u8], kind: SourceKind, space: Space) -> OldSource {
    OldSource {
        name: SourceName {
            kind,
            root: RootHash::of(bytes),
            space,
            size: bytes.len() as u64,
        },
        content: Arc::new(BytesSource(bytes.to_vec())),
    }
}

/// An update: its index and pack.
pub struct Update {
    pub index: Vec<u8>,
    pub pack: Vec<u8>,
}

impl Update {
    pub fn len(&self) -> usize {
        self.index.len() + self.pack.len()
    }
}

/// An update, in memory.
pub fn make_update(
    source: &TestSource,
    outline: &Outline,
    sources: &[OldSource],
    in_place: bool,
    options: &EncodeOptions,
) -> Update {
    let similar = Similar::build(sources, &SimilarOptions::default(), &())
        .unwrap()
        .unwrap();
    let against = Against {
        hashed: None,
        outline,
        sources,
        similar: &similar,
        in_place,
    };
    let mut pack = Vec::new();
    let outputs = Outputs {
        pack: &mut pack,
        pack_outboard: Vec::new(),
        content_outboard: Vec::<u8>::new(),
    };
    let encoded = encode_update(source, &against, options, outputs, &()).unwrap();
    assert_eq!(encoded.pack_outboard, tree_of(&pack).1);
    let stats = encoded.stats;
    assert_eq!(
        stats.content,
        stats.zero + stats.repeated + stats.framed + stats.inherited + stats.copied
    );
    let target = match &encoded.content {
        ContentHashes::Known => RootHash::of(&source.bytes),
        ContentHashes::Parts(_) => RootHash::of(b"listing"),
        ContentHashes::Stream(..) => panic!("an update does not hash streams"),
    };
    let names: Vec<_> = sources.iter().map(|source| source.name.clone()).collect();
    let parent = names
        .first()
        .filter(|name| name.kind == SourceKind::Parent)
        .map(|name| name.root);
    let index = encoded.into_update_index(target, parent, names);
    Update { index, pack }
}

/// The root that the index is made for: the content's own, or one that stands for a listing's.
pub fn target(encoded: &TestEncoded) -> RootHash {
    match &encoded.0.content {
        ContentHashes::Stream(tree, _) => tree.root,
        ContentHashes::Parts(_) => RootHash::of(b"listing"),
        ContentHashes::Known => panic!("made from nothing"),
    }
}

pub fn open(
    index: Vec<u8>,
    pack: Vec<u8>,
    sources: Vec<Arc<dyn Content>>,
) -> Result<LayerContent, LayerError> {
    LayerContent::open(
        Arc::new(index),
        Arc::new(pack),
        sources,
        &LayerCache::new(&ReadOptions::default()),
    )
}

/// A pack that counts what is read: once a frame.
pub struct Counted(pub Vec<u8>, pub Arc<AtomicU64>);

impl ReadAt for Counted {
    fn read_at(&self, pos: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.as_slice().read_at(pos, buf)
    }
}

/// Gathers what is restored, and checks that it comes in order.
#[derive(Default)]
pub struct Gather(pub Vec<u8>);

impl Sink for Gather {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert_eq!(offset, self.0.len() as u64);
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn zeros(&mut self, offset: u64, len: u64) -> io::Result<()> {
        assert_eq!(offset, self.0.len() as u64);
        self.0.resize(self.0.len() + len as usize, 0);
        Ok(())
    }
}

/// All of a component, and its root.
pub fn restore_all(
    content: &LayerContent,
    threads: usize,
) -> Result<(Vec<u8>, RootHash), RestoreError> {
    let mut sink = Gather::default();
    let mut hasher = TreeHasher::new();
    restore(
        content,
        NonZeroUsize::new(threads).unwrap(),
        &mut sink,
        Some(&mut hasher),
        &(),
    )?;
    Ok((sink.0, hasher.finish().unwrap().0.root))
}

/// Reads ranges that begin and end anywhere, and compares.
pub fn check_ranges(content: &LayerContent, plain: &[u8], seed: u64, count: usize) {
    let mut rng = SmallRng::seed_from_u64(seed);
    for _ in 0..count {
        let start = rng.random_range(0..=plain.len());
        let len = rng.random_range(0..=(plain.len() - start).min(200_000));
        let mut buf = vec![1; len];
        content.read_at(start as u64, &mut buf).unwrap();
        assert!(
            buf == plain[start..start + len],
            "bytes {start}..{}",
            start + len
        );
    }
}
