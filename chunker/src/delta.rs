//! What new content has in common with old content: the search behind update layers.
//!
//! From coarse to fine, each step working on what the one before left over:
//!
//! | module | what |
//! |---|---|
//! | `outline` | what is known without reading the new content: unchanged chunk groups, unchanged files |
//! | `seeds` | sampled hashes of short windows, the same wherever the window lies |
//! | `similar` | an index of the old content's seeds |
//! | `old` | the old contents, read in pieces |
//! | `pieces` | what of a stretch of new content is unchanged in its place, or copied from another |
//! | `cover` | for what is left: the stretches of old content that a frame is best compressed against |
//! | `align` | and those that lie under it byte by byte, where it is old content with small changes |
//! | `steps` | the same at the highest effort: every byte is looked at, and what lies over nothing is left out |
//!
//! Everything is decided by the contents alone, so the result does not depend on the number of threads. `layer::encode`
//! makes a layer of what is found. Figures behind the choices: `chunker/docs/delta.md`.

mod align;
mod cover;
mod old;
mod outline;
mod pieces;
mod seeds;
mod similar;
mod steps;

pub use old::{OldError, OldSource};
pub use outline::{Known, Outline};
pub use similar::{Similar, SimilarOptions};

pub(crate) use align::align;
pub(crate) use cover::{Limits, Vote, Window, cover, cover_old};
pub(crate) use outline::UnknownSource;
pub(crate) use pieces::{Found, Matcher};
pub(crate) use seeds::Seed;
pub(crate) use steps::steps;
