//! Making a capsule of a path: reading, encoding, hashing. Everything goes into imports and scratch files of the store,
//! which leave nothing behind when they are dropped; keeping and naming is the room's other half. With a parent, `update`
//! finds out what of the content the parent has.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use capsule_chunker::bao::Tree;
use capsule_chunker::content::{BytesSource, Source};
use capsule_chunker::image::{self, ImageKind, ImageOptions, ReadAs};
use capsule_chunker::layer::EncodeStats;
use capsule_chunker::layer::encode::{ContentHashes, EncodeOptions, Encoded, Outputs, encode};
use capsule_chunker::tree::{ScanOptions, scan};
use capsule_proto::RootHash;
use capsule_proto::index::{Source as IndexSource, Space};
use capsule_proto::listing::EntryPath;
use capsule_proto::manifest::{Component, ComponentKind, Manifest};
use capsule_proto::record::BlobRef;
use positioned_io::{ReadAt, WriteAt};

use super::parent::{Old, Parent};
use super::trim::{self, Trimming};
use crate::control::{Failure, FailureCode, Phase, Progress, Publish, PublishAs, Reporter};
use crate::held::{HeldWay, TreeWay};
use crate::store::{Import, LayerBlobs, Scratch, Store};
use crate::work::Work;

/// A capsule that is made, but not kept yet: nothing refers to what it wrote.
pub(super) struct Draft {
    pub manifest: Manifest,
    /// The layers that were made; none of what the parent has as it is.
    pub layers: Vec<DraftLayer>,
    /// How the component is read when they are kept.
    pub way: HeldWay,
    /// A tree's listing.
    pub listing: Option<Vec<u8>>,
    /// A stream's hash tree.
    pub outboard: Option<Scratch>,
    pub stats: EncodeStats,
    pub trimming: Trimming,
    pub warnings: Vec<String>,
}

/// A layer that is made.
pub(super) struct DraftLayer {
    pub space: Space,
    pub parent: Option<RootHash>,
    pub blobs: LayerBlobs,
    pub index: Vec<u8>,
    pub pack: Option<DraftPack>,
}

pub(super) struct DraftPack {
    pub blob: BlobRef,
    pub import: Import,
    pub outboard: Scratch,
}

/// What making a draft works with.
pub(super) struct Making<'a> {
    pub store: &'a Store,
    /// The node's own directory, which is never published.
    pub home: &'a Path,
    pub request: &'a Publish,
    pub parent: Option<&'a Parent>,
    pub work: &'a Work,
    pub reporter: &'a Reporter,
}

/// Reads and encodes. Blocks; nothing is kept when it fails or the draft is dropped.
pub(super) fn make(making: &Making<'_>) -> Result<Draft, Failure> {
    let request = making.request;
    let is_dir = std::fs::metadata(&request.path)
        .map_err(|e| unreadable(&request.path, &e))?
        .is_dir();
    if request.trim {
        trim::check_request(&request.path, is_dir, request.read_as)?;
    }
    match (is_dir, request.read_as) {
        (true, PublishAs::Auto | PublishAs::Tree) => making.tree(),
        (false, PublishAs::Tree) => {
            let message = format!("{} is not a directory", request.path.display());
            Err(Failure::new(FailureCode::Invalid, message).hint("leave out --as tree"))
        }
        (_, PublishAs::Disk) => making.stream(ReadAs::Disk),
        (_, PublishAs::File) => making.stream(ReadAs::File),
        (false, PublishAs::Auto) => making.stream(ReadAs::Auto),
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    let hint = match error.kind() {
        std::io::ErrorKind::PermissionDenied => {
            "the node reads it, not the command: run the node as a user who may"
        }
        _ => "check the path; the node must see it under that path too",
    };
    Failure::new(
        crate::failure::io_code(error),
        format!("cannot read {}: {error}", path.display()),
    )
    .hint(hint)
}

impl Making<'_> {
    pub fn options(&self, kind: ComponentKind) -> EncodeOptions {
        let mut options = EncodeOptions::new(kind, self.request.effort);
        if let Some(frame_max) = self.request.frame_max {
            options.frame_max = frame_max;
        }
        options
    }

    fn stream(&self, read_as: ReadAs) -> Result<Draft, Failure> {
        let path = &self.request.path;
        let image = image::open(path, &ImageOptions { read_as })?;
        let mut warnings = Vec::new();
        if image.in_use {
            let path = path.display();
            warnings.push(format!("{path} is mounted or in use: what is written to it meanwhile makes the copy inconsistent; unmount it, or publish a snapshot"));
            warnings
                .iter()
                .for_each(|warning| self.reporter.notice(warning));
        }
        let (kind, name) = match image.kind {
            ImageKind::Disk => (ComponentKind::Disk, "disk0"),
            ImageKind::File => (ComponentKind::File, "file"),
        };
        let (trimmed, trimming) = self.trim(&*image.source, image.kind, &mut warnings)?;
        let source: &dyn Source = match &trimmed {
            Some(trimmed) => trimmed,
            None => &*image.source,
        };
        self.work.set_total(source.len());
        let made = self.stream_layer(source, kind, name)?;
        let component = Component {
            name: name.to_owned(),
            kind,
            root: made.tree.root,
            size: made.tree.size,
            content_size: made.tree.size,
        };
        Ok(Draft {
            manifest: new_manifest(component)?,
            layers: made.layer.into_iter().collect(),
            way: HeldWay::Layers(made.way),
            listing: None,
            outboard: made.outboard,
            stats: made.stats,
            trimming,
            warnings,
        })
    }

    /// A stream's layer: an update where there is a parent, else from nothing.
    fn stream_layer(
        &self,
        source: &dyn Source,
        kind: ComponentKind,
        name: &str,
    ) -> Result<MadeLayer, Failure> {
        let parent = self.parent.and_then(|parent| parent.component(name, kind));
        let old = parent.map_or(Ok(None), |component| {
            Old::open(self.store, component, Space::Stream)
        })?;
        match old {
            Some(old) => self.update_stream(source, kind, old),
            None => self.first_stream(source, &self.options(kind)),
        }
    }

    /// A stream's layer from nothing.
    pub fn first_stream(
        &self,
        source: &dyn Source,
        options: &EncodeOptions,
    ) -> Result<MadeLayer, Failure> {
        let mut import = self.store.begin_import()?;
        let encoded = encode(
            source,
            options,
            outputs(self.store, &mut import)?,
            self.work,
        )?;
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
        })
    }

    fn tree(&self) -> Result<Draft, Failure> {
        let path = &self.request.path;
        self.reporter.progress(Progress {
            phase: Phase::Scanning,
            done: 0,
            total: None,
            rate: 0,
            peers: 0,
            written: 0,
            what: Some(path.display().to_string()),
        });
        let own = own_within(self.home, path)?;
        let mut warnings = Vec::new();
        if own.is_some() {
            warnings.push(format!(
                "{} is left out: it is this node's own, with its keys",
                self.home.display()
            ));
            warnings
                .iter()
                .for_each(|warning| self.reporter.notice(warning));
        }
        let source = scan(
            path,
            &ScanOptions {
                one_file_system: self.request.one_file_system,
                without: own,
            },
        )?;
        self.work.check()?;
        let parent = self
            .parent
            .and_then(|parent| parent.component("tree", ComponentKind::Tree));
        let contents = self.contents(&source, parent)?;
        let listing = source.into_listing(&contents.roots)?.encode();
        let names = self.listing(&listing, parent)?;
        let component = Component {
            name: "tree".to_owned(),
            kind: ComponentKind::Tree,
            root: names.tree.root,
            size: names.tree.size,
            content_size: contents.size,
        };
        let root = names.tree.root;
        let unchanged = parent.is_some_and(|parent| parent.root == root);
        let mut layers: Vec<DraftLayer> = names.layer.into_iter().collect();
        let mut way = TreeWay {
            listing: names.way,
            contents: contents.below,
        };
        if !unchanged {
            let layer = contents.encoded.into_layer(root);
            way.contents.push(layer.blobs);
            layers.push(layer);
        }
        Ok(Draft {
            manifest: new_manifest(component)?,
            layers,
            way: HeldWay::Tree(way),
            listing: Some(listing),
            outboard: None,
            stats: contents.stats,
            trimming: Trimming::default(),
            warnings,
        })
    }

    /// A listing's layer.
    fn listing(&self, listing: &[u8], parent: Option<&Component>) -> Result<MadeLayer, Failure> {
        let source = BytesSource(listing);
        let old = parent.map_or(Ok(None), |component| {
            Old::open(self.store, component, Space::Stream)
        })?;
        let quiet = Making {
            work: &Work::default(),
            ..*self
        };
        match old {
            Some(old) => quiet.update_stream(&source, ComponentKind::File, old),
            None => quiet.first_stream(&source, &self.options(ComponentKind::File)),
        }
    }
}

/// A stream's layer, and what is known of the stream then.
pub(super) struct MadeLayer {
    pub tree: Tree,
    /// None where the parent is the same.
    pub layer: Option<DraftLayer>,
    pub way: Vec<LayerBlobs>,
    pub outboard: Option<Scratch>,
    pub stats: EncodeStats,
}

/// A tree's contents, encoded; their layer waits for the listing's root.
pub(super) struct MadeContents {
    pub size: u64,
    pub roots: Vec<RootHash>,
    /// The layers of the parent.
    pub below: Vec<LayerBlobs>,
    pub encoded: EncodedContents,
    pub stats: EncodeStats,
}

pub(super) struct EncodedContents {
    pub encoded: StoreEncoded,
    pub import: Import,
    pub parent: Option<RootHash>,
    pub sources: Vec<IndexSource>,
}

impl EncodedContents {
    fn into_layer(self, root: RootHash) -> DraftLayer {
        let Self {
            encoded,
            import,
            parent,
            sources,
        } = self;
        finish_layer(encoded, import, root, parent, sources).0
    }
}

pub(super) fn unexpected(message: &str) -> Failure {
    Failure::new(FailureCode::Internal, message)
}

/// Where in a directory the node's home lies, if it does.
fn own_within(home: &Path, dir: &Path) -> Result<Option<EntryPath>, Failure> {
    let real = |path: &Path| path.canonicalize().map_err(|e| unreadable(path, &e));
    let (home, dir) = (real(home)?, real(dir)?);
    if dir.starts_with(&home) {
        let message = format!("{} belongs to this node itself", dir.display());
        return Err(Failure::new(FailureCode::Invalid, message)
            .hint("publish another directory: this one holds the node's keys and its store"));
    }
    let below = home.strip_prefix(&dir).ok();
    Ok(below.and_then(|path| EntryPath::new(path.as_os_str().as_bytes()).ok()))
}

fn new_manifest(component: Component) -> Result<Manifest, Failure> {
    Manifest::new(vec![component]).map_err(|e| {
        Failure::new(
            FailureCode::Invalid,
            format!("this cannot be a capsule: {e}"),
        )
    })
}

/// Scratch space that can be taken out of what encoding returns.
pub(super) struct Slot(pub Option<Scratch>);

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

pub(super) type StoreEncoded = Encoded<Slot, Slot>;

/// Places in the store for what encoding makes.
pub(super) fn outputs<'a>(
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
pub(super) fn finish_layer(
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
