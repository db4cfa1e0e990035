//! An index of old contents: where each seed lies.
//!
//! Built by reading all of the old contents once, on all cores. How many windows are sampled follows from how much there is, so
//! memory is bounded: 2^24 seeds, 8 bytes each, and twice that while it is built.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use super::old::{OldError, OldSource};
use super::outline::Outline;
use super::seeds::{Seed, WINDOW_LEN, seeds};
use crate::content::Progress;

/// Read and searched at a time.
const BLOCK_LEN: u64 = 4 << 20;
/// At best one window in 2^8 is sampled.
const MIN_BITS: u32 = 8;
/// At worst one in 2^20: what is longer than 16 TiB is not covered.
const MAX_BITS: u32 = 20;
/// Places of one seed that are remembered: what lies in more is everywhere.
const MAX_PLACES: usize = 4;
/// Bits of a place: 1 TiB of old contents together; what lies beyond is not found.
const PLACE_BITS: u32 = 40;

/// How to index.
#[derive(Clone, Copy, Debug)]
pub struct SimilarOptions {
    /// Most seeds.
    pub max_seeds: u64,
    /// Threads to read with.
    pub threads: NonZeroUsize,
}

impl SimilarOptions {
    /// 2^24 seeds: 128 MiB.
    pub const MAX_SEEDS: u64 = 1 << 24;
}

impl Default for SimilarOptions {
    fn default() -> Self {
        Self {
            max_seeds: Self::MAX_SEEDS,
            threads: thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
        }
    }
}

/// Where the seeds of old contents lie.
pub struct Similar {
    /// One window in `2^bits` is a seed.
    bits: u32,
    /// Where each bucket begins in `entries`; one more than there are buckets.
    buckets: Vec<u32>,
    /// By bucket and sorted: tag, then place.
    entries: Vec<u64>,
    /// Where each content begins, counted through all of them.
    starts: Vec<u64>,
}

/// A place in old content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// Position among the sources.
    pub source: u16,
    /// Byte in it.
    pub at: u64,
}

/// A stretch of one content that is searched at a time.
struct Block {
    source: usize,
    range: Range<u64>,
}

impl Similar {
    /// An index of nothing.
    pub fn nothing() -> Self {
        Self {
            bits: MIN_BITS,
            buckets: vec![0, 0],
            entries: Vec::new(),
            starts: Vec::new(),
        }
    }

    /// Reads the contents, and indexes them. `None` where the work was cancelled.
    pub fn build(
        sources: &[OldSource],
        options: &SimilarOptions,
        progress: &dyn Progress,
    ) -> Result<Option<Self>, OldError> {
        Self::build_of(sources, options, progress, |_| {})
    }

    /// The same of at most so many bytes of a parent in whose places the new content lies: of what lies nearest to where that is not
    /// known. So a small change costs little.
    pub fn build_near(
        sources: &[OldSource],
        outline: &Outline,
        most: u64,
        options: &SimilarOptions,
        progress: &dyn Progress,
    ) -> Result<Option<Self>, OldError> {
        Self::build_of(sources, options, progress, |blocks| {
            let len = |block: &Block| block.range.end - block.range.start;
            blocks.sort_by_cached_key(|block| (block.source, outline.distance(&block.range)));
            let mut left = most;
            blocks.retain(|block| {
                let fits = len(block) <= left;
                left -= if fits { len(block) } else { 0 };
                fits
            });
            blocks.sort_unstable_by_key(|block| (block.source, block.range.start));
        })
    }

    fn build_of(
        sources: &[OldSource],
        options: &SimilarOptions,
        progress: &dyn Progress,
        choose: impl FnOnce(&mut Vec<Block>),
    ) -> Result<Option<Self>, OldError> {
        let mut starts = Vec::with_capacity(sources.len());
        let mut end = 0u64;
        let mut blocks = Vec::new();
        for (source, old) in sources.iter().enumerate() {
            starts.push(end);
            end = end.saturating_add(old.content.len());
            for start in (0..old.content.len()).step_by(BLOCK_LEN as usize) {
                let range = start..(start + BLOCK_LEN).min(old.content.len());
                if starts[source] + range.end <= 1 << PLACE_BITS
                    && !old.content.is_zero(range.clone())
                {
                    blocks.push(Block { source, range });
                }
            }
        }
        choose(&mut blocks);
        let data: u64 = blocks
            .iter()
            .map(|block| block.range.end - block.range.start)
            .sum();
        let bits = (MIN_BITS..MAX_BITS)
            .find(|bits| data >> bits <= options.max_seeds)
            .unwrap_or(MAX_BITS);
        let Some(found) = search(sources, &blocks, &starts, bits, options.threads, progress)?
        else {
            return Ok(None);
        };
        Ok(Some(Self::of(bits, starts, found)))
    }

    fn of(bits: u32, starts: Vec<u64>, found: Vec<Vec<(u64, u64)>>) -> Self {
        let count: usize = found.iter().map(Vec::len).sum();
        let bucket_bits = (count / 4).max(2).ilog2();
        let bucket = |hash: u64| (hash >> (64 - bucket_bits)) as usize;
        let mut ends = vec![0u32; (1 << bucket_bits) + 1];
        for (hash, _) in found.iter().flatten() {
            ends[bucket(*hash) + 1] += 1;
        }
        for i in 1..ends.len() {
            ends[i] += ends[i - 1];
        }
        let mut entries = vec![0; count];
        let mut next = ends.clone();
        for (hash, place) in found.into_iter().flatten() {
            let slot = &mut next[bucket(hash)];
            entries[*slot as usize] = tag(hash) | place;
            *slot += 1;
        }
        // Within a bucket by tag and place; of what lies in many places, the first.
        let (mut buckets, mut kept) = (Vec::with_capacity(ends.len()), 0usize);
        for window in ends.windows(2) {
            buckets.push(kept as u32);
            let (start, end) = (window[0] as usize, window[1] as usize);
            entries[start..end].sort_unstable();
            let (mut last, mut same) = (u64::MAX, 0);
            for at in start..end {
                let tag = entries[at] >> PLACE_BITS;
                same = if tag == last { same + 1 } else { 1 };
                last = tag;
                if same <= MAX_PLACES {
                    entries[kept] = entries[at];
                    kept += 1;
                }
            }
        }
        buckets.push(kept as u32);
        entries.truncate(kept);
        entries.shrink_to_fit();
        Self {
            bits,
            buckets,
            entries,
            starts,
        }
    }

    /// The seeds of data at byte `at` of something, of the same windows that were indexed.
    pub(crate) fn seeds(&self, data: &[u8], at: u64, found: impl FnMut(Seed)) {
        if !self.entries.is_empty() {
            seeds(data, at, self.bits, found);
        }
    }

    /// The same where nothing was indexed too: for an index of one's own.
    pub(crate) fn sample(&self, data: &[u8], found: impl FnMut(Seed)) {
        seeds(data, 0, self.bits, found);
    }

    /// Where windows with a seed's hash lie, as far as is known.
    pub(crate) fn places(&self, hash: u64) -> impl Iterator<Item = Place> + '_ {
        let bucket_bits = (self.buckets.len() - 1).ilog2();
        let bucket = if bucket_bits == 0 {
            0
        } else {
            (hash >> (64 - bucket_bits)) as usize
        };
        let entries =
            &self.entries[self.buckets[bucket] as usize..self.buckets[bucket + 1] as usize];
        let tag = tag(hash);
        entries
            .iter()
            .skip_while(move |entry| **entry < tag)
            .take_while(move |entry| (**entry ^ tag) >> PLACE_BITS == 0)
            .map(|entry| {
                let place = entry & ((1 << PLACE_BITS) - 1);
                let source = self.starts.partition_point(|start| *start <= place) - 1;
                Place {
                    source: source as u16,
                    at: place - self.starts[source],
                }
            })
    }
}

/// The bits of a hash that an entry keeps; the bucket tells others.
const fn tag(hash: u64) -> u64 {
    hash << PLACE_BITS
}

type Found = Vec<(u64, u64)>;

/// The seeds of all blocks, by block.
fn search(
    sources: &[OldSource],
    blocks: &[Block],
    starts: &[u64],
    bits: u32,
    threads: NonZeroUsize,
    progress: &dyn Progress,
) -> Result<Option<Vec<Found>>, OldError> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let found = Mutex::new((0..blocks.len()).map(|_| Found::new()).collect::<Vec<_>>());
    let failed = Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..threads.get().min(blocks.len()) {
            scope.spawn(|| {
                let mut buffer = Vec::new();
                while !stop.load(Ordering::Relaxed) && !progress.cancelled() {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(block) = blocks.get(number) else {
                        return;
                    };
                    match search_block(
                        &sources[block.source],
                        block,
                        starts[block.source],
                        bits,
                        &mut buffer,
                    ) {
                        Ok(seeds) => {
                            found.lock().unwrap_or_else(|e| e.into_inner())[number] = seeds
                        }
                        Err(error) => {
                            stop.store(true, Ordering::Relaxed);
                            *failed.lock().unwrap_or_else(|e| e.into_inner()) = Some(error);
                        }
                    }
                }
            });
        }
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(error);
    }
    if progress.cancelled() {
        return Ok(None);
    }
    Ok(Some(found.into_inner().unwrap_or_else(|e| e.into_inner())))
}

/// The windows that begin in the block.
fn search_block(
    source: &OldSource,
    block: &Block,
    start: u64,
    bits: u32,
    buffer: &mut Vec<u8>,
) -> Result<Found, OldError> {
    let end = (block.range.end + WINDOW_LEN as u64 - 1).min(source.content.len());
    buffer.resize((end - block.range.start) as usize, 0);
    source.read(block.range.start, buffer)?;
    let mut found = Found::with_capacity(buffer.len() >> bits);
    seeds(buffer, start + block.range.start, bits, |seed| {
        found.push((seed.hash, seed.at))
    });
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use capsule_proto::RootHash;
    use capsule_proto::index::{Source, SourceKind, Space};
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;
    use crate::content::BytesSource;

    fn old(bytes: Vec<u8>) -> OldSource {
        let name = Source {
            kind: SourceKind::Parent,
            root: RootHash::of(&bytes),
            space: Space::Stream,
            size: bytes.len() as u64,
        };
        OldSource {
            name,
            content: Arc::new(BytesSource(bytes)),
        }
    }

    #[test]
    fn every_seed_is_found_in_its_place() {
        let mut random = SmallRng::seed_from_u64(1);
        let contents: Vec<Vec<u8>> = [9_000_000usize, 0, 100_000]
            .into_iter()
            .map(|len| {
                let mut bytes = vec![0; len];
                random.fill_bytes(&mut bytes);
                bytes
            })
            .collect();
        let sources: Vec<_> = contents.iter().cloned().map(old).collect();
        for (max_seeds, bits) in [(1 << 24, 8), (10_000, 10)] {
            for threads in [1, 3] {
                let options = SimilarOptions {
                    max_seeds,
                    threads: threads.try_into().unwrap(),
                };
                let index = Similar::build(&sources, &options, &()).unwrap().unwrap();
                assert_eq!(index.bits, bits);
                let mut count = 0;
                for (source, bytes) in contents.iter().enumerate() {
                    index.seeds(bytes, 0, |seed| {
                        let place = Place {
                            source: source as u16,
                            at: seed.at,
                        };
                        count += usize::from(index.places(seed.hash).any(|found| found == place));
                    });
                }
                let expected = 9_100_000 >> bits;
                assert!(
                    (expected * 8 / 10..expected * 11 / 10).contains(&count),
                    "{count}"
                );
                assert!(
                    count * 100 >= index.entries.len() * 99,
                    "{count} of {}",
                    index.entries.len()
                );
            }
        }
    }

    #[test]
    fn what_lies_everywhere_is_remembered_in_few_places() {
        let mut piece = vec![0; 5000];
        SmallRng::seed_from_u64(2).fill_bytes(&mut piece);
        let sources = [old(piece.repeat(100))];
        let index = Similar::build(&sources, &SimilarOptions::default(), &())
            .unwrap()
            .unwrap();
        let mut most = 0;
        index.seeds(&piece, 0, |seed| {
            most = most.max(index.places(seed.hash).count())
        });
        assert_eq!(most, MAX_PLACES);
        assert_eq!(Similar::nothing().places(7).count(), 0);
    }
}
