//! Restoring a whole component in one ordered pass (API skeleton; bodies follow).
//!
//! `restore(content: &LayerContent, sink: &mut dyn Sink, options, progress) -> Result<(), RestoreError>` calls the
//! sink in order of offsets, without gaps; `LayerContent::new(index, space, pack: Arc<dyn ReadAt>, sources: Vec<Arc<dyn Content>>)`.

use std::io;

/// Takes restored content, in order from 0 to the end, without gaps.
pub trait Sink {
    /// Takes the next bytes.
    fn data(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Takes a run of zero bytes.
    fn zeros(&mut self, offset: u64, len: u64) -> io::Result<()>;
}
