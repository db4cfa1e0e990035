//! What resuming a capture will read first lies together at the front of its packs, as far as that is known when it is made or told later.
//!
//! Over a thin link, each chunk group that holds a little of it and much else costs a third of a second.

use std::io::Write;
use std::ops::Range;

use capsule_chunker::bao::TreeHasher;
use capsule_chunker::content::Content;
use capsule_chunker::layer::encode::EncodeError;
use capsule_chunker::layer::front::{Front, Gathered};
use capsule_proto::RootHash;
use capsule_proto::index::Index;
use capsule_proto::record::BlobRef;

use crate::control::Failure;
use crate::encoding::{DraftLayer, DraftPack, MadeLayer};
use crate::failure::of_hash;
use crate::store::Store;
use crate::work::Work;

/// Longest pack that is written anew for it.
const MAX_PACK: u64 = 4 << 30;

impl MadeLayer {
    /// The same, with what these ranges of it take at the front of the pack, where there is room for both packs. Blocks.
    pub(super) fn with_in_front(
        mut self,
        store: &Store,
        reads: &[Range<u64>],
        content: &dyn Content,
        work: &Work,
    ) -> Result<Self, Failure> {
        if reads.is_empty() {
            return Ok(self);
        }
        if let Some(layer) = &mut self.layer
            && let Some(blobs) = self.way.last_mut()
        {
            if let Err(failure) = put_in_front(store, layer, reads, content, work) {
                work.check()?;
                // The layer is as it was: only slower to resume from.
                tracing::warn!(%failure.message, "what is read first lies where it was");
            }
            *blobs = layer.blobs;
        }
        Ok(self)
    }
}

fn put_in_front(
    store: &Store,
    layer: &mut DraftLayer,
    reads: &[Range<u64>],
    content: &dyn Content,
    work: &Work,
) -> Result<(), Failure> {
    let Some(pack) = &mut layer.pack else {
        return Ok(());
    };
    let size = pack.blob.size;
    let Some(front) = InFront::of(&layer.index, size, reads, content, work)? else {
        return Ok(());
    };
    let (scattered, together) = front.fetched();
    let saved = scattered.saturating_sub(together);
    // Who resumes it spares at least as much as all of it becomes longer by.
    if saved == 0 || saved < front.pack_len().saturating_sub(size) {
        return Ok(());
    }
    let read = |at, into: &mut [u8]| Ok(pack.import.read_exact_at(at, into)?);
    let (index, in_front) = front.write(store, read, work)?;
    layer.blobs.index = RootHash::of(&index);
    layer.blobs.pack = Some(in_front.blob.root);
    layer.index = index;
    *pack = in_front;
    Ok(())
}

/// A layer as it becomes when what is read first lies in front.
pub(super) struct InFront {
    index: Index,
    front: Front,
    gathered: Vec<Gathered>,
}

impl InFront {
    /// What of a layer's content is read first is compressed anew; none where it lies in front, or where the layer is too large to be held whole.
    pub fn of(
        index: &[u8],
        pack_size: u64,
        reads: &[Range<u64>],
        content: &dyn Content,
        work: &Work,
    ) -> Result<Option<Self>, Failure> {
        let index = Index::decode(index).ok();
        let Some(index) = index.filter(|_| pack_size <= MAX_PACK) else {
            return Ok(None);
        };
        let Some(front) = Front::of(&index, reads) else {
            return Ok(None);
        };
        let mut gathered = Vec::with_capacity(front.frames());
        for number in 0..front.frames() {
            work.check()?;
            gathered.push(front.gather(content, number)?);
        }
        Ok(Some(Self {
            index,
            front,
            gathered,
        }))
    }

    /// Bytes that are fetched of what is read first: as it was, and as it becomes.
    pub fn fetched(&self) -> (u64, u64) {
        self.front.fetched(&self.index, &self.gathered)
    }

    /// Length of the pack as it becomes.
    pub fn pack_len(&self) -> u64 {
        self.front.pack_len(&self.index, &self.gathered)
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
        let mut write = |frame: &[u8]| {
            work.check()?;
            import.write_all(frame).map_err(|e| import.fault(e))?;
            hasher.push(frame).map_err(of_hash)
        };
        for new in &self.gathered {
            write(&new.bytes)?;
        }
        let mut frame = Vec::new();
        for place in self.front.places(&self.index) {
            frame.resize((place.end - place.start) as usize, 0);
            read(place.start, &mut frame)?;
            write(&frame)?;
        }
        let (tree, outboard) = hasher.finish().map_err(of_hash)?;
        let index = self.front.index(&self.index, &self.gathered);
        let blob = BlobRef {
            root: tree.root,
            size: tree.size,
        };
        let pack = DraftPack {
            blob,
            import,
            outboard,
        };
        Ok((index.map_err(EncodeError::from)?, pack))
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
            let same = made().with_in_front(&store, &reads, &source, &Work::default());
            assert_eq!(same.unwrap().way, before, "{end}");
        }
        let reads = [first..first + PAGE, 900 * PAGE..901 * PAGE];
        // It is not worth failing for.
        let full = made();
        store.set_quota(Some(store.usage().used + 1000));
        let full = full.with_in_front(&store, &reads, &source, &Work::default());
        assert_eq!(full.unwrap().way, before);
        store.set_quota(None);
        let made = made().with_in_front(&store, &reads, &source, &Work::default());
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
