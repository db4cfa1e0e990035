//! Reads whole records: who reads one packet of a record after the other is woken for each, and can do nothing with it.
//!
//! On a link that many share, packets come one by one, and each would wake the connection's task, the multiplexer and all that it carries. TLS says at
//! the beginning of each record how long it is; so the system is told how many bytes are missing, and wakes us when they are there (`SO_RCVLOWAT`).
//! Nothing comes later for it: a part of a record cannot be decrypted.

use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::{AsyncRead, AsyncWrite};

use super::outgoing::Counted;

/// A record's header, and the most that may follow (RFC 8446, section 5).
const HEADER: usize = 5;
const MAX_RECORD: usize = (16 << 10) + 256;

/// A socket of which records are read.
pub(super) struct Records {
    socket: Counted,
    framing: Framing,
    /// How many bytes the system waits for.
    awaited: usize,
}

impl Records {
    pub(super) fn new(socket: Counted) -> Self {
        Self {
            socket,
            framing: Framing::default(),
            awaited: 1,
        }
    }
}

impl AsyncRead for Records {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<Result<usize>> {
        let read = Pin::new(&mut self.socket).poll_read(context, into);
        let missing = self.framing.missing();
        if read.is_pending() && self.awaited != missing && self.socket.wake_at(missing).is_ok() {
            self.awaited = missing;
        }
        let count = ready!(read)?;
        self.framing.pass(&into[..count]);
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for Records {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.socket).poll_close(context)
    }
}

/// Where in a stream of records we are.
#[derive(Debug, Default)]
struct Framing {
    header: [u8; HEADER],
    /// Bytes of the header that have come.
    known: usize,
    /// Bytes of the record after it that have not.
    left: usize,
    /// No records come here; whoever decrypts them will say so.
    is_lost: bool,
}

impl Framing {
    /// Takes in what came.
    fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.is_lost {
            if self.left > 0 {
                let count = self.left.min(bytes.len());
                self.left -= count;
                bytes = &bytes[count..];
                continue;
            }
            let count = bytes.len().min(HEADER - self.known);
            self.header[self.known..self.known + count].copy_from_slice(&bytes[..count]);
            self.known += count;
            bytes = &bytes[count..];
            if self.known == HEADER {
                self.known = 0;
                self.left = u16::from_be_bytes([self.header[3], self.header[4]]).into();
                self.is_lost = self.left > MAX_RECORD;
            }
        }
    }

    /// How many bytes at least have to come before there is something to be done.
    fn missing(&self) -> usize {
        match (self.is_lost, self.left, self.known) {
            (true, ..) | (_, 0, 0) => 1,
            (_, 0, known) => HEADER - known,
            (_, left, _) => left,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::{AsyncReadExt, FutureExt};
    use libp2p::tcp::tokio::TcpStream as Socket;
    use tokio::io::AsyncWriteExt;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::transport::Sockets;

    fn record(len: u16) -> Vec<u8> {
        let mut record = vec![23, 3, 3];
        record.extend(len.to_be_bytes());
        record.resize(HEADER + usize::from(len), 7);
        record
    }

    #[test]
    fn records_are_followed_however_they_are_cut() {
        let stream = [record(1000), record(0), record(3), record(16640), record(1)].concat();
        for step in [1, 2, 4, 5, 6, 7, 999, 1003, 1005, 1006, 5000, stream.len()] {
            let (mut framing, mut at) = (Framing::default(), 0);
            for part in stream.chunks(step) {
                framing.pass(part);
                at += part.len();
                let missing = framing.missing();
                let expected = match at {
                    1 => 4,
                    4 => 1,
                    5..1005 => 1005 - at,
                    1005 | 1010 | 1018 => 1,
                    1023..17663 => 17663 - at,
                    _ => continue,
                };
                assert_eq!(missing, expected, "at {at} in steps of {step}");
            }
            assert_eq!((framing.left, framing.known), (0, 0));
        }
    }

    #[test]
    fn what_is_no_record_is_not_waited_for() {
        let mut framing = Framing::default();
        framing.pass(&record(16641)[..100]);
        assert_eq!(framing.missing(), 1);
        framing.pass(&[0; 9000]);
        assert_eq!(framing.missing(), 1);
    }

    #[tokio::test]
    async fn the_rest_of_a_record_wakes_when_all_of_it_is_there() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (near, mut far) = (near.unwrap(), far.unwrap().0);
        far.set_nodelay(true).unwrap();
        let mut records = Records::new(Sockets::default().count(Socket(near)));
        let (first, mut bytes) = (record(10_000), vec![0; 20_000]);
        let soon = Duration::from_millis(100);

        far.write_all(&first[..4000]).await.unwrap();
        assert_eq!(records.read(&mut bytes).await.unwrap(), 4000);
        assert!(records.read(&mut bytes).now_or_never().is_none());
        far.write_all(&first[4000..8000]).await.unwrap();
        let woken = timeout(soon, records.read(&mut bytes)).await;
        let early = woken.map_or(0, Result::unwrap);
        let expected = if cfg!(target_os = "linux") { 0 } else { 4000 };
        assert_eq!(early, expected, "a part of it woke us");
        far.write_all(&first[8000..]).await.unwrap();
        assert_eq!(records.read(&mut bytes).await.unwrap(), 6005 - early);
        // The system still waits for as much when less comes, until it is told that this will do.
        far.write_all(&record(10)).await.unwrap();
        sleep(soon).await;
        let woken = timeout(soon, records.read(&mut bytes)).await;
        assert_eq!(woken.unwrap().unwrap(), 15);
        // Between records each byte wakes.
        assert!(records.read(&mut bytes).now_or_never().is_none());
        far.write_all(&[23]).await.unwrap();
        assert_eq!(records.read(&mut bytes).await.unwrap(), 1);
        // What came in between, before the system knew of it, wakes too; and so does the end, in the middle of a record.
        far.write_all(&first[1..]).await.unwrap();
        sleep(soon).await;
        assert_eq!(records.read(&mut bytes).await.unwrap(), 10_004);
        far.write_all(&first[..100]).await.unwrap();
        assert_eq!(records.read(&mut bytes).await.unwrap(), 100);
        assert!(records.read(&mut bytes).now_or_never().is_none());
        drop(far);
        assert_eq!(records.read(&mut bytes).await.unwrap(), 0);
    }
}
