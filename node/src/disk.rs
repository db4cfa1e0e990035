//! What programs read piece by piece, through `nbd` or `mount`.

use std::ops::Range;
use std::sync::Arc;

use capsule_chunker::content::ReadError;
use futures::future::BoxFuture;

/// Bytes of a known length that may have to come first.
pub trait Disk: Send + Sync {
    /// Its bytes.
    fn len(&self) -> u64;

    /// Whether a range is known to be zeros without reading it. Blocks briefly: by an index that is here.
    fn is_zero(&self, range: Range<u64>) -> bool;

    /// Appends a range to what is there already, if its bytes are at hand: without waiting for anything. Else nothing is appended.
    fn read_at_hand(&self, _range: Range<u64>, _into: &mut Vec<u8>) -> bool {
        false
    }

    /// Appends a range, which lies within it, to what is there already. Takes as long as it takes for the bytes to come; dropped, it ends.
    fn read(
        self: Arc<Self>,
        range: Range<u64>,
        into: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, ReadError>>;
}
