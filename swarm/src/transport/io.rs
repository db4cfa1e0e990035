//! Buffers around TLS, so that one system call carries many yamux frames.
//!
//! Left to themselves, yamux writes each frame's 12-byte header and its body apart and flushes after each,
//! and rustls reads the socket 4 KiB at a time. [`below_tls`] reads ahead; [`Coalesce`] gathers writes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::io::{AsyncRead, AsyncWrite, BufReader};

/// Bytes read ahead from a socket: a few TLS records a system call.
const READ_AHEAD: usize = 64 << 10;
/// Bytes gathered before TLS encrypts and writes them: four full records.
const WRITE_GATHER: usize = 64 << 10;

/// Reads ahead from a socket; writes pass through.
pub fn below_tls<S: AsyncRead + AsyncWrite>(socket: S) -> BufReader<S> {
    BufReader::with_capacity(READ_AHEAD, socket)
}

/// Gathers small writes; reads pass through.
///
/// The first flush after a write does nothing but wake the task: if more is written before the task comes round,
/// it goes out together; if not, the second flush is carried out. So nothing stays behind, and a burst of frames
/// costs one system call instead of one each. Only sound for a caller that, like yamux, flushes every time it is polled.
pub struct Coalesce<S> {
    inner: S,
    gathered: Vec<u8>,
    /// How much of `gathered` the inner stream has taken.
    taken: usize,
    written_since_flush: bool,
}

impl<S> Coalesce<S> {
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            gathered: Vec::new(),
            taken: 0,
            written_since_flush: false,
        }
    }
}

impl<S: AsyncWrite + Unpin> Coalesce<S> {
    fn poll_hand_over(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.taken < self.gathered.len() {
            let rest = &self.gathered[self.taken..];
            match ready!(Pin::new(&mut self.inner).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.taken += n,
            }
        }
        self.gathered.clear();
        self.taken = 0;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Coalesce<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Coalesce<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.gathered.len() >= WRITE_GATHER {
            ready!(self.poll_hand_over(cx))?;
        }
        let n = buf.len().min(WRITE_GATHER - self.gathered.len());
        self.gathered.extend_from_slice(&buf[..n]);
        self.written_since_flush = true;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.written_since_flush) {
            cx.waker().wake_by_ref();
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_hand_over(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_hand_over(cx))?;
        Pin::new(&mut self.inner).poll_close(cx)
    }
}
