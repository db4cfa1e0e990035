//! Making a frame that refers to others, in however many layers.
//!
//! First what it needs is looked up, and what that needs, down to what is kept or refers to nothing.
//! Then frames are decoded from below upwards, each once, and held until the last that refers to it is made. So the cost is
//! that of the different frames, however often they are referred to and however little the cache keeps; nothing recurses; and
//! what is too dear is known before anything is decoded.

use std::collections::BTreeMap;
use std::sync::Arc;

use capsule_proto::index::{Frame, Reference, ReferenceTo};

use super::budget::{Budget, references_len};
use super::cache::Key;
use super::error::LayerError;
use super::follow::{Place, follow_source};
use super::pages::FrameEntry;
use super::read::LayerContent;

/// A decoded frame, kept or made.
pub(super) fn frame(
    layer: &LayerContent,
    id: u32,
    entry: &FrameEntry,
    budget: &mut Budget<'_>,
) -> Result<Arc<Vec<u8>>, LayerError> {
    if let Some(kept) = layer.cache().frames.kept(layer.key(id)) {
        return Ok(kept);
    }
    if entry.references.is_empty() {
        budget.frame(entry)?;
        return leaf(layer, id, entry, budget);
    }
    let mut plan = Plan {
        top: layer,
        nodes: BTreeMap::new(),
        unseen: Vec::new(),
    };
    plan.want(layer, id, entry, budget)?;
    plan.look(budget)?;
    plan.make(budget)
}

/// A frame that refers to nothing, and was paid for.
fn leaf(
    layer: &LayerContent,
    id: u32,
    frame: &Frame,
    budget: &mut Budget<'_>,
) -> Result<Arc<Vec<u8>>, LayerError> {
    let frames = &layer.cache().frames;
    frames.get(layer.key(id), budget, |_| {
        let content = layer.decode(id, frame, &[])?;
        Ok((content, frame.len as usize))
    })
}

/// The frames that a frame needs, itself among them. By key, so that each comes after all that it refers to.
struct Plan<'a> {
    /// The layer of the frame that is wanted.
    top: &'a LayerContent,
    nodes: BTreeMap<Key, Node<'a>>,
    /// Those whose references were not looked at yet.
    unseen: Vec<Key>,
}

struct Node<'a> {
    layer: &'a LayerContent,
    /// Its entry, but for spans, as pages are not to be kept in memory for as long as this takes.
    frame: Frame,
    /// How many places of others need it still.
    users: usize,
    content: Option<Arc<Vec<u8>>>,
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
    /// Notes that a frame is needed, once more.
    fn want(
        &mut self,
        layer: &'a LayerContent,
        id: u32,
        entry: &FrameEntry,
        budget: &mut Budget<'_>,
    ) -> Result<(), LayerError> {
        let key = layer.key(id);
        if let Some(node) = self.nodes.get_mut(&key) {
            node.users += 1;
            return Ok(());
        }
        let frame = entry.without_spans();
        let content = layer.cache().frames.kept(key);
        if content.is_some() {
            budget.hold(frame.len.into())?;
        } else {
            budget.frame(&frame)?;
            if !frame.references.is_empty() {
                self.unseen.push(key);
            }
        }
        let node = Node {
            layer,
            frame,
            users: 1,
            content,
        };
        self.nodes.insert(key, node);
        Ok(())
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
                    } => self.want(layer, id, &entry, budget),
                    Need::Other(_) => Ok(()),
                };
                each_need(layer, key, depth, &reference, budget, &mut want)
                    .map_err(|error| self.top.of_below(layer, error))?;
            }
        }
        Ok(())
    }

    /// Makes all of them; returns the last, which is the one that was wanted. Those that refer to nothing are made when the
    /// first needs them: many layers may refer to different ones of the lowest, which are not to be held all at once.
    fn make(mut self, budget: &mut Budget<'_>) -> Result<Arc<Vec<u8>>, LayerError> {
        let keys: Vec<Key> = self.nodes.keys().copied().collect();
        let mut last = None;
        for key in keys {
            budget.check()?;
            let node = &self.nodes[&key];
            let content = match &node.content {
                Some(kept) => kept.clone(),
                None if node.frame.references.is_empty() => continue,
                None => {
                    let (layer, frame) = (node.layer, node.frame.clone());
                    budget.hold(frame.len.into())?;
                    let made = self.make_one(layer, key, &frame, budget);
                    let made = made.map_err(|error| self.top.of_below(layer, error))?;
                    let node = self.nodes.get_mut(&key).expect("it was there");
                    node.content.insert(made).clone()
                }
            };
            last = Some(content);
        }
        Ok(last.expect("the frame that was wanted is among them"))
    }

    fn make_one(
        &mut self,
        layer: &'a LayerContent,
        key: Key,
        frame: &Frame,
        budget: &mut Budget<'_>,
    ) -> Result<Arc<Vec<u8>>, LayerError> {
        let references = self.references(layer, key, frame, budget)?;
        // Somebody else may have made it by now; who makes it waits for nobody.
        layer.cache().frames.get(key, budget, |_| {
            let content = layer.decode(key.1 as u32, frame, &references)?;
            Ok((content, frame.len as usize))
        })
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

    /// A frame's content for one of those who need it; the last leaves it to the cache.
    fn taken(&mut self, key: Key, budget: &mut Budget<'_>) -> Result<Arc<Vec<u8>>, LayerError> {
        let node = self.nodes.get_mut(&key).expect("it was wanted");
        let content = match &node.content {
            Some(content) => content.clone(),
            // All that it may refer to have smaller keys, and were made before.
            None => {
                let made = leaf(node.layer, key.1 as u32, &node.frame, budget);
                let made = made.map_err(|error| self.top.of_below(node.layer, error))?;
                budget.hold(node.frame.len.into())?;
                node.content.insert(made).clone()
            }
        };
        node.users -= 1;
        if node.users == 0 {
            node.content = None;
            budget.release(node.frame.len.into());
        }
        Ok(content)
    }
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
                    Place::Frame {
                        layer: below,
                        id,
                        offset,
                        start,
                    } => {
                        let entry = below.entry(id, offset, start, piece.len, budget);
                        Need::Frame {
                            layer: below,
                            id,
                            entry: entry.map_err(|error| layer.of_below(below, error))?,
                            offset: offset as usize,
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
