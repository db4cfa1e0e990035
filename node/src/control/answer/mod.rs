//! Answers: the last line of a successful request, and what `--json` prints.

mod capsules;
mod content;
mod keeping;
mod node;

pub use capsules::*;
pub use content::*;
pub use keeping::*;
pub use node::*;
