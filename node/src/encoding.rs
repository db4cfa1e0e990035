//! Encoding into the store: where layers grow that are not kept yet, and how they are kept.
//!
//! Publishing makes layers of what a path holds; a pull that finds content in local data, and a rebase, make them of content that is
//! read through other layers. What is dropped before it is kept leaves nothing behind.

use std::io;

use capsule_chunker::bao::Tree;
use capsule_chunker::content::Source;
use capsule_chunker::layer::EncodeStats;
use capsule_chunker::layer::encode::{ContentHashes, EncodeOptions, Encoded, Outputs, encode};
use capsule_proto::RootHash;
use capsule_proto::index::{Source as IndexSource, Space};
use capsule_proto::record::BlobRef;
use positioned_io::{ReadAt, WriteAt};

use crate::control::{Failure, FailureCode};
use crate::store::{BlobKind, Import, LayerBlobs, Scratch, Store};
use crate::work::Work;

/// A layer that is made.
pub struct DraftLayer {
    pub space: Space,
    pub parent: Option<RootHash>,
    pub blobs: LayerBlobs,
    pub index: Vec<u8>,
    pub pack: Option<DraftPack>,
}

pub struct DraftPack {
    pub blob: BlobRef,
    pub import: Import,
    pub outboard: Scratch,
}

/// A stream's layer, and what is known of the stream then.
pub struct MadeLayer {
    pub tree: Tree,
    /// None where the parent is the same.
    pub layer: Option<DraftLayer>,
    pub way: Vec<LayerBlobs>,
    pub outboard: Option<Scratch>,
    pub stats: EncodeStats,
    /// Bytes that were not read, as the source told that they are the parent's.
    pub unread: u64,
}

/// A tree's contents, encoded from nothing.
pub struct FirstContents {
    /// The roots of its files, in order.
    pub roots: Vec<RootHash>,
    /// What was encoded; its layer waits for the listing's root.
    pub encoded: StoreEncoded,
    /// The pack.
    pub import: Import,
}

/// A stream's layer from nothing.
pub fn first_stream(
    store: &Store,
    source: &dyn Source,
    options: &EncodeOptions,
    work: &Work,
) -> Result<MadeLayer, Failure> {
    let mut import = store.begin_import()?;
    let encoded = encode(source, options, outputs(store, &mut import)?, work)?;
    let ContentHashes::Stream(tree, _) = encoded.content else {
        return Err(unexpected("a stream came with parts"));
    };
    let stats = encoded.stats;
    let (layer, outboard) = finish_layer(encoded, import, tree.root, None, Vec::new());
    Ok(MadeLayer {
        tree,
        way: vec![layer.blobs],
        layer: Some(layer),
        outboard,
        stats,
        unread: 0,
    })
}

/// A tree's contents from nothing.
pub fn first_contents(
    store: &Store,
    source: &dyn Source,
    options: &EncodeOptions,
    work: &Work,
) -> Result<FirstContents, Failure> {
    let mut import = store.begin_import()?;
    let encoded = encode(source, options, outputs(store, &mut import)?, work)?;
    let ContentHashes::Parts(roots) = &encoded.content else {
        return Err(unexpected("a tree came as a stream"));
    };
    Ok(FirstContents {
        roots: roots.clone(),
        encoded,
        import,
    })
}

impl DraftLayer {
    /// Keeps its blobs, durably.
    pub fn keep(&mut self, store: &Store) -> Result<(), Failure> {
        store.put_small(&self.index, BlobKind::Index)?;
        if let Some(DraftPack {
            blob,
            import,
            outboard,
        }) = self.pack.take()
        {
            import.commit(&blob.root, blob.size, outboard, BlobKind::Pack)?;
        }
        Ok(())
    }
}

pub fn unexpected(message: &str) -> Failure {
    Failure::new(FailureCode::Internal, message)
}

/// Scratch space that can be taken out of what encoding returns.
pub struct Slot(pub Option<Scratch>);

impl Slot {
    fn get(&self) -> io::Result<&Scratch> {
        self.0
            .as_ref()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl ReadAt for Slot {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.get()?.read_at(offset, buf)
    }
}

impl WriteAt for Slot {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .as_mut()
            .ok_or(io::ErrorKind::NotFound)?
            .write_at(offset, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub type StoreEncoded = Encoded<Slot, Slot>;

/// Places in the store for what encoding makes.
pub fn outputs<'a>(
    store: &Store,
    import: &'a mut Import,
) -> Result<Outputs<'a, Slot, Slot>, Failure> {
    let slot = || Ok::<_, Failure>(Slot(Some(store.scratch()?)));
    Ok(Outputs {
        pack: import,
        pack_outboard: slot()?,
        content_outboard: slot()?,
    })
}

/// The layer, and a stream's outboard where encoding made it.
pub fn finish_layer(
    mut encoded: StoreEncoded,
    import: Import,
    root: RootHash,
    parent: Option<RootHash>,
    sources: Vec<IndexSource>,
) -> (DraftLayer, Option<Scratch>) {
    let tree = encoded.pack;
    let blob = BlobRef {
        root: tree.root,
        size: tree.size,
    };
    let outboard = encoded.pack_outboard.0.take();
    let pack = outboard
        .filter(|_| tree.size > 0)
        .map(|outboard| DraftPack {
            blob,
            import,
            outboard,
        });
    let (space, content) = match &mut encoded.content {
        ContentHashes::Stream(_, slot) => (Space::Stream, slot.0.take()),
        ContentHashes::Known => (Space::Stream, None),
        ContentHashes::Parts(_) => (Space::Contents, None),
    };
    let index = encoded.into_update_index(root, parent, sources);
    let blobs = LayerBlobs {
        index: RootHash::of(&index),
        pack: pack.as_ref().map(|pack| pack.blob.root),
    };
    (
        DraftLayer {
            space,
            parent,
            blobs,
            index,
            pack,
        },
        content,
    )
}
