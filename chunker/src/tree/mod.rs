//! Directory trees: read to be published, written back, compared.
//!
//! [`scan()`] walks a directory into a [`TreeSource`]: metadata in memory, contents read from the files as they are asked
//! for. [`TreeWriter`] puts a listing and its contents, handed over in order, into a directory; [`restore()`] drives it from
//! contents that can be read. [`verify_tree`] compares. No path is ever followed through a symbolic link, and nothing outside
//! the directory is touched, whatever others do in it meanwhile (`root`).
//!
//! The listing's format is `capsule_proto::listing`; "tree" here never means a BLAKE3 tree, which lives in `bao`. Linux only.

mod compare;
mod existing;
mod finish;
mod meta;
mod outline;
mod place;
mod restore;
mod root;
mod scan;
mod source;
mod workers;
mod writer;

pub use compare::{Difference, verify_tree};
pub use outline::TreeOutline;
pub use restore::{RestoreError, RestoreOptions, Restored, restore};
pub use scan::{MAX_ENTRIES, ScanError, ScanOptions, scan};
pub use source::TreeSource;
pub use writer::TreeWriter;
