//! How much of what a connection was given to send has left for the network.
//!
//! The multiplexer takes what it is given at once, half a megabyte of it, and buffers below it and the system's take more. Whoever counted that as
//! sent would begin with responses to all peers at the same time, over thin links each of them for seconds, and could not choose any more what
//! comes next. So it is counted how much the system took from the connection, encrypted; and the system says when it has hardly anything left
//! of that, other than what is on its way.

use std::collections::HashMap;
use std::io::{ErrorKind, IoSlice, Result};
use std::net::SocketAddr;
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use futures::{AsyncRead, AsyncWrite};
use libp2p::tcp::tokio::TcpStream as Socket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Where nothing leaves for so long, nobody reads, or the count is not what it should be: then it begins again.
const PATIENCE: Duration = Duration::from_secs(5);
/// What the system took after a response shows that this is on its way, as it holds no more.
const HELD: u64 = 64 << 10;

/// One connection's count.
#[derive(Debug, Default)]
pub struct Outgoing {
    count: Mutex<Count>,
    /// The socket once more, to be asked; none where nothing is counted.
    socket: Option<TcpStream>,
}

#[derive(Debug, Default)]
struct Count {
    given: u64,
    /// Never more than was given. What others send over the connection, and what encryption adds, makes it more than it is; whenever all has
    /// left it is right again.
    left: u64,
    closed: bool,
    waker: Option<Waker>,
}

impl Outgoing {
    fn count(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection is given so many bytes; says where they end.
    pub fn given(&self, bytes: usize) -> u64 {
        let mut count = self.count();
        count.given += bytes as u64;
        count.given
    }

    /// The system took so many.
    fn took(&self, bytes: usize) {
        self.change(|count| count.left = count.given.min(count.left + bytes as u64));
    }

    fn change(&self, change: impl FnOnce(&mut Count)) {
        let mut count = self.count();
        change(&mut count);
        if let Some(waker) = count.waker.take() {
            waker.wake();
        }
    }

    /// Waits until what ends there is on its way. One task may do so.
    pub async fn has_left(&self, end: u64) {
        let Some(socket) = &self.socket else { return };
        let leaves = async || {
            self.reaches(end).await;
            tokio::select! {
                () = is_sent(socket) => {}
                () = self.reaches(end + HELD) => {}
            }
        };
        let mut before = self.count().left;
        while timeout(PATIENCE, leaves()).await.is_err() {
            let mut count = self.count();
            if count.left == before {
                count.left = count.given;
                return;
            }
            before = count.left;
        }
    }

    /// Waits until the system took so much.
    async fn reaches(&self, end: u64) {
        std::future::poll_fn(|context| {
            let mut count = self.count();
            if count.left >= end || count.closed {
                return Poll::Ready(());
            }
            count.waker = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// Waits until the system has little left that it has not sent (`transport::UNSENT`).
async fn is_sent(socket: &TcpStream) {
    let look = || {
        let mut asked = [PollFd::new(socket, PollFlags::OUT)];
        match poll(&mut asked, Some(&Timespec::default())) {
            Ok(0) => Err(ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    };
    // What is known of it may be old: so it is asked, and where that says no, it tells when that changes.
    while socket.writable().await.is_ok() {
        if socket.try_io(Interest::WRITABLE, look).is_ok() {
            return;
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

    /// A socket that counts; one that cannot be asked, or of which it is not known where it leads, is not waited for.
    pub(super) fn count(&self, socket: Socket) -> Counted {
        let again = SockRef::from(&socket.0).try_clone();
        let again = again.and_then(|again| TcpStream::from_std(again.into()));
        let outgoing = Arc::new(Outgoing {
            count: Mutex::default(),
            socket: again.ok(),
        });
        if let Ok(address) = socket.0.peer_addr() {
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
pub(super) struct Counted {
    socket: Socket,
    outgoing: Arc<Outgoing>,
}

impl Counted {
    /// Has the system say that there is something to read when so many bytes are there, or the end.
    pub(super) fn wake_at(&self, bytes: usize) -> Result<()> {
        #[cfg(not(target_os = "linux"))]
        let _each_packet_wakes = bytes;
        #[cfg(target_os = "linux")]
        {
            let (socket, bytes) = (self.socket.0.as_raw_fd(), bytes as libc::c_int);
            let len = size_of_val(&bytes) as libc::socklen_t;
            // SAFETY: the descriptor is open for as long as `self` is borrowed, and the option's value is an integer that outlives the call.
            let set = unsafe {
                let value = (&raw const bytes).cast();
                libc::setsockopt(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, len)
            };
            if set != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.outgoing.change(|count| count.closed = true);
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        let took = ready!(Pin::new(&mut self.socket).poll_write(context, bytes))?;
        self.outgoing.took(took);
        Poll::Ready(Ok(took))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        let took = ready!(Pin::new(&mut self.socket).poll_write_vectored(context, bytes))?;
        self.outgoing.took(took);
        Poll::Ready(Ok(took))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.socket).poll_close(context)
    }
}

#[cfg(test)]
mod tests {
    use futures::{AsyncReadExt, AsyncWriteExt, FutureExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn what_nobody_reads_has_not_left() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (near, mut far) = (near.unwrap(), Socket(far.unwrap().0));
        let sockets = Sockets::default();
        let mut socket = sockets.count(Socket(near));
        let outgoing = sockets.of(Some(address));

        let little = outgoing.given(1000);
        assert!(outgoing.has_left(little).now_or_never().is_none());
        socket.write_all(&[7; 1000]).await.unwrap();
        outgoing.has_left(little).await;
        // More than any system holds for a connection.
        let much = 64 << 20;
        let end = outgoing.given(much);
        let writing = tokio::spawn(async move {
            socket.write_all(&vec![7; much]).await.unwrap();
            socket
        });
        let soon = Duration::from_millis(200);
        let leaves = timeout(soon, outgoing.has_left(end)).await;
        assert!(leaves.is_err(), "nobody reads");
        let reading = tokio::spawn(async move {
            let mut all = vec![0; 1000 + much];
            far.read_exact(&mut all).await.unwrap();
            far
        });
        outgoing.has_left(end).await;
        let (socket, _far) = (writing.await.unwrap(), reading.await.unwrap());
        // What never comes is not waited for, once the connection is gone.
        let never = outgoing.given(1);
        drop(socket);
        outgoing.has_left(never).await;
        assert!(sockets.of(None).has_left(1).now_or_never().is_some());
    }
}
