//! How much of what a connection was given to send has not left for the network yet.
//!
//! The multiplexer takes what it is given at once, half a megabyte of it, and buffers below it take more. Whoever counted that as sent
//! would begin with responses to all peers at the same time, over thin links each of them for seconds, and could not choose any more
//! what comes next. So it is counted how much the system took from the connection, encrypted, and the rest is what waits.

use std::collections::HashMap;
use std::io::{IoSlice, Result};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use futures::{AsyncRead, AsyncWrite};

/// Where nothing leaves for so long, nobody reads, or the count is not what it should be: then it begins again.
const PATIENCE: Duration = Duration::from_secs(5);

/// One connection's count.
#[derive(Debug, Default)]
pub struct Outgoing(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Bytes given that have not left. What others send over the connection, and what encryption adds, makes it less than it is, but never
    /// more; whenever nothing waits it is right again.
    waiting: usize,
    /// The socket is open; else nothing is counted.
    open: bool,
    waker: Option<Waker>,
}

impl Outgoing {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection is given so many bytes.
    pub fn given(&self, bytes: usize) {
        let mut state = self.state();
        if state.open {
            state.waiting += bytes;
        }
    }

    fn left(&self, bytes: usize) {
        let mut state = self.state();
        state.waiting = state.waiting.saturating_sub(bytes);
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }

    fn close(&self) {
        let mut state = self.state();
        (state.open, state.waiting) = (false, 0);
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }

    /// Waits until at most so many bytes wait. One task may do so.
    pub async fn drained(&self, most: usize) {
        loop {
            let before = self.state().waiting;
            let moves = std::future::poll_fn(|context| {
                let mut state = self.state();
                if state.waiting <= most || state.waiting < before {
                    return Poll::Ready(());
                }
                state.waker = Some(context.waker().clone());
                Poll::Pending
            });
            if tokio::time::timeout(PATIENCE, moves).await.is_err() {
                self.state().waiting = 0;
                return;
            }
            if self.state().waiting <= most {
                return;
            }
        }
    }
}

/// The counts of all open sockets, by the other end's address.
#[derive(Debug, Default)]
pub struct Sockets(Mutex<HashMap<SocketAddr, Weak<Outgoing>>>);

impl Sockets {
    fn all(&self) -> MutexGuard<'_, HashMap<SocketAddr, Weak<Outgoing>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A socket that counts, if it is known where it leads.
    pub(super) fn count<S>(&self, socket: S, leads_to: Option<SocketAddr>) -> Counted<S> {
        let outgoing = Arc::new(Outgoing::default());
        if let Some(address) = leads_to {
            outgoing.state().open = true;
            let mut all = self.all();
            all.retain(|_, other| other.strong_count() > 0);
            all.insert(address, Arc::downgrade(&outgoing));
        }
        Counted { socket, outgoing }
    }

    /// The count of a connection; one that is always nothing where it is not known.
    pub fn of(&self, address: Option<SocketAddr>) -> Arc<Outgoing> {
        let all = self.all();
        let known = address.and_then(|address| all.get(&address)?.upgrade());
        known.unwrap_or_default()
    }
}

/// A socket that counts what it takes.
pub(super) struct Counted<S> {
    socket: S,
    outgoing: Arc<Outgoing>,
}

impl<S> Drop for Counted<S> {
    fn drop(&mut self) {
        self.outgoing.close();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        let took = ready!(Pin::new(&mut self.socket).poll_write(context, bytes))?;
        self.outgoing.left(took);
        Poll::Ready(Ok(took))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let took = ready!(Pin::new(&mut self.socket).poll_write_vectored(context, bytes))?;
        self.outgoing.left(took);
        Poll::Ready(Ok(took))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.socket).poll_close(context)
    }
}
