//! What resuming a capture will read first lies together at the front of its packs, as far as that is known when it is made or told later.
//!
//! Over a thin link, each chunk group that holds a little of it and much else costs a third of a second.

use std::io::Write;
use std::ops::Range;

use capsule_chunker::bao::TreeHasher;
use capsule_chunker::content::Content;
use capsule_chunker::layer::encode::{EncodeError, Hashed};
use capsule_chunker::layer::front::{Front, NewFrame, Next};
use capsule_proto::RootHash;
use capsule_proto::index::Index;
use capsule_proto::manifest::ComponentKind;
use capsule_proto::record::BlobRef;

use crate::control::Failure;
use crate::encoding::{DraftPack, MadeLayer};
use crate::failure::of_hash;
use crate::store::Store;
use crate::work::Work;

/// Longest pack that is written anew for it.
const MAX_PACK: u64 = 4 << 30;
/// Length of frames of pages of memory: all of them are fetched, but each is decoded for one page.
const FRAME_LEN: u32 = 128 << 10;

/// A component that a layer makes, and what is read first of it.
pub(super) struct Resumed<'a> {
    pub kind: ComponentKind,
    pub content: &'a dyn Content,
    pub hashed: Hashed<'a>,
    pub reads: &'a [Range<u64>],
    /// Whether nobody waits for it.
    pub behind: bool,
}

impl MadeLayer {
    /// The same, with what these ranges of it take at the front of the pack, where there is room for both packs. Blocks.
    pub(super) fn with_in_front(
        mut self,
        store: &Store,
        (kind, content): (ComponentKind, &dyn Content),
        reads: &[Range<u64>],
        work: &Work,
    ) -> Result<Self, Failure> {
        if let Err(failure) = self.put_in_front(store, (kind, content), reads, work) {
            work.check()?;
            // The layer is as it was: only slower to resume from.
            tracing::warn!(%failure.message, "what is read first lies where it was");
        }
        Ok(self)
    }

    fn put_in_front(
        &mut self,
        store: &Store,
        (kind, content): (ComponentKind, &dyn Content),
        reads: &[Range<u64>],
        work: &Work,
    ) -> Result<(), Failure> {
        let (Some(layer), Some(outboard)) = (&mut self.layer, &self.outboard) else {
            return Ok(());
        };
        let (Some(pack), Some(blobs)) = (&mut layer.pack, self.way.last_mut()) else {
            return Ok(());
        };
        let resumed = Resumed {
            kind,
            content,
            hashed: Hashed {
                tree: self.tree,
                outboard,
            },
            reads,
            behind: false,
        };
        let size = pack.blob.size;
        let Some(front) = InFront::of(&layer.index, size, &resumed, 0, work)? else {
            return Ok(());
        };
        // Who resumes it spares at least as much as all of it becomes longer by.
        if front.saved() <= front.growth(size) {
            return Ok(());
        }
        let read = |at, into: &mut [u8]| Ok(pack.import.read_exact_at(at, into)?);
        let (index, in_front) = front.write(store, read, work)?;
        (self.stats.pack, self.stats.frames) = (in_front.blob.size, front.frames());
        layer.blobs.index = RootHash::of(&index);
        layer.blobs.pack = Some(in_front.blob.root);
        layer.index = index;
        *pack = in_front;
        *blobs = layer.blobs;
        Ok(())
    }
}

/// A layer as it becomes when what is read first lies in front.
pub(super) struct InFront {
    before: Index,
    front: Front,
    new: Vec<NewFrame>,
    index: Vec<u8>,
    /// How much longer that is.
    longer: u64,
}

impl InFront {
    /// What of a layer's content is read first is compressed anew; none where it lies in front, where there is not more than `least` to be saved, or
    /// where the layer is too large to be held whole.
    pub fn of(
        index: &[u8],
        pack_size: u64,
        resumed: &Resumed<'_>,
        least: u64,
        work: &Work,
    ) -> Result<Option<Self>, Failure> {
        if pack_size > MAX_PACK || resumed.reads.is_empty() {
            return Ok(None);
        }
        let tree = &resumed.hashed.tree;
        let before = Index::decode(index).ok();
        let Some(before) = before.filter(|index| index.directory.header().target_size == tree.size)
        else {
            return Ok(None);
        };
        let len = frame_len(resumed.kind, &before);
        let front = Front::of(&before, resumed.reads, len);
        let Some(front) = front.filter(|front| front.scattered() > least) else {
            return Ok(None);
        };
        let new = front.make(resumed.content, &resumed.hashed, !resumed.behind, work)?;
        let after = front.index(&before, &new).map_err(EncodeError::from)?;
        Ok(Some(Self {
            longer: (after.len() as u64).saturating_sub(index.len() as u64),
            index: after,
            before,
            front,
            new,
        }))
    }

    /// Bytes that whoever resumes it fetches less than before.
    pub fn saved(&self) -> u64 {
        let together = self.front.together(&self.before, &self.new);
        let scattered = self.front.scattered();
        scattered.saturating_sub(together + self.longer)
    }

    /// Of so many that it fetched of the pack.
    pub const fn scattered(&self) -> u64 {
        self.front.scattered()
    }

    /// By how much the pack becomes longer.
    pub fn growth(&self, pack_size: u64) -> u64 {
        self.pack_len().saturating_sub(pack_size)
    }

    /// Length of the pack as it becomes.
    pub fn pack_len(&self) -> u64 {
        self.front.pack_len(&self.before, &self.new)
    }

    /// How many frames it has then.
    pub fn frames(&self) -> u64 {
        self.front.order().count() as u64
    }

    /// Index and pack. `read` reads the pack as it was.
    pub fn write(
        &self,
        store: &Store,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), Failure>,
        work: &Work,
    ) -> Result<(Vec<u8>, DraftPack), Failure> {
        let mut import = store.begin_import()?;
        let mut hasher = TreeHasher::with_storage(store.scratch()?);
        let mut kept = Vec::new();
        for next in self.front.order() {
            work.check()?;
            let frame = match next {
                Next::New(number) => &self.new[number].bytes,
                Next::Kept(id) => {
                    let was = &self.before.frames[id as usize];
                    kept.resize(was.pack_len as usize, 0);
                    read(was.pack_offset, &mut kept)?;
                    &kept
                }
            };
            import.write_all(frame).map_err(|e| import.fault(e))?;
            hasher.push(frame).map_err(of_hash)?;
        }
        let (tree, outboard) = hasher.finish().map_err(of_hash)?;
        let blob = BlobRef {
            root: tree.root,
            size: tree.size,
        };
        let pack = DraftPack {
            blob,
            import,
            outboard,
        };
        Ok((self.index.clone(), pack))
    }
}

/// Most bytes of a frame of pages. Whoever looks for content of a disk in other data cuts that by the longest frame: it stays what it was.
fn frame_len(kind: ComponentKind, index: &Index) -> u32 {
    let longest = index.frames.iter().map(|frame| frame.len).max();
    match kind {
        ComponentKind::Ram => FRAME_LEN,
        _ => longest.unwrap_or_default().min(FRAME_LEN),
    }
}

#[cfg(test)]
mod tests {
    use capsule_chunker::content::{BytesSource, Content};
    use capsule_chunker::layer::encode::{Effort, EncodeOptions};
    use capsule_chunker::layer::read::ReadOptions;
    use capsule_proto::index::RunFrom;
    use capsule_proto::manifest::ComponentKind;

    use super::*;
    use crate::encoding::first_stream;
    use crate::layers::open;
    use crate::store::StoreOptions;

    #[test]
    fn what_is_read_first_lies_in_front_and_all_of_it_is_what_it_was() {
        const PAGE: u64 = 4096;
        let temp = tempfile::tempdir().unwrap();
        let store = Store::open(&temp.path().join("store"), StoreOptions::default()).unwrap();
        let mut content = vec![0; 4 << 20];
        crate::home::system_entropy(&mut content);
        let options = EncodeOptions::new(ComponentKind::Ram, Effort::Fast);
        let source = BytesSource(&content);
        let made = || first_stream(&store, &source, &options, &Work::default()).unwrap();
        let (before, first) = (made().way, 500 * PAGE);
        // Nothing is known, or it lies there anyhow.
        for end in [0, 4 << 20] {
            let reads = [0..end, 0..end];
            let same = made().with_in_front(
                &store,
                (ComponentKind::Ram, &source),
                &reads,
                &Work::default(),
            );
            assert_eq!(same.unwrap().way, before, "{end}");
        }
        let reads = [first..first + PAGE, 900 * PAGE..901 * PAGE];
        // It is not worth failing for.
        let full = made();
        store.set_quota(Some(store.usage().used + 1000));
        let full = full.with_in_front(
            &store,
            (ComponentKind::Ram, &source),
            &reads,
            &Work::default(),
        );
        assert_eq!(full.unwrap().way, before);
        store.set_quota(None);
        let made = made().with_in_front(
            &store,
            (ComponentKind::Ram, &source),
            &reads,
            &Work::default(),
        );
        let made = made.unwrap();
        let mut layer = made.layer.unwrap();
        let index = Index::decode(&layer.index).unwrap();
        let mut runs = index.runs.iter();
        let run = runs.find(|run| run.start <= first && first < run.end());
        assert!(
            matches!(run.unwrap().from, RunFrom::Frame { id: 0, .. }),
            "{run:?}"
        );
        assert_ne!(made.way, before);
        layer.keep(&store).unwrap();
        let read = open(&store, &made.way, &ReadOptions { cache_len: 1 << 20 }).unwrap();
        let mut bytes = vec![0; content.len()];
        read.read_at(0, &mut bytes).unwrap();
        assert!(bytes == content);
    }
}
