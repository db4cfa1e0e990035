//! Publishing a machine that was stopped: all of its components are one capsule, of one instant.
//!
//! Each component is what it was before with what was written upon that (`patched`), so that hashing and encoding cost what was written: nothing
//! else of a disk or of memory is read. What they stand upon has to be here, all of it, for their hashes; what lacks is fetched first, while the machine
//! runs on.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use capsule_chunker::bao::Tree;
use capsule_chunker::content::{Content, Source};
use capsule_chunker::image::{self, ImageOptions, ReadAs};
use capsule_chunker::layer::read::ReadOptions;
use capsule_chunker::layer::{EncodeStats, LayerSource};
use capsule_proto::index::Space;
use capsule_proto::manifest::{Component, ComponentKind, MAX_COMPONENTS, Manifest};
use capsule_proto::record::{self, Body, MAX_PREFETCH_RANGES};
use capsule_proto::{CapsuleId, RootHash};

use super::make::{Draft, DraftComponent, Making};
use super::parent::Old;
use super::patched::{Patched, Stored};
use super::record::Recorded;
use super::trim::Trimming;
use super::update::Other;
use super::{Naming, answer, check_naming, has_ended, settle, sign, taken};
use crate::control::{
    Base, CapsuleRef, Capture, Captured, CheckName, Failure, FailureCode, NameFree, Phase,
    Prefetch, Prefetched, Publish, Published, Pull, Reporter,
};
use crate::encoding::first_stream;
use crate::held::{HeldWay, Holdings};
use crate::layers::open;
use crate::node::{Node, spelled};
use crate::store::Store;
use crate::transfer::pull;
use crate::work::{Task, Work, blocking};

/// Most words on what is read first of a component, all but the first in the place of those before: guests that never read the same come to an end with it.
const MAX_PREFETCHES: usize = 8;
/// Most patches on a component: one for each stop of which nothing could be published.
const MAX_PATCHES: usize = 256;

/// A component that is here, which others stand upon.
#[derive(Clone)]
struct Here {
    capsule: CapsuleId,
    name: String,
    component: Component,
    /// What is known to be read first of it, in no order.
    read_first: Vec<Range<u64>>,
}

/// Publishes a machine.
pub async fn capture(
    node: &Arc<Node>,
    request: Capture,
    reporter: &Reporter,
) -> Result<Published, Failure> {
    let started = Instant::now();
    let version = check_naming(node, &request.name, request.expires)?;
    check(&request)?;
    for capsule in bases(&request) {
        let pulled = Pull {
            capsule,
            wait: None,
            like_path: None,
            like_capsule: None,
        };
        pull(node, pulled, reporter).await?;
    }
    let asked = request.clone();
    let found = node.while_keeping(move |node| {
        let below = asked
            .components
            .iter()
            .map(|component| find(node, component));
        let below = below.collect::<Result<Vec<_>, Failure>>()?;
        let mut roots = BTreeSet::new();
        for here in below.iter().flatten() {
            roots.extend(node.holdings.blobs_of(&here.capsule, &node.records)?);
        }
        // They must not be collected while they are read, nor before the layers upon them are kept.
        Ok((below, node.store.guard(roots)))
    });
    let (below, guard) = found.await?;
    let against = below.iter().flatten().next().map(|here| here.name.clone());
    let naming = Naming {
        name: request.name.clone(),
        version,
        expires: request.expires,
        added: node.clock.now(),
    };
    let task = Task {
        phase: Phase::Publishing,
        total: None,
        what: Some(request.name.to_string()),
    };
    let (shared, teller, asked) = (node.clone(), reporter.clone(), request.clone());
    let make = move |work: &Work| {
        let request = Publish {
            effort: asked.effort,
            ..Publish::of(PathBuf::new(), asked.name.clone())
        };
        let making = Making {
            store: &shared.store,
            home: shared.home.dir(),
            request: &request,
            parent: None,
            work,
            reporter: &teller,
            machine: true,
        };
        making.machine(&asked, &below)
    };
    let draft = node.works.run(task, reporter, make).await?;
    // From here on it is not stopped half-way: what is kept is also named, announced and told.
    let settling = node.clone();
    let settled = tokio::spawn(async move {
        let _below = guard;
        settle(&settling, naming, draft).await
    });
    let settled = settled.await;
    let (draft, unchanged) = settled.unwrap_or_else(|panic| Err(crate::work::panicked(&panic)))?;
    Ok(answer(draft, &request.name, unchanged, against, started))
}

/// Whether something may be published under a name that nothing has yet.
pub async fn check_name(node: &Arc<Node>, request: CheckName) -> Result<NameFree, Failure> {
    let name = request.name;
    let version = check_naming(node, &name, request.expires)?;
    let node = node.clone();
    blocking(move || {
        let known = node.records.version(&name.channel, &version)?;
        if let Some(known) = known.first() {
            return Err(taken(format!(
                "{name} is published already: it is {}",
                known.capsule
            )));
        }
        if has_ended(&node, &name)? {
            return Err(taken(format!("{name} was published before, and has ended")));
        }
        Ok(NameFree {
            name: name.to_string(),
        })
    })
    .await
}

/// What can be refused before any work.
fn check(request: &Capture) -> Result<(), Failure> {
    let invalid = |message: String| Err(Failure::new(FailureCode::Invalid, message));
    if request.components.is_empty() || request.components.len() > MAX_COMPONENTS {
        return invalid(format!("a machine has 1 to {MAX_COMPONENTS} components"));
    }
    for component in &request.components {
        let name = &component.name;
        if component.kind == ComponentKind::Tree {
            return invalid(format!("component {name} is a tree: a machine has none"));
        }
        if component.patches.len() > MAX_PATCHES {
            return invalid(format!(
                "component {name} has more than {MAX_PATCHES} patches"
            ));
        }
        let files = component.patches.iter();
        let mut files = files.flat_map(|patch| [Some(&patch.data), patch.runs.as_ref()]);
        let base = match &component.base {
            Some(Base::File { path }) => Some(path),
            _ => None,
        };
        let relative = |path: Option<&PathBuf>| path.is_some_and(|path| !path.is_absolute());
        if relative(base) || files.any(relative) {
            return invalid(format!("component {name} has a path that is not absolute"));
        }
    }
    Ok(())
}

/// The capsules that a machine's components stand upon.
fn bases(request: &Capture) -> Vec<CapsuleRef> {
    let mut capsules: Vec<CapsuleRef> = Vec::new();
    for component in &request.components {
        if let Some(Base::Capsule { capsule, .. }) = &component.base
            && !capsules.contains(capsule)
        {
            capsules.push(capsule.clone());
        }
    }
    capsules
}

/// The component that another stands upon, which is here by now.
fn find(node: &Node, captured: &Captured) -> Result<Option<Here>, Failure> {
    let Some(Base::Capsule { capsule, component }) = &captured.base else {
        return Ok(None);
    };
    let resolution = node.resolve(capsule)?;
    let name = spelled(&resolution);
    let manifest = node.holdings.complete(&resolution.capsule, &name)?;
    match manifest.component(component) {
        Some(found) if found.kind != ComponentKind::Tree => Ok(Some(Here {
            capsule: resolution.capsule,
            name,
            component: found.clone(),
            read_first: node.records.first_reads_of(&found.root)?,
        })),
        _ => {
            let message = format!("{name} has no stream named {component}");
            Err(Failure::new(FailureCode::NotFound, message)
                .hint(format!("`capsule show {name}` lists its components")))
        }
    }
}

impl Making<'_> {
    /// All components of a machine; `below` has what each stands upon.
    fn machine(&self, request: &Capture, below: &[Option<Here>]) -> Result<Draft, Failure> {
        let sizes = request
            .components
            .iter()
            .filter_map(|component| component.size);
        self.work.set_total(sizes.sum());
        let mut parts = Vec::with_capacity(request.components.len());
        let mut others = Vec::new();
        for (captured, below) in request.components.iter().zip(below) {
            let compared = match captured.kind {
                // What was written upon older memory is compared with that.
                ComponentKind::Ram if below.is_none() && request.against_disks => {
                    std::mem::take(&mut others)
                }
                _ => Vec::new(),
            };
            let (part, content) = self.captured(captured, below.as_ref(), compared)?;
            if let (ComponentKind::Disk, HeldWay::Layers(layers)) = (captured.kind, &part.way) {
                others.push(Other {
                    name: captured.name.clone(),
                    root: part.component.root,
                    content,
                    layers: layers.clone(),
                });
            }
            parts.push(part);
        }
        let mut components: Vec<_> = parts.iter().map(|part| part.component.clone()).collect();
        components.sort_by(|a, b| a.name.cmp(&b.name));
        let manifest = Manifest {
            components,
            machine: Some((*request.machine).clone()),
        };
        // The rules live in one place, the decoder.
        let manifest = Manifest::decode(&manifest.encode()).map_err(|error| {
            let message = format!("this cannot be a capsule: {error}");
            Failure::new(FailureCode::Invalid, message)
        })?;
        Ok(Draft {
            manifest,
            parts,
            trimming: Trimming::default(),
            notes: Vec::new(),
            warnings: Vec::new(),
        })
    }

    fn captured(
        &self,
        captured: &Captured,
        below: Option<&Here>,
        others: Vec<Other>,
    ) -> Result<(DraftComponent, Arc<dyn Content>), Failure> {
        let source = match (&captured.base, below) {
            (Some(Base::File { path }), _) => {
                let read_as = match captured.kind {
                    ComponentKind::Disk => ReadAs::Disk,
                    _ => ReadAs::File,
                };
                Some(image::open(path, &ImageOptions { read_as })?.source)
            }
            (_, Some(here)) => Some(stored(self.store, &here.component)?),
            _ => None,
        };
        let size = captured.size.or(source.as_ref().map(|source| source.len()));
        let size = size.ok_or_else(|| {
            let message = format!("the length of component {} is not said", captured.name);
            Failure::new(FailureCode::Invalid, message)
        })?;
        let mut source = Patched::new(size, source);
        for patch in &captured.patches {
            source.put(patch)?;
        }
        let source = Arc::new(source);
        if let Some(here) = below
            && captured.patches.is_empty()
            && captured.size.is_none_or(|size| size == here.component.size)
            && let Some(unchanged) = self.unchanged(captured, here)?
        {
            return Ok((unchanged, source));
        }
        let old = below.map_or(Ok(None), |here| {
            Old::open(self.store, &here.component, Space::Stream)
        })?;
        let made = match old {
            Some(old) => {
                let base = Tree {
                    root: old.component.root,
                    size: old.component.size,
                };
                // Of an earlier version nobody told what was written since; of one of another length, all is looked at.
                let told = !old.is_earlier() && old.component.size == size;
                let recorded = told.then(|| Recorded::known(base, source.written()));
                let made = self.update_stream(&*source, captured.kind, old, recorded.as_ref())?;
                let read_first = below.map_or(&[][..], |here| &here.read_first);
                made.with_in_front(self.store, (captured.kind, &*source), read_first, self.work)?
            }
            None if others.is_empty() => {
                let options = self.options(captured.kind);
                first_stream(self.store, &*source, &options, self.work)?
            }
            None => self.stream_beside(&*source, captured.kind, others)?,
        };
        let part = DraftComponent::stream(&captured.name, captured.kind, made);
        Ok((part, source))
    }

    /// A component on which nothing was written.
    fn unchanged(
        &self,
        captured: &Captured,
        here: &Here,
    ) -> Result<Option<DraftComponent>, Failure> {
        let way = Holdings::new(self.store.clone()).way_to(&here.component)?;
        Ok(way.map(|way| DraftComponent {
            component: Component {
                name: captured.name.clone(),
                kind: captured.kind,
                ..here.component.clone()
            },
            layers: Vec::new(),
            way,
            listing: None,
            outboard: None,
            stats: EncodeStats {
                content: here.component.size,
                inherited: here.component.size,
                ..EncodeStats::default()
            },
            unread: here.component.size,
        }))
    }
}

/// A component that is here, to be read.
pub(super) fn stored(store: &Store, component: &Component) -> Result<Box<dyn Source>, Failure> {
    let holdings = Holdings::new(store.clone());
    match holdings.way_to(component)? {
        Some(HeldWay::Layers(layers)) => {
            let content = open(store, &layers, &ReadOptions::default())?;
            Ok(Box::new(LayerSource::new(content, None)))
        }
        Some(HeldWay::Blob) => Ok(Box::new(Stored {
            root: component.root,
            size: component.size,
            bytes: store.open_blob(&component.root)?,
        })),
        _ => Err(gone(component.root)),
    }
}

fn gone(root: RootHash) -> Failure {
    let message = format!("component {root} is not here any more, or is damaged");
    Failure::new(FailureCode::Damaged, message)
        .hint("`capsule verify --repair` fetches what is missing")
}

/// Publishes what was read of a component first, unless somebody did; or in the place of that.
pub async fn prefetch(node: &Arc<Node>, request: Prefetch) -> Result<Prefetched, Failure> {
    let component = request.component;
    let (ranges, record) = node
        .while_keeping(move |node| {
            let ranges = request.ranges.iter().take(MAX_PREFETCH_RANGES);
            let ranges: Vec<(u64, u64)> = ranges.map(|range| (range.start, range.length)).collect();
            let told = node.records.prefetches_of(&component)?;
            let next = match told.first() {
                None => 0,
                Some(_) if !request.renews || told.len() >= MAX_PREFETCHES => return Ok((0, None)),
                // What was said before and has been replaced does not come back.
                Some(_) if told.iter().any(|(_, told)| told.ranges == ranges) => {
                    return Ok((0, None));
                }
                Some((sequence, _)) => sequence.saturating_add(1),
            };
            let count = ranges.len();
            let body = Body::Prefetch(record::Prefetch { component, ranges });
            Ok((count, Some(sign(node, next, body, None)?)))
        })
        .await?;
    if let Some(record) = record {
        node.network.publish_record(record).await?;
    }
    Ok(Prefetched { component, ranges })
}
