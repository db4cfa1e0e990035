//! Frames on the two lanes of a connection.
//!
//! A connection carries four substreams: each side opens a *control* and a *data* lane and only writes to its own,
//! so that a request never waits behind a megabyte of content. Every frame is
//!
//! ```text
//! 5 bytes     FrameHeader: length and kind
//! control:    one message
//! data:       13 bytes DataHeader: request and number of groups; then their range encoding
//! ```
//!
//! as `capsule_proto::wire` defines them.
//! Lengths are checked before anything is allocated. A frame of the wrong kind for its lane, or too long, is a fault
//! of the peer's and ends the connection.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use capsule_proto::wire::{
    Control, DATA_HEADER_LEN, DataHeader, FRAME_HEADER_LEN, FrameHeader, FrameKind,
    MAX_DATA_GROUPS, MAX_DATA_LEN, WireError,
};
use capsule_swarm_core::MAX_REQUEST_GROUPS;
use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use thiserror::Error;
use tokio::time::timeout;

use super::buffers::{Buffer, Buffers};

/// Bytes before the encoding in a data frame.
pub const CONTENT_HEADER: usize = FRAME_HEADER_LEN + DATA_HEADER_LEN;
/// Longest data frame, header included.
pub const MAX_CONTENT_FRAME: usize = FRAME_HEADER_LEN + MAX_DATA_LEN;

/// Longest silence within a frame: it pins a buffer that all connections share. TCP resends for longer only on
/// links that are dead to `Peer::tick` too.
pub const READ_PATIENCE: Duration = Duration::from_secs(20);
/// Longest wait until the connection takes another byte: a peer whose buffers are pinned by others' silent frames
/// has them back before.
pub const WRITE_PATIENCE: Duration = Duration::from_secs(30);

// A response is one frame.
const _: () = assert!(MAX_REQUEST_GROUPS <= MAX_DATA_GROUPS);

/// What a peer did wrong on a lane, or how the lane ended.
#[derive(Debug, Error)]
pub enum LaneError {
    /// The connection or the substream ended.
    #[error("the peer closed the connection")]
    Closed,
    /// Reading or writing failed.
    #[error("connection: {0}")]
    Io(io::Error),
    /// A frame or message that is none, or beyond its bounds.
    #[error("the peer broke the protocol: {0}")]
    Malformed(#[from] WireError),
    /// A frame that does not belong on this lane.
    #[error("the peer broke the protocol: a frame of kind {0:?} on the wrong lane")]
    WrongKind(FrameKind),
    /// The peer does not read what we send.
    #[error("the peer does not read: {0} bytes of messages wait for it")]
    NotReading(usize),
    /// The peer stopped in the middle of a frame, or the link is dead.
    #[error("nothing moved in the middle of a frame for {} s", .0.as_secs())]
    Stalled(Duration),
    /// The peer did not open or accept a lane.
    #[error("opening a lane: {0}")]
    Open(String),
}

impl LaneError {
    /// Whether the peer broke the protocol, rather than the network failing.
    pub fn is_violation(&self) -> bool {
        matches!(self, Self::WrongKind(_) | Self::Malformed(_))
    }
}

impl From<io::Error> for LaneError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::WriteZero => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

/// Content that came in answer to a request.
#[derive(Debug)]
pub struct Response {
    pub header: DataHeader,
    /// The range encoding, unverified.
    pub encoded: Buffer,
}

/// How much of the content frame being read has come. Written by the reader, read by the engine now and then.
#[derive(Clone, Debug, Default)]
pub struct Arriving(Arc<Mutex<(u64, u64)>>);

impl Arriving {
    fn set(&self, request: u64, bytes: usize) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (request, bytes as u64);
    }

    /// The request being answered, and the bytes of it that have come.
    pub fn get(&self) -> (u64, u64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a control frame; shared by all the peers it goes to.
pub fn control_frame(message: &Control) -> Bytes {
    let message = message.encode();
    let header = FrameHeader {
        kind: FrameKind::Control,
        len: message.len(),
    };
    let mut frame = Vec::with_capacity(FRAME_HEADER_LEN + message.len());
    frame.extend(header.encode());
    frame.extend(message);
    frame.into()
}

/// Leaves room for a data frame's header at the start of an empty buffer; the encoding is appended.
pub fn reserve_content_header(buffer: &mut Vec<u8>) {
    buffer.resize(CONTENT_HEADER, 0);
}

/// Fills the header in, when the encoding is complete.
pub fn fill_content_header(buffer: &mut [u8], header: &DataHeader) {
    let len = buffer.len() - FRAME_HEADER_LEN;
    let frame = FrameHeader {
        kind: FrameKind::Data,
        len,
    };
    buffer[..FRAME_HEADER_LEN].copy_from_slice(&frame.encode());
    buffer[FRAME_HEADER_LEN..CONTENT_HEADER].copy_from_slice(&header.encode());
}

/// Reads one control message, and tells the length of its frame.
pub async fn read_control(
    lane: &mut (impl AsyncRead + Unpin),
) -> Result<(Control, usize), LaneError> {
    let len = read_header(lane, FrameKind::Control).await?;
    let mut message = vec![0; len];
    fill(lane, &mut message, READ_PATIENCE, |_| ()).await?;
    Ok((Control::decode(&message)?, FRAME_HEADER_LEN + len))
}

/// Reads one data frame; waits for a buffer before it reads the content.
pub async fn read_content(
    lane: &mut (impl AsyncRead + Unpin),
    buffers: &Arc<Buffers>,
    arriving: &Arriving,
) -> Result<Response, LaneError> {
    let len = read_header(lane, FrameKind::Data).await?;
    let mut header = [0; DATA_HEADER_LEN];
    fill(lane, &mut header, READ_PATIENCE, |_| ()).await?;
    let header = DataHeader::decode(&header)?;
    let len = len - DATA_HEADER_LEN;
    let mut encoded = buffers.filled(len).await;
    let progress = |at| arriving.set(header.request, at);
    fill(lane, &mut encoded, READ_PATIENCE, progress).await?;
    Ok(Response { header, encoded })
}

/// Writes all of `bytes`; fails where the peer takes none for [`WRITE_PATIENCE`].
pub async fn write_moving(
    lane: &mut (impl AsyncWrite + Unpin),
    mut bytes: &[u8],
) -> Result<(), LaneError> {
    while !bytes.is_empty() {
        let written = timeout(WRITE_PATIENCE, lane.write(bytes)).await;
        match written.map_err(|_| LaneError::Stalled(WRITE_PATIENCE))?? {
            0 => return Err(LaneError::Closed),
            n => bytes = &bytes[n..],
        }
    }
    Ok(())
}

/// Reads until `bytes` is full, telling how far it is; fails where nothing comes for as long as `patience`.
async fn fill(
    lane: &mut (impl AsyncRead + Unpin),
    bytes: &mut [u8],
    patience: Duration,
    came: impl Fn(usize),
) -> Result<(), LaneError> {
    let mut at = 0;
    while at < bytes.len() {
        let read = timeout(patience, lane.read(&mut bytes[at..])).await;
        match read.map_err(|_| LaneError::Stalled(patience))?? {
            0 => return Err(LaneError::Closed),
            n => at += n,
        }
        came(at);
    }
    Ok(())
}

async fn read_header(
    lane: &mut (impl AsyncRead + Unpin),
    kind: FrameKind,
) -> Result<usize, LaneError> {
    let mut header = [0; FRAME_HEADER_LEN];
    // Between frames a lane may be silent for as long as it likes.
    lane.read_exact(&mut header[..1]).await?;
    fill(lane, &mut header[1..], READ_PATIENCE, |_| ()).await?;
    let header = FrameHeader::decode(&header)?;
    if header.kind == kind {
        Ok(header.len)
    } else {
        Err(LaneError::WrongKind(header.kind))
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use capsule_proto::wire::MAX_CONTROL_LEN;
    use futures::io::Cursor;

    use super::*;

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_time().build().unwrap().block_on(work)
    }

    /// Gives some bytes, then neither more nor an end.
    struct Silent<'a>(Cursor<&'a [u8]>);

    impl AsyncRead for Silent<'_> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            into: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            match Pin::new(&mut self.0).poll_read(cx, into) {
                Poll::Ready(Ok(0)) => Poll::Pending,
                read => read,
            }
        }
    }

    #[test]
    fn silence_within_a_frame_ends_and_between_frames_does_not() {
        let patience = Duration::from_millis(20);
        let mut lane = Silent(Cursor::new(&[1, 2, 3]));
        let mut bytes = [0; 4];
        let filled = block_on(fill(&mut lane, &mut bytes, patience, |_| ()));
        assert!(matches!(filled, Err(LaneError::Stalled(_))), "{filled:?}");
        assert_eq!(bytes, [1, 2, 3, 0]);
        let frame = control_frame(&Control::Ping { nonce: 300 });
        let mut lane = Silent(Cursor::new(&frame));
        block_on(async {
            read_control(&mut lane).await.unwrap();
            let waits = timeout(patience, read_control(&mut lane)).await;
            assert!(waits.is_err(), "{waits:?}");
        });
    }

    #[test]
    fn control_frames_round_trip_and_every_truncation_is_refused() {
        let message = Control::Ping { nonce: 300 };
        let frame = control_frame(&message);
        assert_eq!(
            block_on(read_control(&mut Cursor::new(&frame))).unwrap(),
            (message, frame.len())
        );
        for len in 0..frame.len() {
            let result = block_on(read_control(&mut Cursor::new(&frame[..len])));
            assert!(
                matches!(result, Err(LaneError::Closed)),
                "cut to {len}: {result:?}"
            );
        }
    }

    #[test]
    fn content_frames_round_trip_and_report_progress() {
        let header = DataHeader {
            request: 99,
            groups: 1,
            compressed: false,
        };
        let mut frame = Vec::new();
        reserve_content_header(&mut frame);
        frame.extend([7; 1000]);
        fill_content_header(&mut frame, &header);
        let (buffers, arriving) = (Buffers::new(1 << 20), Arriving::default());
        let response =
            block_on(read_content(&mut Cursor::new(&frame), &buffers, &arriving)).unwrap();
        assert_eq!(
            (response.header, &response.encoded[..]),
            (header, &[7; 1000][..])
        );
        assert_eq!(arriving.get(), (99, 1000));
    }

    #[test]
    fn frames_that_do_not_belong_are_violations() {
        let read = |bytes: &[u8]| block_on(read_control(&mut Cursor::new(bytes))).unwrap_err();
        let long = [&(MAX_CONTROL_LEN as u32 + 1).to_be_bytes()[..], &[0]].concat();
        for bytes in [
            &long[..],
            &[0, 0, 0, 20, 1],
            &[0, 0, 0, 0, 9],
            &[0, 0, 0, 1, 0, 255],
        ] {
            assert!(read(bytes).is_violation(), "{bytes:?}");
        }
        let (buffers, arriving) = (Buffers::new(1 << 20), Arriving::default());
        let short = [0, 0, 0, 12, 1];
        let error =
            block_on(read_content(&mut Cursor::new(&short), &buffers, &arriving)).unwrap_err();
        assert!(error.is_violation());
    }
}
