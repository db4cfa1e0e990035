//! Publishing: a path becomes a capsule with a name.
//!
//! Blobs are written and durable before anything names them; records come last. What fails before that leaves nothing, not even
//! space taken. Content that is here already is not stored twice, and publishing the same again does nothing.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use capsule_chunker::content::BytesSource;
use capsule_chunker::image::{self, ImageKind, ImageOptions, ReadAs};
use capsule_chunker::layer::EncodeStats;
use capsule_chunker::layer::encode::{ContentHashes, EncodeOptions, Encoded, Outputs, encode};
use capsule_chunker::tree::{ScanOptions, scan};
use capsule_proto::index::Space;
use capsule_proto::manifest::{Component, ComponentKind, Manifest};
use capsule_proto::name::{CapsuleName, Version};
use capsule_proto::record::{BlobRef, Body, Layer, Name};
use capsule_proto::{CapsuleId, RootHash};
use positioned_io::{ReadAt, WriteAt};

use crate::control::{Failure, FailureCode, Phase, Publish, PublishAs, Published, Reporter};
use crate::held::{HeldWay, Holdings, TreeWay, blobs_of, component_info, layer_blobs};
use crate::node::Node;
use crate::records::SignError;
use crate::store::{
    ActiveGuard, BlobKind, HeldCapsule, Import, LayerBlobs, PinOrigin, Scratch, Store,
};
use crate::transfer::check::register;
use crate::work::{Task, Work, blocking, panicked};

/// Publishes a path.
pub async fn publish(
    node: &Arc<Node>,
    request: Publish,
    reporter: &Reporter,
) -> Result<Published, Failure> {
    let started = Instant::now();
    let version = check_request(node, &request)?;
    let name = request.name.clone();
    let task = Task {
        phase: Phase::Publishing,
        total: None,
        what: Some(name.to_string()),
    };
    let (store, teller, making) = (node.store.clone(), reporter.clone(), request.clone());
    let draft = node
        .works
        .run(task, reporter, move |work| {
            make(&store, &making, work, &teller)
        })
        .await?;
    // From here on it is not stopped half-way: what is kept is also named, announced and told.
    let (settling, named) = (node.clone(), name.clone());
    let settled = tokio::spawn(async move { settle(&settling, named, version, draft).await });
    let (draft, unchanged) = settled.await.unwrap_or_else(|panic| Err(panicked(&panic)))?;
    let capsule = draft.manifest.id();
    Ok(Published {
        capsule,
        name: name.to_string(),
        unchanged,
        components: draft
            .manifest
            .components
            .iter()
            .map(component_info)
            .collect(),
        content_bytes: draft.manifest.content_size(),
        zero_bytes: draft.stats.zero,
        repeated_bytes: draft.stats.repeated,
        pack_bytes: draft.stats.pack,
        index_bytes: draft
            .layers
            .iter()
            .map(|layer| layer.index.len() as u64)
            .sum(),
        seconds: started.elapsed().as_secs_f64(),
        warnings: draft.warnings,
    })
}

/// What can be refused before any work.
fn check_request(node: &Node, request: &Publish) -> Result<Version, Failure> {
    let invalid = |message: String| Failure::new(FailureCode::Invalid, message);
    let CapsuleName { channel, version } = &request.name;
    let version = version.clone().ok_or_else(|| {
        invalid(format!("{channel} names no version"))
            .hint(format!("publish as CHANNEL:VERSION, such as {channel}:1"))
    })?;
    if !request.path.is_absolute() {
        return Err(invalid(format!(
            "{} is not an absolute path",
            request.path.display()
        )));
    }
    let grant = node.identity.credential.grant();
    if !grant.may_publish(channel) {
        let message = format!("this machine may not publish in channel {channel}");
        return Err(Failure::new(FailureCode::NotPermitted, message).hint(
            "join with a token of `capsule fleet invite --role publisher`, for that channel or all",
        ));
    }
    Ok(version)
}

/// A capsule that is made, but not kept yet: nothing refers to what it wrote.
struct Draft {
    manifest: Manifest,
    layers: Vec<DraftLayer>,
    /// A tree's listing.
    listing: Option<Vec<u8>>,
    /// A stream's hash tree.
    outboard: Option<Scratch>,
    stats: EncodeStats,
    warnings: Vec<String>,
}

/// A layer that is made.
struct DraftLayer {
    space: Space,
    target_size: u64,
    blobs: LayerBlobs,
    index: Vec<u8>,
    pack: Option<DraftPack>,
}

struct DraftPack {
    blob: BlobRef,
    import: Import,
    outboard: Scratch,
}

/// What keeping a draft did.
struct Made {
    kept: bool,
    named: bool,
    roots: Vec<RootHash>,
    records: Vec<Vec<u8>>,
    _guard: Option<ActiveGuard>,
}

/// Reads and encodes. Blocks; nothing is kept when it fails or the draft is dropped.
fn make(
    store: &Store,
    request: &Publish,
    work: &Work,
    reporter: &Reporter,
) -> Result<Draft, Failure> {
    let is_dir = std::fs::metadata(&request.path)
        .map_err(|e| unreadable(&request.path, &e))?
        .is_dir();
    match (is_dir, request.read_as) {
        (true, PublishAs::Auto | PublishAs::Tree) => make_tree(store, request, work, reporter),
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
    store: &Store,
    request: &Publish,
    work: &Work,
    reporter: &Reporter,
) -> Result<Draft, Failure> {
    reporter.progress(crate::control::Progress {
        phase: Phase::Scanning,
        done: 0,
        total: None,
        rate: 0,
        peers: 0,
        written: 0,
        what: Some(request.path.display().to_string()),
    });
    let source = scan(
        &request.path,
        &ScanOptions {
            one_file_system: request.one_file_system,
        },
    )?;
    work.check()?;
    work.set_total(capsule_chunker::content::Content::len(&source));
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
        warnings: Vec::new(),
    })
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
    source: &dyn capsule_chunker::content::Source,
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

/// Keeps, names and announces a draft; whatever is already so stays. Whether everything was.
async fn settle(
    node: &Arc<Node>,
    name: CapsuleName,
    version: Version,
    draft: Draft,
) -> Result<(Draft, bool), Failure> {
    let _alone = node.naming.lock().await;
    let shared = node.clone();
    let (draft, made) = blocking(move || keep_and_name(&shared, &name, version, draft)).await?;
    let unchanged = !made.kept && !made.named;
    if !unchanged {
        node.announce(made.roots).await?;
        for record in made.records {
            node.network.publish_record(record).await?;
        }
        node.tell_capsules().await?;
    }
    Ok((draft, unchanged))
}

fn keep_and_name(
    node: &Node,
    name: &CapsuleName,
    version: Version,
    mut draft: Draft,
) -> Result<(Draft, Made), Failure> {
    let mut made = Made { kept: false, named: false, roots: Vec::new(), records: Vec::new(), _guard: None };
    let capsule = draft.manifest.id();
    let known = node.records.version(&name.channel, &version)?;
    if let Some(other) = known.iter().find(|known| known.capsule != capsule) {
        let message = format!(
            "{name} is published already, with other content: it is {}, this would be {capsule}",
            other.capsule
        );
        return Err(Failure::new(FailureCode::Exists, message).hint("choose another version; a version never changes"));
    }
    if !node.store.capsule(&capsule)?.is_some_and(|held| held.complete) {
        made._guard = Some(keep(&node.store, &mut draft, capsule)?);
        made.kept = true;
    }
    made.records = sign_layers(node, &draft)?;
    if known.is_empty() {
        let manifest_size = draft.manifest.encode().len() as u64;
        let body = Body::Name(Name { channel: name.channel.clone(), version, capsule, manifest_size });
        let sequence = node.records.next_sequence(&name.channel)?;
        made.records.push(sign(node, sequence, body)?);
        made.named = true;
    }
    node.store.pin(&capsule, &PinOrigin::Publication)?;
    made.roots = node.holdings.blobs_of(&capsule, &node.records)?.into_iter().collect();
    Ok((draft, made))
}

/// Stores a draft's blobs, durably; the guard keeps them until they are pinned.
fn keep(store: &Store, draft: &mut Draft, capsule: CapsuleId) -> Result<ActiveGuard, Failure> {
    let component = draft.manifest.components[0].clone();
    let layers: Vec<LayerBlobs> = draft.layers.iter().map(|layer| layer.blobs).collect();
    let guard = store.guard(blobs_of(&layers).chain([capsule.0, component.root]));
    // Where the component is read through other layers already, these make nothing better.
    let known = Holdings::new(store.clone()).way_to(&component)?.is_some();
    if !known {
        for layer in &mut draft.layers {
            store.put_small(&layer.index, BlobKind::Index)?;
            if let Some(DraftPack {
                blob,
                import,
                outboard,
            }) = layer.pack.take()
            {
                import.commit(&blob.root, blob.size, outboard, BlobKind::Pack)?;
            }
        }
        if let Some(listing) = &draft.listing {
            store.put_small(listing, BlobKind::Listing)?;
            let way = TreeWay {
                listing: vec![layers[0]],
                contents: vec![layers[1]],
            };
            Holdings::new(store.clone()).put_tree_way(&component.root, &way)?;
        }
        if let Some(outboard) = draft.outboard.take() {
            register(store, &component, &layers, outboard)?;
        }
    }
    store.put_small(&draft.manifest.encode(), BlobKind::Manifest)?;
    let added = crate::clock::system_seconds();
    store.put_capsule(
        &capsule,
        &HeldCapsule {
            complete: true,
            added,
        },
    )?;
    Ok(guard)
}

/// Signs records of the layers by which the components are held, unless they are known.
fn sign_layers(node: &Node, draft: &Draft) -> Result<Vec<Vec<u8>>, Failure> {
    let mut records = Vec::new();
    for component in &draft.manifest.components {
        let known = node.records.layers_to(&component.root)?;
        let ways = match node.holdings.way_to(component)? {
            Some(HeldWay::Layers(layers)) => vec![(Space::Stream, component.size, layers)],
            Some(HeldWay::Tree(way)) => {
                vec![
                    (Space::Stream, component.size, way.listing),
                    (Space::Contents, component.content_size, way.contents),
                ]
            }
            // Its own pack: the layer that was just made.
            Some(HeldWay::Blob) => draft
                .layers
                .iter()
                .map(|layer| (layer.space, layer.target_size, vec![layer.blobs]))
                .collect(),
            None => Vec::new(),
        };
        for (space, target_size, layers) in ways {
            // Only what starts from nothing is made here; chains came with their records.
            let [layer] = layers[..] else { continue };
            let is_here = blobs_of(&layers).all(|blob| node.holdings.is_complete(&blob));
            if !is_here
                || known
                    .iter()
                    .any(|known| known.layer.space == space && layer_blobs(&known.layer) == layer)
            {
                continue;
            }
            let blob = |root: RootHash| BlobRef {
                root,
                size: node.store.durable(&root).map_or(0, |here| here.size),
            };
            let (index, pack) = (blob(layer.index), layer.pack.map(blob));
            let body = Body::Layer(Layer {
                space,
                parent: None,
                target: component.root,
                target_size,
                index,
                pack,
            });
            records.push(sign(node, 0, body)?);
        }
    }
    Ok(records)
}

fn sign(node: &Node, sequence: u64, body: Body) -> Result<Vec<u8>, Failure> {
    let signed = node.records.sign(
        (sequence, body),
        None,
        &node.identity.credential,
        &node.identity.machine,
    );
    signed
        .map(|record| record.as_bytes().to_vec())
        .map_err(|error| match error {
            SignError::NotAllowed(error) => {
                Failure::new(FailureCode::NotPermitted, error.to_string())
                    .hint("join again with a token of `capsule fleet invite --role publisher`")
            }
            SignError::Malformed(error) => Failure::new(FailureCode::Invalid, error.to_string()),
            SignError::Database(error) => error.into(),
        })
}
