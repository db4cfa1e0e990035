//! Virtual components: served under their own root by decoding them through their layers.
//!
//! The store keeps the outboard and the recipe; the bytes come from a [`ComponentProvider`], so that
//! nothing here knows how a layer is decoded. A component's layers are blobs like others: the caller's
//! live set must name them, and a component goes with the first of its layers that is collected.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use capsule_chunker::bao::{Tree, VerifyError, encode_range, outboard_len, verify};
use capsule_chunker::content::Content;
use capsule_proto::ranges::Height;
use capsule_proto::{GroupRanges, RootHash};
use positioned_io::ReadAt;

use super::blob::{FileReader, Part, dir_of, lock, path_of};
use super::damage::{Checked, Damage};
use super::disk::OpenMode;
use super::error::{DatabaseError, IoFault, ReadError, WriteError};
use super::import::Outboard;
use super::meta::COMPONENTS;
use super::rows::{Component, ComponentRecipe, ComponentRow, LayerBlobs, MAX_LAYERS, Row};
use super::serve::{Presence, Trouble, classify};
use super::{Inner, Store};

/// Makes a component's bytes from its layers.
pub trait ComponentProvider: Send + Sync + 'static {
    /// Opens a component's content. Called for every range that is served: keep what is dear to open.
    fn open(
        &self,
        root: &RootHash,
        component: &Component,
    ) -> Result<Arc<dyn Content>, Box<dyn std::error::Error + Send + Sync>>;
}

/// A registered component in memory.
#[derive(Debug)]
pub(super) struct ComponentEntry {
    pub component: Component,
    ranges: Mutex<GroupRanges>,
}

/// Content as the chunker's trees read it.
struct ContentReader(Arc<dyn Content>);

impl Store {
    /// Sets who produces components. The store keeps no strong reference, for the provider reads the store.
    pub fn set_component_provider(&self, provider: &Arc<dyn ComponentProvider>) {
        *self
            .inner
            .provider
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(Arc::downgrade(provider));
    }

    /// Serves a component under its own root from now on, durably: `outboard` is its hash tree.
    ///
    /// All that it takes of its layers must be here ([`Store::is_readable`]). Registering again replaces recipe and outboard,
    /// and clears what was found damaged.
    pub fn register_component<'a>(
        &self,
        root: &RootHash,
        size: u64,
        recipe: ComponentRecipe,
        outboard: impl Into<Outboard<'a>>,
    ) -> Result<(), WriteError> {
        let limit = MAX_LAYERS;
        if recipe.layers.len() > limit {
            let too_long = DatabaseError::TooLong {
                table: "components",
                len: recipe.layers.len(),
                limit,
            };
            return Err(too_long.into());
        }
        let blobs = recipe.blobs();
        let _guard = self.guard(blobs.iter().copied());
        if !self.is_readable(&recipe.layers)? {
            let is_complete = |blob: &RootHash| self.durable(blob).is_some_and(|p| p.complete);
            let missing = blobs.iter().find(|blob| !is_complete(blob));
            return Err(WriteError::Unknown(*missing.unwrap_or(root)));
        }
        self.inner
            .register(root, Component { size, recipe }, outboard.into())
    }

    /// Reads a registered component through other layers from now on, durably; one that is not registered stays so. All that it
    /// takes of them must be here.
    pub fn set_recipe(&self, root: &RootHash, layers: Vec<LayerBlobs>) -> Result<(), WriteError> {
        let _guard = self.guard(
            layers
                .iter()
                .flat_map(|layer| [Some(layer.index), layer.pack])
                .flatten(),
        );
        if layers.is_empty() || layers.len() > MAX_LAYERS || !self.is_readable(&layers)? {
            return Err(WriteError::Unknown(*root));
        }
        let _turn = lock(&self.inner.component_turn);
        let Some(entry) = self.inner.component_entry(root) else {
            return Ok(());
        };
        let row = ComponentRow {
            component: Component {
                size: entry.component.size,
                recipe: ComponentRecipe { layers },
            },
            ranges: lock(&entry.ranges).clone(),
        };
        self.inner.commit_component(root, &row)?;
        let entry = Arc::new(ComponentEntry::from_row(row));
        self.inner.components_mut().insert(*root, entry);
        Ok(())
    }

    /// A registered component.
    pub fn component(&self, root: &RootHash) -> Option<Component> {
        self.inner
            .component_entry(root)
            .map(|entry| entry.component.clone())
    }

    /// All registered components, by root.
    pub fn components(&self) -> Vec<(RootHash, Component)> {
        self.inner
            .components()
            .iter()
            .map(|(root, entry)| (*root, entry.component.clone()))
            .collect()
    }
}

impl ComponentRecipe {
    /// The blobs of its layers.
    pub fn blobs(&self) -> BTreeSet<RootHash> {
        self.layers
            .iter()
            .flat_map(|layer| [Some(layer.index), layer.pack])
            .flatten()
            .collect()
    }
}

impl ComponentEntry {
    pub(super) fn from_row(row: ComponentRow) -> Self {
        Self {
            component: row.component,
            ranges: Mutex::new(row.ranges),
        }
    }

    /// What its outboard costs in space.
    pub(super) fn cost(&self) -> u64 {
        outboard_len(self.component.size)
    }
}

impl Inner {
    pub(super) fn component_entry(&self, root: &RootHash) -> Option<Arc<ComponentEntry>> {
        self.components().get(root).cloned()
    }

    pub(super) fn component_presence(&self, root: &RootHash) -> Option<Presence> {
        let entry = self.component_entry(root)?;
        let ranges = lock(&entry.ranges).clone();
        Some(Presence::new(entry.component.size, ranges))
    }

    /// The same order as for a blob: outboard, sync, name, sync, commit.
    fn register(
        self: &Arc<Self>,
        root: &RootHash,
        component: Component,
        outboard: Outboard<'_>,
    ) -> Result<(), WriteError> {
        let _turn = lock(&self.component_turn);
        let mut scratch = self.outboard_file(root, component.size, outboard)?;
        let charge = outboard_len(component.size);
        self.space.reserve(charge)?;
        let placed = self.place_component(root, &component, &mut scratch);
        if placed.is_err() {
            self.space.release(charge);
        }
        placed?;
        let row = ComponentRow {
            ranges: GroupRanges::all(component.size),
            component,
        };
        if let Some(old) = self
            .components_mut()
            .insert(*root, Arc::new(ComponentEntry::from_row(row)))
        {
            self.space.release(old.cost());
        }
        Ok(())
    }

    fn place_component(
        &self,
        root: &RootHash,
        component: &Component,
        scratch: &mut super::Scratch,
    ) -> Result<(), WriteError> {
        scratch.sync()?;
        scratch.rename(path_of(root, Part::Component))?;
        let dir = dir_of(root);
        self.disk
            .sync_dir(&dir)
            .map_err(|e| WriteError::io(IoFault::new("sync", dir, e)))?;
        let row = ComponentRow {
            component: component.clone(),
            ranges: GroupRanges::all(component.size),
        };
        self.commit_component(root, &row).map_err(WriteError::from)
    }

    fn commit_component(&self, root: &RootHash, row: &ComponentRow) -> Result<(), DatabaseError> {
        let bytes = row.encode();
        self.meta.write(|tx| {
            tx.open_table(COMPONENTS)?
                .insert(root.as_bytes(), &bytes[..])?;
            Ok(())
        })
    }

    /// Rows first, then files: what a crash leaves between is removed at the next open.
    pub(super) fn drop_components(&self, roots: &[RootHash]) -> Result<(), DatabaseError> {
        if roots.is_empty() {
            return Ok(());
        }
        let _turn = lock(&self.component_turn);
        self.meta.write(|tx| {
            let mut table = tx.open_table(COMPONENTS)?;
            roots
                .iter()
                .try_for_each(|root| table.remove(root.as_bytes()).map(drop))?;
            Ok(())
        })?;
        for root in roots {
            if let Some(entry) = self.components_mut().remove(root) {
                self.space.release(entry.cost());
                let _ = self.disk.remove(&path_of(root, Part::Component));
            }
        }
        Ok(())
    }

    pub(super) fn encode_component(
        &self,
        root: &RootHash,
        entry: &ComponentEntry,
        groups: Range<u64>,
        height: Height,
        out: &mut Vec<u8>,
    ) -> Result<(), ReadError> {
        if groups.is_empty() || !lock(&entry.ranges).contains_run(&groups) {
            return Err(ReadError::Absent {
                root: *root,
                groups,
            });
        }
        let (content, outboard) = self.open_component(root, entry)?;
        let tree = Tree {
            root: *root,
            size: entry.component.size,
        };
        let before = out.len();
        encode_range(&tree, groups.clone(), height, &content, &outboard, out).or_else(|error| {
            out.truncate(before);
            match classify(error) {
                Trouble::Damage => {
                    Err(self.condemn_component(root, entry, &GroupRanges::from(groups))?)
                }
                Trouble::Range => Err(ReadError::Absent {
                    root: *root,
                    groups,
                }),
                Trouble::Data(e) => Err(ReadError::Component {
                    root: *root,
                    reason: e.to_string(),
                }),
                Trouble::Outboard(e) => {
                    Err(IoFault::new("read", path_of(root, Part::Component), e).into())
                }
            }
        })
    }

    fn open_component(
        &self,
        root: &RootHash,
        entry: &ComponentEntry,
    ) -> Result<(ContentReader, FileReader), ReadError> {
        let failed = |reason: String| ReadError::Component {
            root: *root,
            reason,
        };
        let provider = self
            .provider
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .and_then(Weak::upgrade);
        let provider = provider.ok_or_else(|| failed("the node is starting or stopping".into()))?;
        let content = provider
            .open(root, &entry.component)
            .map_err(|e| failed(e.to_string()))?;
        if content.len() != entry.component.size {
            return Err(failed(format!(
                "its layers hold {} bytes, not {}",
                content.len(),
                entry.component.size
            )));
        }
        Ok((ContentReader(content), self.component_outboard(root)?))
    }

    pub(super) fn component_outboard(&self, root: &RootHash) -> Result<FileReader, ReadError> {
        let path = path_of(root, Part::Component);
        let outboard = self
            .disk
            .open(&path, OpenMode::Existing)
            .map_err(|e| IoFault::new("open", path, e))?;
        Ok(FileReader(outboard))
    }

    fn bad_component_groups(
        &self,
        root: &RootHash,
        entry: &ComponentEntry,
        groups: &GroupRanges,
    ) -> Result<GroupRanges, ReadError> {
        if groups.is_empty() {
            return Ok(GroupRanges::new());
        }
        let (content, outboard) = self.open_component(root, entry)?;
        let tree = Tree {
            root: *root,
            size: entry.component.size,
        };
        let good = verify(&tree, groups, &content, &outboard).map_err(|error| match error {
            VerifyError::Data { source, .. } => ReadError::Component {
                root: *root,
                reason: source.to_string(),
            },
            VerifyError::Outboard { source, .. } => {
                IoFault::new("read", path_of(root, Part::Component), source).into()
            }
        })?;
        Ok(groups.difference(&good))
    }

    fn condemn_component(
        &self,
        root: &RootHash,
        entry: &ComponentEntry,
        suspects: &GroupRanges,
    ) -> Result<ReadError, ReadError> {
        let (groups, committed) = self.condemn_component_in_turn(root, entry, suspects)?;
        let damage = Damage {
            root: *root,
            size: entry.component.size,
            groups,
        };
        self.report(&damage);
        committed?;
        Ok(ReadError::Damaged {
            root: *root,
            groups: damage.groups,
        })
    }

    fn condemn_component_in_turn(
        &self,
        root: &RootHash,
        entry: &ComponentEntry,
        suspects: &GroupRanges,
    ) -> Result<(GroupRanges, Result<(), DatabaseError>), ReadError> {
        let _turn = lock(&self.component_turn);
        let held = lock(&entry.ranges).intersection(suspects);
        let bad = self.bad_component_groups(root, entry, &held)?;
        let ranges = {
            let mut ranges = lock(&entry.ranges);
            *ranges = ranges.difference(&bad);
            ranges.clone()
        };
        // Unless it was registered anew, or removed, meanwhile.
        let registered = self
            .component_entry(root)
            .is_some_and(|now| std::ptr::eq(&*now, entry));
        let row = ComponentRow {
            component: entry.component.clone(),
            ranges,
        };
        let committed = if registered {
            self.commit_component(root, &row)
        } else {
            Ok(())
        };
        Ok((bad, committed))
    }

    /// Reads the part of a component that is sound so far again.
    pub(super) fn verify_component(
        &self,
        root: &RootHash,
        part: &GroupRanges,
    ) -> Result<Checked, ReadError> {
        let entry = self
            .component_entry(root)
            .ok_or(ReadError::Unknown(*root))?;
        let read = lock(&entry.ranges).intersection(part);
        let bad = self.bad_component_groups(root, &entry, &read)?;
        if bad.is_empty() {
            return Ok(Checked { read, bad });
        }
        match self.condemn_component(root, &entry, &bad)? {
            ReadError::Damaged { groups: bad, .. } => Ok(Checked { read, bad }),
            other => Err(other),
        }
    }
}

impl ReadAt for ContentReader {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.0.len().saturating_sub(offset).min(buf.len() as u64) as usize;
        self.0
            .read_at(offset, &mut buf[..left])
            .map_err(io::Error::other)?;
        Ok(left)
    }
}
