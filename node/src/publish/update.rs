//! Updates: what of new content the parent has, and the layer that makes the rest.
//!
//! A stream is read twice where it changed, and once where it did not: first it is hashed, and its hash tree, compared with the
//! parent's, tells which chunk groups differ; what is read of these must agree with the tree. Where the image itself tells what changed (`record`),
//! the rest is not read at all. Of a tree only files are read whose length or time differ.

use std::collections::BTreeMap;
use std::sync::Arc;

use capsule_chunker::bao::{DiffError, Tree, changed_groups};
use capsule_chunker::content::{Content, Progress, Source};
use capsule_chunker::delta::{OldSource, Outline, Similar, SimilarOptions};
use capsule_chunker::layer::EncodeStats;
use capsule_chunker::layer::encode::{
    Against, ContentHashes, Effort, EncodeError, Hashed, encode_update,
};
use capsule_chunker::layer::hash::hash_source;
use capsule_chunker::tree::{TreeOutline, TreeSource};
use capsule_proto::RootHash;
use capsule_proto::index::{Source as IndexSource, SourceKind, Space};
use capsule_proto::manifest::{Component, ComponentKind};

use super::make::{EncodedContents, MadeContents, Making};
use super::parent::Old;
use super::record::{Recorded, directory_key};
use crate::control::{Failure, FailureCode};
use crate::encoding::{MadeLayer, StoreEncoded, finish_layer, first_contents, outputs, unexpected};
use crate::held::Holdings;
use crate::store::{Import, LayerBlobs, Scratch};
use crate::work::Work;

/// At the lowest effort so many times as much of a parent is read as changed, but never less than this: costs follow the change.
const INDEXED: u64 = 16;
const LEAST_INDEXED: u64 = 256 << 20;

impl Making<'_> {
    /// The layer that leads from an older stream to this one; none if they are the same.
    pub(super) fn update_stream(
        &self,
        source: &dyn Source,
        kind: ComponentKind,
        old: Old,
        recorded: Option<&Recorded>,
    ) -> Result<MadeLayer, Failure> {
        let (tree, outboard, unread) = self.hash(source, recorded)?;
        let parent = old.component.root;
        // The parent, or what is gone back to.
        if let Some(way) = old.known.get(&tree.root) {
            source.check_unchanged()?;
            let stats = EncodeStats {
                content: tree.size,
                inherited: tree.size,
                ..EncodeStats::default()
            };
            return Ok(MadeLayer {
                tree,
                layer: None,
                way: way.clone(),
                outboard: Some(outboard),
                stats,
                unread,
            });
        }
        let old_tree = Tree {
            root: parent,
            size: old.component.size,
        };
        let old_outboard = self.store.open_outboard(&parent)?;
        let changed = changed_groups((&old_tree, &*old_outboard), (&tree, &outboard));
        let changed = changed.map_err(|error| of_diff(&old.component, &error))?;
        let outline = Outline::of_groups(tree.size, &changed);
        self.work
            .set_total(tree.size - unread + outline.unknown_len());
        let hashed = Hashed {
            tree,
            outboard: &outboard,
        };
        let against = self.encode_against(source, Some(hashed), &outline, old, kind)?;
        let AgainstOld {
            encoded,
            import,
            parent,
            sources,
            below,
        } = against;
        let stats = encoded.stats;
        let (layer, _) = finish_layer(encoded, import, tree.root, parent, sources);
        let way = below.into_iter().chain([layer.blobs]).collect();
        Ok(MadeLayer {
            tree,
            layer: Some(layer),
            way,
            outboard: Some(outboard),
            stats,
            unread,
        })
    }

    /// The tree of a stream: of all of it, or of what its own record says has changed; and how much was not read for it.
    fn hash(
        &self,
        source: &dyn Source,
        recorded: Option<&Recorded>,
    ) -> Result<(Tree, Scratch, u64), Failure> {
        if let Some(recorded) = recorded {
            let unread = recorded.unread(source.len());
            self.work.set_total(source.len() - unread);
            if let Some((tree, outboard)) = recorded.hash(source, self.store, self.work)? {
                return Ok((tree, outboard, unread));
            }
        }
        let (tree, outboard) = hash_source(source, self.store.scratch()?, self.work)?;
        Ok((tree, outboard, 0))
    }

    /// A tree's contents: against those of an older tree, where there is one that has any.
    pub(super) fn contents(
        &self,
        source: &TreeSource,
        parent: Option<&Component>,
    ) -> Result<MadeContents, Failure> {
        let old = parent.filter(|component| component.content_size > 0);
        let old = old.map_or(Ok(None), |component| {
            Old::open(self.store, component, Space::Contents)
        })?;
        let Some(old) = old else {
            return self.first_contents(source);
        };
        let outline = if self.request.checksum {
            TreeOutline::unknown(source)
        } else {
            let listing = Holdings::new(self.store.clone()).listing(&old.component)?;
            TreeOutline::of(source, &listing, self.looked_at(&old)?)
        };
        let unknown = outline.outline.unknown_len();
        let known = old.known.clone();
        self.work.set_total(unknown);
        let AgainstOld {
            encoded,
            import,
            parent,
            sources,
            below,
        } = self.encode_against(source, None, &outline.outline, old, ComponentKind::Tree)?;
        let ContentHashes::Parts(read) = &encoded.content else {
            return Err(unexpected("a tree came as a stream"));
        };
        Ok(MadeContents {
            size: encoded.size,
            roots: outline.roots(source, read),
            below,
            known,
            stats: encoded.stats,
            unread: source.len() - unknown,
            encoded: EncodedContents {
                encoded,
                import,
                parent,
                sources,
            },
        })
    }

    /// Since when what was changed in this directory may not be what it was in the parent: only if that is what was last published of it.
    /// Else everything is read.
    fn looked_at(&self, old: &Old) -> Result<u64, Failure> {
        let last = match directory_key(&self.request.path) {
            Some(key) => self.store.image(&key)?,
            None => None,
        };
        let parent = self.parent.filter(|_| last == Some(old.component.root));
        Ok(parent.map_or(0, |parent| parent.since))
    }

    fn first_contents(&self, source: &TreeSource) -> Result<MadeContents, Failure> {
        self.work.set_total(source.len());
        let options = self.options(ComponentKind::Tree);
        let made = first_contents(self.store, source, &options, self.work)?;
        Ok(MadeContents {
            size: made.encoded.size,
            roots: made.roots,
            below: Vec::new(),
            known: BTreeMap::new(),
            stats: made.encoded.stats,
            unread: 0,
            encoded: EncodedContents {
                encoded: made.encoded,
                import: made.import,
                parent: None,
                sources: Vec::new(),
            },
        })
    }

    fn encode_against(
        &self,
        source: &dyn Source,
        hashed: Option<Hashed<'_>>,
        outline: &Outline,
        old: Old,
        kind: ComponentKind,
    ) -> Result<AgainstOld, Failure> {
        let space = match kind {
            ComponentKind::Tree => Space::Contents,
            _ => Space::Stream,
        };
        let name = IndexSource {
            kind: SourceKind::Parent,
            root: old.component.root,
            space,
            size: old.content.len(),
        };
        let sources = [OldSource {
            name,
            content: old.content,
        }];
        // What is known needs no search.
        let similar = if outline.unknown_len() == 0 {
            Similar::nothing()
        } else {
            let options = SimilarOptions::default();
            let found = match self.request.effort {
                Effort::Fast if space == Space::Stream => {
                    let most = LEAST_INDEXED.max(outline.unknown_len().saturating_mul(INDEXED));
                    Similar::build_near(&sources, outline, most, &options, self.work)
                }
                _ => Similar::build(&sources, &options, self.work),
            };
            let found = found.map_err(|error| of_old(&old.component, &error))?;
            found.ok_or_else(Failure::cancelled)?
        };
        let against = Against {
            hashed,
            outline,
            sources: &sources,
            similar: &similar,
            in_place: space == Space::Stream,
        };
        let (encoded, import) = self.encode(source, &against, kind, &old.component.name)?;
        let stats = &encoded.stats;
        let nothing = stats.inherited + stats.copied + stats.referring == 0;
        Ok(if nothing && encoded.size > 0 {
            AgainstOld {
                encoded,
                import,
                parent: None,
                sources: Vec::new(),
                below: Vec::new(),
            }
        } else {
            AgainstOld {
                encoded,
                import,
                parent: Some(old.component.root),
                sources: sources.into_iter().map(|source| source.name).collect(),
                below: old.layers,
            }
        })
    }
}

impl Making<'_> {
    /// The layer of a stream that nothing was before, and what it has in common with other components of its capsule: each with its root and the
    /// layers that make it. Memory is often what lies on a disk.
    pub(super) fn stream_beside(
        &self,
        source: &dyn Source,
        kind: ComponentKind,
        others: Vec<Other>,
    ) -> Result<MadeLayer, Failure> {
        let name = others.first().map_or("", |other| &other.name).to_owned();
        let mut layers: Vec<LayerBlobs> = Vec::new();
        let mut sources = Vec::new();
        for other in others {
            let new = other.layers.iter().filter(|layer| !layers.contains(layer));
            let new: Vec<LayerBlobs> = new.copied().collect();
            layers.extend(new);
            sources.push(OldSource {
                name: IndexSource {
                    kind: SourceKind::SameCapsule,
                    root: other.root,
                    space: Space::Stream,
                    size: other.content.len(),
                },
                content: other.content,
            });
        }
        let (tree, hashes, _) = self.hash(source, None)?;
        let options = SimilarOptions::default();
        let similar = Similar::build(&sources, &options, &Unheard(self.work));
        let similar = similar.map_err(|error| of_old_name(&name, &error))?;
        let similar = similar.ok_or_else(Failure::cancelled)?;
        let hashed = Hashed {
            tree,
            outboard: &hashes,
        };
        let against = Against {
            hashed: Some(hashed),
            outline: &Outline::unknown(source.len()),
            sources: &sources,
            similar: &similar,
            in_place: false,
        };
        let (encoded, import) = self.encode(source, &against, kind, &name)?;
        let stats = encoded.stats;
        let (names, below) = match stats.copied + stats.referring {
            0 => (Vec::new(), Vec::new()),
            _ => (
                sources.into_iter().map(|source| source.name).collect(),
                layers,
            ),
        };
        let (layer, _) = finish_layer(encoded, import, tree.root, None, names);
        Ok(MadeLayer {
            tree,
            way: below.into_iter().chain([layer.blobs]).collect(),
            layer: Some(layer),
            outboard: Some(hashes),
            stats,
            unread: 0,
        })
    }

    fn encode(
        &self,
        source: &dyn Source,
        against: &Against<'_>,
        kind: ComponentKind,
        old: &str,
    ) -> Result<(StoreEncoded, Import), Failure> {
        let mut import = self.store.begin_import()?;
        let outputs = outputs(self.store, &mut import)?;
        let encoded = encode_update(source, against, &self.options(kind), outputs, self.work);
        let encoded = encoded.map_err(|error| match error {
            EncodeError::Old(error) => of_old_name(old, &error),
            error => error.into(),
        })?;
        Ok((encoded, import))
    }
}

/// Another component of a capsule that is made.
pub(super) struct Other {
    /// Its name.
    pub name: String,
    /// Its root.
    pub root: RootHash,
    /// Its bytes.
    pub content: Arc<dyn Content>,
    /// The layers through which it is read.
    pub layers: Vec<LayerBlobs>,
}

/// Work that is not counted, and can be stopped.
struct Unheard<'a>(&'a Work);

impl Progress for Unheard<'_> {
    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }
}

/// What was encoded against an older content; where that gave nothing, it is as from nothing, and nobody needs the older.
struct AgainstOld {
    encoded: StoreEncoded,
    import: Import,
    parent: Option<RootHash>,
    sources: Vec<IndexSource>,
    /// The layers that it stands on.
    below: Vec<LayerBlobs>,
}

const REPAIR: &str = "`capsule verify` looks for damage, and repairs it from other machines; or publish with --no-parent";

fn of_diff(component: &Component, error: &DiffError) -> Failure {
    let message = format!(
        "the hash tree of the parent's component {}: {error}",
        component.name
    );
    Failure::new(FailureCode::Damaged, message).hint(REPAIR)
}

fn of_old(component: &Component, error: &dyn std::fmt::Display) -> Failure {
    of_old_name(&component.name, error)
}

fn of_old_name(name: &str, error: &dyn std::fmt::Display) -> Failure {
    let message =
        format!("component {name}, against which this is published, cannot be read: {error}");
    Failure::new(FailureCode::Damaged, message).hint(REPAIR)
}
