//! Content as a network block device, read-only: what QEMU, the kernel and the tools of libnbd read a disk from.
//!
//! The protocol is <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>: fixed newstyle negotiation, simple and structured
//! replies, and the metadata context `base:allocation`, by which clients pass over zeros. Not here: TLS (the socket is this user's), writing,
//! and where the content comes from.

pub mod client;
mod handshake;
mod listen;
mod transmission;
mod whole;
mod wire;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::disk::Disk;
pub use listen::{nbd, serve_at};
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio::time::timeout;

/// So long a client may take until it reads.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is served.
pub struct Export {
    /// By what name clients ask for it; any name does, as there is only one.
    pub name: String,
    /// For people.
    pub description: String,
    /// The bytes.
    pub disk: Arc<dyn Disk>,
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
    let agreed = handshake::negotiate(&mut read, &mut write, export);
    match timeout(PATIENCE, agreed).await?? {
        Some(agreed) => transmission::run(read, write, export, agreed).await,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
