//! Long chains of layers: what one read through them may cost, on how much stack, and what is kept on the way.

mod layer_support;

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use capsule_chunker::content::{BytesSource, Content, Progress, ReadError};
use capsule_chunker::layer::codec::{Compressor, Packed};
use capsule_chunker::layer::read::{LayerCache, LayerContent, LayerError, ReadOptions, Spent};
use capsule_chunker::layer::restore::{RestoreError, Sink, restore};
use capsule_proto::index::{
    Codec, Frame, IndexBuilder, IndexHeader, Reference, ReferenceTo, Run, RunFrom, Source,
    SourceKind, Space,
};
use capsule_proto::{FrameHash, RootHash};
use layer_support::*;

/// Layers, each upon the one before, that share a cache; and how many frames were decoded.
struct Chain {
    cache: LayerCache,
    top: Option<Arc<LayerContent>>,
    decoded: Arc<AtomicU64>,
}

/// A layer in the making: frames that are told by what they refer to.
struct Layer {
    builder: IndexBuilder,
    pack: Vec<u8>,
    compressor: Compressor,
}

impl Default for Layer {
    fn default() -> Self {
        Self {
            builder: IndexBuilder::new(),
            pack: Vec::new(),
            compressor: Compressor::new(1),
        }
    }
}

impl Layer {
    fn frame(&mut self, content: &[u8], depth: u8, references: Vec<Reference>) -> u32 {
        let packed = match self.compressor.compress(content).unwrap() {
            Packed::Zstd(packed) => packed,
            Packed::Stored | Packed::Lzma(_) => panic!("it should compress with zstd"),
        };
        // Readers give the references to the decoder, which needs none of them.
        let codec = match references.is_empty() {
            true => Codec::Zstd,
            false => Codec::ZstdReferences,
        };
        let frame = Frame {
            pack_offset: self.pack.len() as u64,
            pack_len: packed.len() as u32,
            len: content.len() as u32,
            codec,
            hash: FrameHash::of(content),
            depth,
            references,
            spans: Vec::new(),
        };
        self.pack.extend(packed);
        self.builder.push_frame(frame).unwrap()
    }

    fn run(&mut self, start: u64, len: u64, from: RunFrom) {
        self.builder.push_run(Run { start, len, from }).unwrap();
    }
}

fn reference(to: ReferenceTo, offset: u64, len: usize) -> Reference {
    Reference {
        to,
        offset,
        len: len as u32,
    }
}

impl Chain {
    fn new(cache_len: usize) -> Self {
        Self {
            cache: LayerCache::new(&ReadOptions { cache_len }),
            top: None,
            decoded: Arc::default(),
        }
    }

    fn push(&mut self, layer: Layer, size: u64) {
        let parent = self.top.take();
        let sources: Vec<_> = parent
            .iter()
            .map(|parent| Source {
                kind: SourceKind::Parent,
                root: RootHash::of(b"below"),
                space: Space::Stream,
                size: parent.len(),
            })
            .collect();
        let header = IndexHeader {
            space: Space::Stream,
            parent: sources.first().map(|source| source.root),
            target: RootHash::of(b"this"),
            target_size: size,
            sources,
        };
        let content = LayerContent::open(
            Arc::new(layer.builder.finish(&header)),
            Arc::new(Counted(layer.pack, self.decoded.clone())),
            parent
                .into_iter()
                .map(|parent| parent as Arc<dyn Content>)
                .collect(),
            &self.cache,
        );
        self.top = Some(Arc::new(content.unwrap()));
    }

    fn top(&self) -> &LayerContent {
        self.top.as_ref().unwrap()
    }

    /// Upon the chain, layers of as many frames, each of which refers to so many of the layer below.
    fn grow(&mut self, layers: usize, frames: usize, len: usize, references: usize) {
        for _ in 0..layers {
            let mut layer = Layer::default();
            let number = self.decoded.fetch_add(1, Ordering::Relaxed) as u8;
            for i in 0..frames {
                let wanted = (0..references).filter(|_| self.top.is_some()).map(|r| {
                    let at = (i + r) % frames * len;
                    reference(ReferenceTo::Source(0), at as u64, len.min(1 << 16))
                });
                let content = [number, i as u8].repeat(len / 2);
                let id = layer.frame(&content, 0, wanted.collect());
                layer.run(
                    (i * len) as u64,
                    len as u64,
                    RunFrom::Frame { id, offset: 0 },
                );
            }
            self.push(layer, (frames * len) as u64);
        }
        self.decoded.store(0, Ordering::Relaxed);
    }
}

/// Processor time of the calling thread: the machine may have other work.
fn busy() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

// One byte takes every frame of 300 layers.
#[test]
fn a_chain_whose_frames_refer_to_many_is_refused_within_a_second() {
    let mut chain = Chain::new(64 << 10);
    chain.grow(300, 64, 64, 64);
    let before = busy();
    let error = chain.top().read(0, &mut [0]).unwrap_err();
    let took = busy() - before;
    assert!(
        matches!(error, LayerError::Spent(Spent::TooDear(_))),
        "{error}"
    );
    assert!(error.to_string().contains("the layer is refused"));
    assert!(took < Duration::from_secs(1), "{took:?}");
    // Nothing was decoded to know that. The same through the trait, and by a pass over all of it.
    let failed = chain.top().read_at(0, &mut [0]).unwrap_err();
    assert!(matches!(failed, ReadError::Decode { .. }), "{failed}");
    assert!(matches!(
        restore_all(chain.top(), 3),
        Err(RestoreError::Layer {
            source: LayerError::Spent(Spent::TooDear(_)),
            ..
        })
    ));
    assert_eq!(chain.decoded.load(Ordering::Relaxed), 0);
}

/// Says stop when it was asked so often.
struct StopAfter(AtomicU64, u64);

impl Progress for StopAfter {
    fn cancelled(&self) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed) >= self.1
    }
}

#[test]
fn one_dear_job_can_be_cancelled() {
    let mut chain = Chain::new(1 << 20);
    chain.grow(10, 64, 256 << 10, 64);
    let threads = NonZeroUsize::new(2).unwrap();
    // While it is looked up what is needed, and while that is made: a question for each frame at least.
    for questions in [40, 800] {
        let progress = StopAfter(AtomicU64::new(0), questions);
        let sink = &mut Gather::default();
        let error = restore(chain.top(), threads, sink, None, &progress).unwrap_err();
        assert!(matches!(error, RestoreError::Cancelled), "{error}");
        let decoded = chain.decoded.swap(0, Ordering::Relaxed);
        assert!(decoded < 640 && decoded <= questions, "{decoded}");
    }
}

// A reader that fails at its end of the budget does not spoil what others read meanwhile.
#[test]
fn readers_of_a_dear_chain_fail_for_themselves() {
    let mut chain = Chain::new(64 << 10);
    chain.grow(300, 64, 64, 64);
    std::thread::scope(|scope| {
        let dear: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| chain.top().read(0, &mut [0])))
            .collect();
        let base = Chain::top(&chain);
        let error = base.read(64, &mut [0]).unwrap_err();
        assert!(matches!(error, LayerError::Spent(_)), "{error}");
        for reader in dear {
            let error = reader.join().unwrap().unwrap_err();
            assert!(matches!(error, LayerError::Spent(_)), "{error}");
        }
    });
}

// Each layer's frames refer to 16 of the layer before. For one byte each frame is made once, whatever the cache keeps; and
// so for all of it, which is one job.
#[test]
fn a_long_chain_is_read_with_any_cache() {
    let (layers, frames, len) = (64, 32, 8192);
    let mut chain = Chain::new(0);
    chain.grow(layers, frames, len, 16);
    chain.top().read(0, &mut [0]).unwrap();
    let decoded = chain.decoded.load(Ordering::Relaxed);
    assert!(decoded <= (layers * frames) as u64, "{decoded}");
    let all = restore_all(chain.top(), 3).unwrap().0;
    let again = chain.decoded.load(Ordering::Relaxed) - decoded;
    assert!(again <= (layers * frames) as u64, "{again}");
    assert_eq!(all[(frames - 1) * len..], [63, 31].repeat(len / 2));
}

#[test]
fn a_fault_is_laid_to_its_layer() {
    let mut chain = Chain::new(1 << 20);
    let mut layer = Layer::default();
    let id = layer.frame(&text(1, 4096), 0, vec![]);
    layer.run(0, 4096, RunFrom::Frame { id, offset: 0 });
    *layer.pack.last_mut().unwrap() ^= 1;
    chain.push(layer, 4096);
    chain.grow(2, 1, 4096, 1);
    let error = chain.top().read(0, &mut [0]).unwrap_err();
    let LayerError::Below { source, .. } = &error else {
        panic!("{error}")
    };
    assert!(
        matches!(**source, LayerError::Frame { frame: 0, .. }),
        "{error}"
    );
}

// Each frame refers to the one below; in a thread with the usual 2 MiB of stack.
#[test]
fn a_chain_of_1024_layers_is_read_on_any_stack() {
    let mut chain = Chain::new(32 << 20);
    chain.grow(1024, 1, 64, 1);
    std::thread::scope(|scope| {
        let read = || {
            let mut buf = [0; 64];
            chain.top().read(0, &mut buf).unwrap();
            assert_eq!(buf, [255, 0].repeat(32)[..]);
            assert_eq!(chain.decoded.load(Ordering::Relaxed), 1024);
        };
        scope.spawn(read).join().unwrap();
    });
}

/// Layers of one run of the deepest of `depth + 1` frames, the first of which refers to the layer below.
fn deep(layers: usize, depth: u8) -> Chain {
    let mut chain = Chain::new(32 << 20);
    for number in 0..layers {
        let mut layer = Layer::default();
        let mut last = None;
        for depth in 0..=depth {
            let to = match last {
                Some(id) => Some(ReferenceTo::Frame(id)),
                None => (number > 0).then_some(ReferenceTo::Source(0)),
            };
            let references = to.map(|to| reference(to, 0, 64)).into_iter().collect();
            last = Some(layer.frame(&[number as u8, depth].repeat(32), depth, references));
        }
        let id = last.unwrap();
        layer.run(0, 64, RunFrom::Frame { id, offset: 0 });
        chain.push(layer, 64);
    }
    chain
}

#[test]
fn frames_may_be_deep_in_each_of_many_layers() {
    let chain = deep(1024, 8);
    std::thread::scope(|scope| {
        let read = || chain.top().read(0, &mut [0; 64]).unwrap();
        scope.spawn(read).join().unwrap();
    });
    assert_eq!(chain.decoded.load(Ordering::Relaxed), 1024 * 9);
    assert!(deep(1900, 8).top().read(0, &mut [0]).is_err());
}

/// Counts, but keeps nothing.
#[derive(Default)]
struct Count {
    data: u64,
    zeros: u64,
}

impl Sink for Count {
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert_eq!(offset, self.data + self.zeros);
        self.data += bytes.len() as u64;
        Ok(())
    }

    fn zeros(&mut self, offset: u64, len: u64) -> io::Result<()> {
        assert_eq!(offset, self.data + self.zeros);
        self.zeros += len;
        Ok(())
    }
}

// 64 GiB with a little content at both ends, through layers that change a little more.
#[test]
fn inherited_holes_stay_holes_and_cost_no_reading() {
    const SIZE: u64 = 64 << 30;
    let edit = text(1, 4096);
    let mut chain = Chain::new(32 << 20);
    for number in 0..4 {
        let mut layer = Layer::default();
        let id = layer.frame(&edit, 0, vec![]);
        let frame = RunFrom::Frame { id, offset: 0 };
        if number == 0 {
            layer.run(0, 4096, frame);
            layer.run(4096, SIZE - 8192, RunFrom::Zero);
            layer.run(SIZE - 4096, 4096, frame);
        } else {
            // A copy of zeros too.
            layer.run(number << 30, 4096, frame);
            let (source, offset) = (0, 40 << 30);
            layer.run(
                (number << 30) + 4096,
                1 << 29,
                RunFrom::Copy { source, offset },
            );
        }
        chain.push(layer, SIZE);
    }
    assert!(chain.top().is_zero(8192..1 << 30));
    assert!(chain.top().is_zero((3 << 30) + 4096..SIZE - 4096));
    assert!(!chain.top().is_zero(8192..(1 << 30) + 1));
    let mut sink = Count::default();
    let threads = NonZeroUsize::new(2).unwrap();
    restore(chain.top(), threads, &mut sink, None, &()).unwrap();
    assert_eq!((sink.data, sink.zeros), (5 * 4096, SIZE - 5 * 4096));
    assert!(chain.decoded.load(Ordering::Relaxed) <= 4);
}

// A hostile one: every byte of a layer is a copy of the zeros below, told in 4096 pieces.
#[test]
fn asking_for_zeros_is_bounded_too() {
    let mut chain = Chain::new(1 << 20);
    let mut base = Layer::default();
    base.run(0, 1 << 20, RunFrom::Zero);
    chain.push(base, 1 << 20);
    for _ in 0..3 {
        let mut layer = Layer::default();
        for i in 0..4096 {
            let (source, offset) = (0, (4095 - i) * 256);
            layer.run(i * 256, 256, RunFrom::Copy { source, offset });
        }
        chain.push(layer, 1 << 20);
    }
    assert!(chain.top().is_zero(0..1 << 18));
    let mut all = vec![1; 1 << 20];
    chain.top().read(0, &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));
    assert!(restore_all(chain.top(), 2).unwrap().0 == all);
}

// A source that is no layer, and has no idea of budgets, below a chain of layers.
#[test]
fn other_sources_are_read_as_ever() {
    let plain = random(1, 100_000);
    let cache = LayerCache::new(&ReadOptions::default());
    let mut content: Arc<dyn Content> = Arc::new(BytesSource(plain.clone()));
    for number in 0..70u8 {
        let source = Source {
            kind: SourceKind::Parent,
            root: RootHash::of(&[number]),
            space: Space::Stream,
            size: content.len(),
        };
        let header = IndexHeader {
            space: Space::Stream,
            parent: Some(source.root),
            target: RootHash::of(&[number + 1]),
            target_size: content.len(),
            sources: vec![source],
        };
        let index = Arc::new(IndexBuilder::new().finish(&header));
        let pack = Arc::new(Vec::<u8>::new());
        let layer = LayerContent::open(index, pack, vec![content], &cache).unwrap();
        check_ranges(&layer, &plain, number.into(), 2);
        content = Arc::new(layer);
    }
    let error = content.read_at(99_999, &mut [0; 2]).unwrap_err();
    assert!(matches!(error, ReadError::OutOfRange { .. }), "{error}");
}
