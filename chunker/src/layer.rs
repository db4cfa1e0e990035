//! Layers: content as frames of a pack, described by an index.
//!
//! `encode` makes pack and index of a source; `read` gives any range of a component back through its layers; `restore`
//! gives all of it, in order, on all cores; `reach` tells which parts of the packs that takes. Formats are `capsule-proto`'s (`proto::index`); where blobs are stored, and
//! by which layers a component is reached, is the node's business. See `chunker/docs/layer.md`.

mod assemble;
mod budget;
mod cache;
mod changes;
pub mod codec;
mod compress;
mod coordinate;
mod cut;
mod earlier;
mod effort;
pub mod encode;
mod error;
mod follow;
pub mod front;
pub mod hash;
mod making;
mod pages;
mod plan;
mod prove;
pub mod reach;
pub mod read;
mod reread;
pub mod restore;
mod slab;
mod source;
mod stats;
mod stored;
mod tally;
mod update;
mod work;

pub use changes::Changes;
pub(crate) use codec::Step;
pub use cut::Cuts;
pub(crate) use cut::{GEAR, PAGE_LEN};
pub use pages::{IndexFault, Storage};
pub use prove::Unproved;
pub use source::LayerSource;
pub use stats::EncodeStats;
pub use stored::stored_index;
pub use tally::Tally;

/// What cutting local data as the encoder does takes.
pub(crate) mod slabs {
    pub(crate) use super::cut::Cutter;
    pub(crate) use super::slab::{Piece, SLAB_LEN, SlabReader};
}
