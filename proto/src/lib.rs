//! Capsule's formats: what is named, signed or sent, as values that were checked when they were parsed.
//!
//! Depends on nothing of ours. Knows no files, sockets or clocks.

pub mod codec;
pub mod credential;
pub mod hash;
pub mod index;
pub mod listing;
pub mod manifest;
pub mod name;
pub mod ranges;
pub mod record;
pub mod wire;

pub use hash::{CapsuleId, FrameHash, RootHash};
pub use ranges::{GROUP_LEN, GroupRanges};
