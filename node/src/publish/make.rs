//! Making a capsule of a path: reading, encoding, hashing. Everything goes into imports and scratch files of the store,
//! which leave nothing behind when they are dropped; keeping and naming is the room's other half.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use capsule_chunker::content::{BytesSource, Content, Source};
use capsule_chunker::image::{self, ImageKind, ImageOptions, ReadAs};
use capsule_chunker::layer::EncodeStats;
use capsule_chunker::layer::encode::{ContentHashes, EncodeOptions, Encoded, Outputs, encode};
use capsule_chunker::tree::{ScanOptions, scan};
use capsule_proto::RootHash;
use capsule_proto::index::Space;
use capsule_proto::listing::EntryPath;
use capsule_proto::manifest::{Component, ComponentKind, Manifest};
use capsule_proto::record::BlobRef;
use positioned_io::{ReadAt, WriteAt};

use crate::control::{Failure, FailureCode, Phase, Progress, Publish, PublishAs, Reporter};
use crate::store::{Import, LayerBlobs, Scratch, Store};
use crate::work::Work;

/// A capsule that is made, but not kept yet: nothing refers to what it wrote.
pub(super) struct Draft {
    pub manifest: Manifest,
    pub layers: Vec<DraftLayer>,
    /// A tree's listing.
    pub listing: Option<Vec<u8>>,
    /// A stream's hash tree.
    pub outboard: Option<Scratch>,
    pub stats: EncodeStats,
    pub warnings: Vec<String>,
}

/// A layer that is made.
pub(super) struct DraftLayer {
    pub space: Space,
    pub target_size: u64,
    pub blobs: LayerBlobs,
    pub index: Vec<u8>,
    pub pack: Option<DraftPack>,
}

pub(super) struct DraftPack {
    pub blob: BlobRef,
    pub import: Import,
    pub outboard: Scratch,
}

/// Reads and encodes. Blocks; nothing is kept when it fails or the draft is dropped.
///
/// A directory that holds the node's own `home` is published without it: it changes while it is read, and holds secret keys.
pub(super) fn make(
    (store, home): (&Store, &Path),
    request: &Publish,
    work: &Work,
    reporter: &Reporter,
) -> Result<Draft, Failure> {
    let is_dir = std::fs::metadata(&request.path)
        .map_err(|e| unreadable(&request.path, &e))?
        .is_dir();
    match (is_dir, request.read_as) {
        (true, PublishAs::Auto | PublishAs::Tree) => {
            make_tree((store, home), request, work, reporter)
        }
        (false, PublishAs::Tree) => {
            let message = format!("{} is not a directory", request.path.display());
            Err(Failure::new(FailureCode::Invalid, message).hint("leave out --as tree"))
        }
        (_, read_as) => {
            let read_as = match read_as {
                PublishAs::Disk => ReadAs::Disk,
                PublishAs::File => ReadAs::File,
                PublishAs::Auto | PublishAs::Tree => ReadAs::Auto,
            };
            make_stream(store, request, read_as, work, reporter)
        }
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

fn options(kind: ComponentKind, request: &Publish) -> EncodeOptions {
    let mut options = EncodeOptions::new(kind, request.effort);
    if let Some(frame_max) = request.frame_max {
        options.frame_max = frame_max;
    }
    options
}

fn make_stream(
    store: &Store,
    request: &Publish,
    read_as: ReadAs,
    work: &Work,
    reporter: &Reporter,
) -> Result<Draft, Failure> {
    let image = image::open(&request.path, &ImageOptions { read_as })?;
    let mut warnings = Vec::new();
    if image.in_use {
        let path = request.path.display();
        warnings.push(format!("{path} is mounted or in use: what is written to it meanwhile makes the copy inconsistent; unmount it, or publish a snapshot"));
        warnings.iter().for_each(|warning| reporter.notice(warning));
    }
    let (kind, name) = match image.kind {
        ImageKind::Disk => (ComponentKind::Disk, "disk0"),
        ImageKind::File => (ComponentKind::File, "file"),
    };
    work.set_total(image.source.len());
    let (encoded, import) = encode_into(store, &*image.source, &options(kind, request), work)?;
    let (root, size, stats) = match &encoded.content {
        ContentHashes::Stream(tree, _) => (tree.root, tree.size, encoded.stats),
        ContentHashes::Parts(_) => {
            return Err(Failure::new(
                FailureCode::Internal,
                "a stream came with parts",
            ));
        }
    };
    let component = Component {
        name: name.to_owned(),
        kind,
        root,
        size,
        content_size: size,
    };
    let (layer, outboard) = finish_layer(encoded, import, root);
    let manifest = new_manifest(component)?;
    Ok(Draft {
        manifest,
        layers: vec![layer],
        listing: None,
        outboard,
        stats,
        warnings,
    })
}

fn make_tree(
    (store, home): (&Store, &Path),
    request: &Publish,
    work: &Work,
    reporter: &Reporter,
) -> Result<Draft, Failure> {
    reporter.progress(Progress {
        phase: Phase::Scanning,
        done: 0,
        total: None,
        rate: 0,
        peers: 0,
        written: 0,
        what: Some(request.path.display().to_string()),
    });
    let own = own_within(home, &request.path)?;
    let mut warnings = Vec::new();
    if own.is_some() {
        warnings.push(format!(
            "{} is left out: it is this node's own, with its keys",
            home.display()
        ));
        warnings.iter().for_each(|warning| reporter.notice(warning));
    }
    let source = scan(
        &request.path,
        &ScanOptions {
            one_file_system: request.one_file_system,
            without: own,
        },
    )?;
    work.check()?;
    work.set_total(source.len());
    let (encoded, import) =
        encode_into(store, &source, &options(ComponentKind::Tree, request), work)?;
    let (stats, content_size) = (encoded.stats, encoded.size);
    let listing = match &encoded.content {
        ContentHashes::Parts(hashes) => source.into_listing(hashes)?.encode(),
        ContentHashes::Stream(..) => {
            return Err(Failure::new(
                FailureCode::Internal,
                "a tree came as a stream",
            ));
        }
    };
    let root = RootHash::of(&listing);
    let size = listing.len() as u64;
    let component = Component {
        name: "tree".to_owned(),
        kind: ComponentKind::Tree,
        root,
        size,
        content_size,
    };
    let manifest = new_manifest(component)?;
    let (contents, _) = finish_layer(encoded, import, root);
    let listing_options = options(ComponentKind::File, request);
    let (encoded, import) = encode_into(
        store,
        &BytesSource(&listing),
        &listing_options,
        &Work::default(),
    )?;
    let (names, _) = finish_layer(encoded, import, root);
    Ok(Draft {
        manifest,
        layers: vec![names, contents],
        listing: Some(listing),
        outboard: None,
        stats,
        warnings,
    })
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
struct Slot(Option<Scratch>);

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

type StoreEncoded = Encoded<Slot, Slot>;

fn encode_into(
    store: &Store,
    source: &dyn Source,
    options: &EncodeOptions,
    work: &Work,
) -> Result<(StoreEncoded, Import), Failure> {
    let mut import = store.begin_import()?;
    let slot = || Ok::<_, Failure>(Slot(Some(store.scratch()?)));
    let outputs = Outputs {
        pack: &mut import,
        pack_outboard: slot()?,
        content_outboard: slot()?,
    };
    let encoded = encode(source, options, outputs, work)?;
    Ok((encoded, import))
}

/// The layer, and a stream's outboard.
fn finish_layer(
    mut encoded: StoreEncoded,
    import: Import,
    root: RootHash,
) -> (DraftLayer, Option<Scratch>) {
    let (target_size, tree) = (encoded.size, encoded.pack);
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
        ContentHashes::Parts(_) => (Space::Contents, None),
    };
    let index = encoded.into_index(root);
    let blobs = LayerBlobs {
        index: RootHash::of(&index),
        pack: pack.as_ref().map(|pack| pack.blob.root),
    };
    (
        DraftLayer {
            space,
            target_size,
            blobs,
            index,
            pack,
        },
        content,
    )
}
