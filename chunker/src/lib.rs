//! Capsule's content: BLAKE3 trees, frames and layers, image readers, directory trees.
//!
//! Depends on `capsule-proto` only. Knows files and devices, but no network and no database.

pub mod bao;
pub mod content;
pub mod delta;
pub mod free;
pub mod image;
pub mod layer;
pub mod like;
mod osfile;
pub mod tree;
