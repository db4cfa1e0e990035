//! Making a capsule of a path: reading, encoding, hashing. Everything goes into imports and scratch files of the store,
//! which leave nothing behind when they are dropped; keeping and naming is the room's other half. With a parent, `update`
//! finds out what of the content the parent has.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::SystemTime;

use capsule_chunker::content::{BytesSource, Source};
use capsule_chunker::image::{self, ImageKind, ImageOptions, ReadAs};
use capsule_chunker::layer::EncodeStats;
use capsule_chunker::layer::encode::{Effort, EncodeOptions};
use capsule_chunker::tree::{ScanOptions, scan};
use capsule_proto::RootHash;
use capsule_proto::index::{Source as IndexSource, Space};
use capsule_proto::listing::EntryPath;
use capsule_proto::manifest::{Component, ComponentKind, Manifest};

use super::parent::{Old, Parent};
use super::record::{directory_key, keys_to_note};
use super::trim::{self, Trimming};
use crate::control::{Failure, FailureCode, Phase, Progress, Publish, PublishAs, Reporter};
use crate::encoding::{DraftLayer, MadeLayer, StoreEncoded, finish_layer, first_stream};
use crate::held::{HeldWay, TreeWay};
use crate::store::{Import, LayerBlobs, Scratch, Store};
use crate::work::Work;

/// A capsule that is made, but not kept yet: nothing refers to what it wrote.
pub(super) struct Draft {
    pub manifest: Manifest,
    /// Its components.
    pub parts: Vec<DraftComponent>,
    pub trimming: Trimming,
    /// Under which the path is to be remembered as having this content.
    pub notes: Vec<RootHash>,
    pub warnings: Vec<String>,
}

/// A component in the making.
pub(super) struct DraftComponent {
    pub component: Component,
    /// The layers that were made; none of what the parent has as it is.
    pub layers: Vec<DraftLayer>,
    /// How it is read when they are kept.
    pub way: HeldWay,
    /// A tree's listing.
    pub listing: Option<Vec<u8>>,
    /// A stream's hash tree.
    pub outboard: Option<Scratch>,
    pub stats: EncodeStats,
    /// Bytes that were not read, as the source told that they are the parent's.
    pub unread: u64,
}

impl DraftComponent {
    /// A stream of which the layer is made.
    pub fn stream(name: &str, kind: ComponentKind, made: MadeLayer) -> Self {
        Self {
            component: Component {
                name: name.to_owned(),
                kind,
                root: made.tree.root,
                size: made.tree.size,
                content_size: made.tree.size,
            },
            layers: made.layer.into_iter().collect(),
            way: HeldWay::Layers(made.way),
            listing: None,
            outboard: made.outboard,
            stats: made.stats,
            unread: made.unread,
        }
    }
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
    /// Whether it is a machine that is captured.
    pub machine: bool,
}

/// Reads and encodes. Blocks; nothing is kept when it fails or the draft is dropped.
pub(super) fn make(making: &Making<'_>) -> Result<Draft, Failure> {
    let request = making.request;
    let is_dir = std::fs::metadata(&request.path)
        .map_err(|e| unreadable(&request.path, &e))?
        .is_dir();
    if is_dir && request.bitmap.is_some() {
        let message = format!(
            "{} is a directory: it has no dirty bitmap",
            request.path.display()
        );
        return Err(Failure::new(FailureCode::Invalid, message).hint("leave out --bitmap"));
    }
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

/// How a component is encoded, by what was asked for, and whether it is a machine's.
pub(super) fn options(
    kind: ComponentKind,
    effort: Effort,
    frame_max: Option<u32>,
    machine: bool,
) -> EncodeOptions {
    let options = EncodeOptions::new(kind, effort).bounded(frame_max);
    match machine {
        true => options.of_machine(kind),
        false => options,
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
        options(
            kind,
            self.request.effort,
            self.request.frame_max,
            self.machine,
        )
    }

    fn stream(&self, read_as: ReadAs) -> Result<Draft, Failure> {
        let path = &self.request.path;
        let began = SystemTime::now();
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
        let old = self.old_stream(name, kind)?;
        let mut by_bitmap = false;
        let made = match old {
            Some(old) => {
                let recorded = self.recorded(&image, trimmed.as_ref(), &old, &mut warnings)?;
                by_bitmap = recorded
                    .as_ref()
                    .is_some_and(|recorded| recorded.bitmap.is_some());
                self.update_stream(source, kind, old, recorded.as_ref())?
            }
            None => {
                if let Some(bitmap) = &self.request.bitmap {
                    warnings.push(format!("no older version is here that the dirty bitmap {bitmap} could tell changes since: everything was read"));
                }
                first_stream(self.store, source, &self.options(kind), self.work)?
            }
        };
        let part = DraftComponent::stream(name, kind, made);
        Ok(Draft {
            manifest: new_manifest(part.component.clone())?,
            parts: vec![part],
            notes: keys_to_note(&image, trimmed.is_some(), by_bitmap, began),
            trimming,
            warnings,
        })
    }

    /// The parent's stream that a new one is a version of.
    fn old_stream(&self, name: &str, kind: ComponentKind) -> Result<Option<Old>, Failure> {
        let parent = self.parent.and_then(|parent| parent.component(name, kind));
        parent.map_or(Ok(None), |component| {
            Old::open(self.store, component, Space::Stream)
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
        let (stats, unread) = (contents.stats, contents.unread);
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
        let mut layers: Vec<DraftLayer> = names.layer.into_iter().collect();
        let unchanged = parent.is_some_and(|parent| parent.root == root);
        let same = contents.known.get(&root).cloned();
        let contents = same.or(unchanged.then(Vec::new)).unwrap_or_else(|| {
            let layer = contents.encoded.into_layer(root);
            let below = contents.below.into_iter();
            let way = below.chain([layer.blobs]).collect();
            layers.push(layer);
            way
        });
        let way = TreeWay {
            listing: names.way,
            contents,
        };
        Ok(Draft {
            manifest: new_manifest(component.clone())?,
            parts: vec![DraftComponent {
                component,
                layers,
                way: HeldWay::Tree(way),
                listing: Some(listing),
                outboard: None,
                stats,
                unread,
            }],
            trimming: Trimming::default(),
            notes: directory_key(path).into_iter().collect(),
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
            Some(old) => quiet.update_stream(&source, ComponentKind::File, old, None),
            None => {
                let options = self.options(ComponentKind::File);
                first_stream(self.store, &source, &options, quiet.work)
            }
        }
    }
}

/// A tree's contents, encoded; their layer waits for the listing's root.
pub(super) struct MadeContents {
    pub size: u64,
    pub roots: Vec<RootHash>,
    /// The layers of what the new one is put upon.
    pub below: Vec<LayerBlobs>,
    /// Older versions, and the layers of each: the new one may be one of them.
    pub known: BTreeMap<RootHash, Vec<LayerBlobs>>,
    pub encoded: EncodedContents,
    pub stats: EncodeStats,
    /// Bytes that were not read.
    pub unread: u64,
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

/// Where in a directory the node's home lies, if it does.
pub fn own_within(home: &Path, dir: &Path) -> Result<Option<EntryPath>, Failure> {
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
