//! Making the frames that a read wants, and what these refer to, in however many layers.
//!
//! First what they need is looked up, and what that needs, down to what is kept or refers to nothing.
//! Then frames are decoded from below upwards, each once, and held until the last that refers to it is made. So the cost is
//! that of the different frames, however often they are referred to and however little the cache keeps; nothing recurses but from
//! frames to earlier ones of their layer, eight deep at most; and what is too dear is known before anything is decoded.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use capsule_proto::index::{Frame, Reference, ReferenceTo};

use super::budget::{Budget, references_len};
use super::cache::Key;
use super::error::LayerError;
use super::follow::{FramePlace, Place, follow_source};
use super::pages::FrameEntry;
use super::read::LayerContent;

/// The frames that a read needs. By key, so that each comes after all that it refers to.
pub(super) struct Plan<'a> {
    /// The layer that is read.
    top: &'a LayerContent,
    nodes: BTreeMap<Key, Node<'a>>,
    /// Those whose references were not looked at yet.
    unseen: Vec<Key>,
}

struct Node<'a> {
    layer: &'a LayerContent,
    /// Its entry, but for spans, as pages are not to be kept in memory for as long as this takes.
    frame: Frame,
    /// As what the read itself wants it.
    wanted: Vec<usize>,
    /// How many places of other frames need it still.
    users: usize,
    content: Option<Arc<Vec<u8>>>,
    /// Whether it was made for this, and counts as held. What was kept anyway does not.
    held: bool,
}

/// A piece of what references name.
enum Need<'a> {
    Frame {
        layer: &'a LayerContent,
        id: u32,
        entry: FrameEntry,
        offset: usize,
    },
    Other(Place<'a>),
}

impl<'a> Plan<'a> {
    /// Nothing is needed yet.
    pub fn new(top: &'a LayerContent) -> Self {
        Self {
            top,
            nodes: BTreeMap::new(),
            unseen: Vec::new(),
        }
    }

    /// Notes that the read wants so many bytes of a frame, and as what.
    pub fn want(
        &mut self,
        position: usize,
        place: FramePlace<'a>,
        len: u64,
        budget: &mut Budget<'_>,
    ) -> Result<(), LayerError> {
        let entry = place.entry(len, budget);
        let entry = entry.map_err(|error| self.top.of_below(place.layer, error))?;
        let node = self.node(place.layer, place.id, &entry, budget)?;
        node.wanted.push(position);
        Ok(())
    }

    /// Makes all that is needed; hands each frame that is wanted over, with what it is wanted as.
    pub fn run(
        mut self,
        budget: &mut Budget<'_>,
        mut each: impl FnMut(usize, &Arc<Vec<u8>>),
    ) -> Result<(), LayerError> {
        self.look(budget)?;
        let keys: Vec<Key> = self.nodes.keys().copied().collect();
        for key in keys {
            budget.check()?;
            let node = self.nodes.get_mut(&key).expect("it was noted");
            // Many layers may refer to different frames of the lowest, which are not to be held all at once: those that refer
            // to nothing, or to frames of their own layer only, are made when the first needs them.
            if node.wanted.is_empty() && refers_within(&node.frame) {
                continue;
            }
            let wanted = std::mem::take(&mut node.wanted);
            let content = self.content(key, budget)?;
            wanted.iter().for_each(|position| each(*position, &content));
            self.drop_unused(key, budget);
        }
        Ok(())
    }

    fn node(
        &mut self,
        layer: &'a LayerContent,
        id: u32,
        entry: &FrameEntry,
        budget: &mut Budget<'_>,
    ) -> Result<&mut Node<'a>, LayerError> {
        match self.nodes.entry(layer.key(id)) {
            Entry::Occupied(node) => Ok(node.into_mut()),
            Entry::Vacant(place) => {
                let content = layer.cache().frames.kept(*place.key());
                let frame = layer.planned(id, entry);
                if content.is_none() {
                    budget.frame(&frame)?;
                    self.unseen.push(*place.key());
                }
                Ok(place.insert(Node {
                    layer,
                    frame,
                    wanted: Vec::new(),
                    users: 0,
                    content,
                    held: false,
                }))
            }
        }
    }

    /// Looks up what all these frames refer to.
    fn look(&mut self, budget: &mut Budget<'_>) -> Result<(), LayerError> {
        while let Some(key) = self.unseen.pop() {
            let node = &self.nodes[&key];
            let (layer, depth) = (node.layer, node.frame.depth);
            for reference in node.frame.references.clone() {
                let mut want = |need, _, budget: &mut Budget<'_>| match need {
                    Need::Frame {
                        layer, id, entry, ..
                    } => {
                        self.node(layer, id, &entry, budget)?.users += 1;
                        Ok(())
                    }
                    Need::Other(_) => Ok(()),
                };
                each_need(layer, key, depth, &reference, budget, &mut want)
                    .map_err(|error| self.top.of_below(layer, error))?;
            }
        }
        Ok(())
    }

    /// A frame's content, which is held from now on. All that it refers to was made before.
    fn content(&mut self, key: Key, budget: &mut Budget<'_>) -> Result<Arc<Vec<u8>>, LayerError> {
        let node = &self.nodes[&key];
        if let Some(content) = &node.content {
            return Ok(content.clone());
        }
        let (layer, frame) = (node.layer, node.frame.clone());
        budget.hold(frame.len.into())?;
        let references = self.references(layer, key, &frame, budget)?;
        // Somebody else may have made it by now; who makes it waits for nobody.
        let made = layer.cache().frames.get(key, budget, |_| {
            let content = layer.decode(key.1 as u32, &frame, &references)?;
            Ok((content, frame.len as usize))
        });
        let made = made.map_err(|error| self.top.of_below(layer, error))?;
        let node = self.nodes.get_mut(&key).expect("it was noted");
        node.held = true;
        Ok(node.content.insert(made).clone())
    }

    /// Leaves a frame to the cache once nobody needs it.
    fn drop_unused(&mut self, key: Key, budget: &mut Budget<'_>) {
        let node = self.nodes.get_mut(&key).expect("it was noted");
        if node.users == 0 && node.content.take().is_some() && node.held {
            budget.release(node.frame.len.into());
        }
    }

    /// The content of a frame's references, one after another: 16 MiB at most, as the index was checked.
    fn references(
        &mut self,
        layer: &'a LayerContent,
        key: Key,
        frame: &Frame,
        budget: &mut Budget<'_>,
    ) -> Result<Vec<u8>, LayerError> {
        let mut content = Vec::with_capacity(references_len(frame) as usize);
        for reference in &frame.references {
            each_need(
                layer,
                key,
                frame.depth,
                reference,
                budget,
                |need, len, budget| {
                    let start = content.len();
                    match need {
                        Need::Frame {
                            layer, id, offset, ..
                        } => {
                            let earlier = self.taken(layer.key(id), budget)?;
                            content.extend_from_slice(&earlier[offset..offset + len]);
                        }
                        Need::Other(place) => {
                            content.resize(start + len, 0);
                            place.read(&mut content[start..])?;
                        }
                    }
                    Ok(())
                },
            )?;
        }
        Ok(content)
    }

    /// A frame's content for one of those who refer to it.
    fn taken(&mut self, key: Key, budget: &mut Budget<'_>) -> Result<Arc<Vec<u8>>, LayerError> {
        let content = self.content(key, budget)?;
        self.nodes.get_mut(&key).expect("it was noted").users -= 1;
        self.drop_unused(key, budget);
        Ok(content)
    }
}

/// Whether all that a frame refers to, if anything, is frames of its own layer.
fn refers_within(frame: &Frame) -> bool {
    let mut references = frame.references.iter();
    references.all(|reference| matches!(reference.to, ReferenceTo::Frame(_)))
}

/// Walks what a reference of a frame names, piece by piece.
fn each_need<'a>(
    layer: &'a LayerContent,
    key: Key,
    depth: u8,
    reference: &Reference,
    budget: &mut Budget<'_>,
    mut each: impl FnMut(Need<'a>, usize, &mut Budget<'_>) -> Result<(), LayerError>,
) -> Result<(), LayerError> {
    let len = reference.len as usize;
    match reference.to {
        ReferenceTo::Frame(to) => {
            budget.step()?;
            let entry = layer.referred(key.1 as u32, depth, to, reference, budget)?;
            let offset = reference.offset as usize;
            let need = Need::Frame {
                layer,
                id: to,
                entry,
                offset,
            };
            each(need, len, budget)
        }
        ReferenceTo::Source(source_id) => {
            let mut at = reference.offset;
            let end = at + u64::from(reference.len);
            while at < end {
                let piece = follow_source(layer, source_id.into(), at..end, budget)?;
                let need = match piece.place {
                    Place::Frame(place) => {
                        let entry = place.entry(piece.len, budget);
                        Need::Frame {
                            layer: place.layer,
                            id: place.id,
                            entry: entry.map_err(|error| layer.of_below(place.layer, error))?,
                            offset: place.offset as usize,
                        }
                    }
                    other => Need::Other(other),
                };
                each(need, piece.len as usize, budget)?;
                at += piece.len;
            }
            Ok(())
        }
    }
}
