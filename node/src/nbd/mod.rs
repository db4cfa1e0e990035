//! Content as a network block device, read-only: what QEMU, the kernel and the tools of libnbd read a disk from.
//!
//! The protocol is <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>: fixed newstyle negotiation, simple and structured
//! replies, and the metadata context `base:allocation`, by which clients pass over zeros. Not here: TLS (the socket is this user's), writing,
//! and where the content comes from.

mod handshake;
mod listen;
mod transmission;
mod wire;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use capsule_chunker::content::ReadError;
use futures::future::BoxFuture;
pub use listen::nbd;
use tokio::io::{AsyncRead, AsyncWrite, BufReader};

/// What is served.
pub struct Export {
    /// By what name clients ask for it; any name does, as there is only one.
    pub name: String,
    /// For people.
    pub description: String,
    /// The bytes.
    pub disk: Arc<dyn Disk>,
}

/// What is read as a disk.
pub trait Disk: Send + Sync {
    /// Its bytes.
    fn len(&self) -> u64;

    /// Whether a range is known to be zeros without reading it. May read an index.
    fn is_zero(&self, range: Range<u64>) -> bool;

    /// Appends a range, which lies within it, to what is there already. Takes as long as it takes for the bytes to come; dropped, it ends.
    fn read(
        self: Arc<Self>,
        range: Range<u64>,
        into: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, ReadError>>;
}

/// Serves one client until it leaves.
///
/// # Errors
/// What the connection said, or that the client does not speak the protocol.
pub async fn serve<S>(stream: S, export: &Arc<Export>) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (read, mut write) = tokio::io::split(stream);
    let mut read = BufReader::new(read);
    match handshake::negotiate(&mut read, &mut write, export).await? {
        Some(agreed) => transmission::run(read, write, export, agreed).await,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
