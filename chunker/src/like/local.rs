//! Frames that are made of local data.

use std::collections::HashMap;
use std::sync::Arc;

use super::Place;
use crate::content::{Content, ReadError};
use crate::layer::read::LayerContent;

/// Most pieces: 2^22, about 500 MiB where each is a frame. A hostile layer may have a billion frames of the same content.
const MAX_PIECES: usize = 1 << 22;

/// Part of a frame, and where it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub len: u32,
    pub place: Place,
}

/// The frames of one layer that local data has.
pub struct Local {
    contents: Vec<Arc<dyn Content>>,
    layers: Vec<Arc<LayerContent>>,
    frames: HashMap<u32, Vec<Piece>>,
    /// How many pieces they consist of.
    pieces: usize,
}

impl Local {
    pub(super) fn new(contents: Vec<Arc<dyn Content>>, layers: Vec<Arc<LayerContent>>) -> Self {
        Self {
            contents,
            layers,
            frames: HashMap::new(),
            pieces: 0,
        }
    }

    /// Whether so many pieces may be added.
    pub(super) fn has_room(&self, pieces: usize) -> bool {
        self.pieces + pieces <= MAX_PIECES
    }

    pub(super) fn add(&mut self, id: u32, pieces: Vec<Piece>) {
        self.pieces += pieces.len();
        self.frames.insert(id, pieces);
    }

    /// Whether a frame is made of local data.
    pub(crate) fn has(&self, id: u32) -> bool {
        self.frames.contains_key(&id)
    }

    /// What local data has for a frame; whoever asks checks its hash.
    pub(crate) fn read(&self, id: u32) -> Result<Vec<u8>, ReadError> {
        let pieces = self.frames.get(&id).map_or(&[][..], Vec::as_slice);
        let len = pieces.iter().map(|piece| piece.len as usize).sum();
        let mut bytes = vec![0; len];
        let mut rest = bytes.as_mut_slice();
        for piece in pieces {
            let (now, later) = rest.split_at_mut(piece.len as usize);
            match piece.place {
                Place::Content { source, offset } => {
                    self.contents[source as usize].read_at(offset, now)?
                }
                Place::Frame { source, id, offset } => {
                    let read = self.layers[source as usize].read_frame(id, offset, now);
                    read.map_err(|error| ReadError::Decode {
                        offset: offset.into(),
                        source: Box::new(error),
                    })?;
                }
            }
            rest = later;
        }
        Ok(bytes)
    }
}
