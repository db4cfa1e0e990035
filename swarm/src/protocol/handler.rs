//! One connection: opens our two lanes, reads the peer's two, and carries frames between them and the behaviour.
//!
//! Lanes live as long as the connection. A lane that ends, or a frame that breaks the protocol, is reported once as
//! [`ToBehaviour::Fault`], and the behaviour closes the connection: both sides then start afresh, with full announcements,
//! rather than guess what was lost. Inbound lanes are never dropped: a second one of a kind is such a fault too.
//!
//! Backpressure: outward, content waits for caps (`pace`), is bounded by the scheduler's credit (reports of [`ToBehaviour::Sent`]) and control by
//! [`MAX_QUEUED`]; inward, by the channel to the behaviour and the budget of `buffers`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use capsule_proto::wire::Control;
use futures::channel::mpsc;
use futures::future::BoxFuture;
use futures::io::BufReader;
use futures::{FutureExt, SinkExt, StreamExt};
use libp2p::StreamProtocol;
use libp2p::core::upgrade::ReadyUpgrade;
use libp2p::core::{InboundUpgrade, UpgradeInfo};
use libp2p::swarm::handler::{
    ConnectionEvent, ConnectionHandler, ConnectionHandlerEvent, DialUpgradeError,
    FullyNegotiatedInbound, FullyNegotiatedOutbound,
};
use libp2p::swarm::{Stream, SubstreamProtocol};

use super::buffers::{Buffer, Buffers};
use super::frame::{self, Arriving, LaneError, Response};
use super::pace::Lanes;
use crate::transport::Outgoing;

/// Bytes of control messages that may wait for a peer: more, and it does not read (the news of a large node is some 100 KiB, the longest message 1 MiB).
const MAX_QUEUED: usize = 8 << 20;
/// Events that lanes may have ready before the behaviour takes them; the first is in the behaviour's own queue by then.
const EVENTS_READY: usize = 4;
/// Frames given to a lane's writer ahead of the one being written.
const FRAMES_AHEAD: usize = 1;
/// Bytes written between two reports of how far a response has got, where no cap makes them fewer. The scheduler gives out a peer's next response when less
/// than 32 KiB of the last are left, which is to show before all of it has: with reports every 256 KiB the lane ran dry (two nodes of 20 Mbit/s: 92 % of the
/// bound, not 97 to 99).
const REPORT_EVERY: usize = 24 << 10;
/// But no more reports than these of a response: at 10 Gbit/s each is work for the engine.
const MOST_REPORTS: usize = 16;
/// Read-ahead of the control lane, so that small messages come several to a read.
const CONTROL_READ_AHEAD: usize = 8 << 10;

const PROTOCOLS: [StreamProtocol; 2] = [
    StreamProtocol::new("/capsule/control/1"),
    StreamProtocol::new("/capsule/data/1"),
];

/// What a substream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    Control = 0,
    Data = 1,
}

const LANES: [Lane; 2] = [Lane::Control, Lane::Data];

/// What the behaviour asks of a connection.
#[derive(Debug)]
pub enum FromBehaviour {
    /// A control frame, header included.
    Control(Bytes),
    /// A content frame, header included.
    Content { request: u64, frame: Buffer },
}

/// What a connection tells the behaviour.
#[derive(Debug)]
pub enum ToBehaviour {
    /// A control message came, in a frame of so many bytes.
    Control(Box<Control>, usize),
    /// Content came.
    Content(Response),
    /// The connection took `bytes` more of a response, header included.
    Sent {
        request: u64,
        bytes: usize,
        finished: bool,
    },
    /// A lane ended or was abused; nothing more will come.
    Fault(LaneError),
}

/// The frame queue to one outbound lane.
struct Outbound {
    opening: bool,
    queue: VecDeque<FromBehaviour>,
    writer: Option<mpsc::Sender<FromBehaviour>>,
    task: Option<BoxFuture<'static, LaneError>>,
}

/// See the module.
pub struct Handler {
    outbound: [Outbound; 2],
    inbound: [Option<BoxFuture<'static, LaneError>>; 2],
    events_in: mpsc::Sender<ToBehaviour>,
    events_out: mpsc::Receiver<ToBehaviour>,
    queued_control: usize,
    fault: Option<LaneError>,
    failed: bool,
    buffers: Arc<Buffers>,
    arriving: Arriving,
    lanes: Lanes,
    outgoing: Arc<Outgoing>,
}

impl Handler {
    /// A connection that takes its buffers for content from `buffers`, notes progress in `arriving`, and sends as `lanes` lets it.
    pub fn new(
        buffers: Arc<Buffers>,
        arriving: Arriving,
        lanes: Lanes,
        outgoing: Arc<Outgoing>,
    ) -> Self {
        let (events_in, events_out) = mpsc::channel(EVENTS_READY);
        let outbound = LANES.map(|_| Outbound {
            opening: false,
            queue: VecDeque::new(),
            writer: None,
            task: None,
        });
        Self {
            outbound,
            inbound: [None, None],
            events_in,
            events_out,
            queued_control: 0,
            fault: None,
            failed: false,
            buffers,
            arriving,
            lanes,
            outgoing,
        }
    }

    fn fail(&mut self, error: LaneError) {
        if !self.failed {
            self.failed = true;
            self.fault = Some(error);
        }
    }

    fn outbound_opened(&mut self, lane: Lane, stream: Stream) {
        let (sender, receiver) = mpsc::channel(FRAMES_AHEAD);
        let events = self.events_in.clone();
        let (lanes, outgoing) = (self.lanes.clone(), self.outgoing.clone());
        let task = write_lane(stream, receiver, events, lanes, outgoing).boxed();
        let outbound = &mut self.outbound[lane as usize];
        outbound.writer = Some(sender);
        outbound.task = Some(task);
    }

    fn inbound_opened(&mut self, lane: Lane, stream: Stream) {
        if self.inbound[lane as usize].is_some() {
            return self.fail(LaneError::Open("the peer opened a lane twice".into()));
        }
        let events = self.events_in.clone();
        self.inbound[lane as usize] = Some(match lane {
            Lane::Control => read_control_lane(stream, events).boxed(),
            Lane::Data => {
                read_data_lane(stream, events, self.buffers.clone(), self.arriving.clone()).boxed()
            }
        });
    }

    /// Moves queued frames to the writers and runs all lanes as far as they go.
    fn poll_lanes(&mut self, cx: &mut Context<'_>) -> Result<(), LaneError> {
        for outbound in &mut self.outbound {
            if let (Some(writer), Some(task)) = (&mut outbound.writer, &mut outbound.task) {
                loop {
                    let fed = feed(writer, &mut outbound.queue, &mut self.queued_control, cx);
                    if let Poll::Ready(error) = task.poll_unpin(cx) {
                        return Err(error);
                    }
                    if !fed {
                        break;
                    }
                }
            }
        }
        for task in self.inbound.iter_mut().flatten() {
            if let Poll::Ready(error) = task.poll_unpin(cx) {
                return Err(error);
            }
        }
        Ok(())
    }
}

/// Gives the writer what it takes; true if it took anything.
fn feed(
    writer: &mut mpsc::Sender<FromBehaviour>,
    queue: &mut VecDeque<FromBehaviour>,
    queued_control: &mut usize,
    cx: &mut Context<'_>,
) -> bool {
    let mut fed = false;
    while !queue.is_empty() {
        match writer.poll_ready(cx) {
            Poll::Ready(Ok(())) => {}
            // The writer's end is reported by its task.
            Poll::Ready(Err(_)) | Poll::Pending => break,
        }
        let Some(frame) = queue.pop_front() else {
            break;
        };
        if let FromBehaviour::Control(bytes) = &frame {
            *queued_control -= bytes.len();
        }
        fed |= writer.start_send(frame).is_ok();
    }
    fed
}

/// Something that was written, and is reported once it has left.
struct Leaving {
    end: u64,
    report: ToBehaviour,
}

/// Reports what has left by now.
async fn report_left(
    leaving: &mut VecDeque<Leaving>,
    events: &mut mpsc::Sender<ToBehaviour>,
    outgoing: &Outgoing,
) {
    while let Some(first) =
        leaving.pop_front_if(|first| outgoing.has_left(first.end).now_or_never().is_some())
    {
        let _gone = events.send(first.report).await;
    }
}

/// The next frame to write; until it comes, reports what has left.
async fn next_frame(
    frames: &mut mpsc::Receiver<FromBehaviour>,
    leaving: &mut VecDeque<Leaving>,
    events: &mut mpsc::Sender<ToBehaviour>,
    outgoing: &Outgoing,
) -> Option<FromBehaviour> {
    while let Some(first) = leaving.front() {
        tokio::select! {
            () = outgoing.has_left(first.end) => {}
            frame = frames.next() => return frame,
        }
        if let Some(first) = leaving.pop_front() {
            let _gone = events.send(first.report).await;
        }
    }
    frames.next().await
}

async fn write_lane(
    mut stream: Stream,
    mut frames: mpsc::Receiver<FromBehaviour>,
    mut events: mpsc::Sender<ToBehaviour>,
    lanes: Lanes,
    outgoing: Arc<Outgoing>,
) -> LaneError {
    let mut leaving = VecDeque::new();
    let mut write = async || -> Result<(), LaneError> {
        while let Some(frame) = next_frame(&mut frames, &mut leaving, &mut events, &outgoing).await
        {
            match frame {
                FromBehaviour::Control(bytes) => {
                    lanes.count(bytes.len());
                    outgoing.given(bytes.len());
                    frame::write_moving(&mut stream, &bytes).await?;
                }
                FromBehaviour::Content {
                    request,
                    frame: content,
                } => {
                    let mut at = 0;
                    let most = REPORT_EVERY.max(content.len().div_ceil(MOST_REPORTS));
                    while at < content.len() {
                        report_left(&mut leaving, &mut events, &outgoing).await;
                        // By what the cap is now: it may have changed since the last step.
                        let bytes = lanes.step(most).min(content.len() - at);
                        lanes.pass(bytes).await;
                        let end = outgoing.given(bytes);
                        frame::write_moving(&mut stream, &content[at..at + bytes]).await?;
                        at += bytes;
                        leaving.push_back(Leaving {
                            end,
                            report: ToBehaviour::Sent {
                                request,
                                bytes,
                                finished: at == content.len(),
                            },
                        });
                    }
                    // Its memory is there for the next response before the last of this one is reported.
                }
            }
        }
        Ok(())
    };
    write().await.err().unwrap_or(LaneError::Closed)
}

async fn read_control_lane(stream: Stream, mut events: mpsc::Sender<ToBehaviour>) -> LaneError {
    let mut stream = BufReader::with_capacity(CONTROL_READ_AHEAD, stream);
    loop {
        let event = match frame::read_control(&mut stream).await {
            Ok((message, len)) => ToBehaviour::Control(Box::new(message), len),
            Err(error) => return error,
        };
        if events.send(event).await.is_err() {
            return LaneError::Closed;
        }
    }
}

async fn read_data_lane(
    mut stream: Stream,
    mut events: mpsc::Sender<ToBehaviour>,
    buffers: Arc<Buffers>,
    arriving: Arriving,
) -> LaneError {
    loop {
        let event = match frame::read_content(&mut stream, &buffers, &arriving).await {
            Ok(response) => ToBehaviour::Content(response),
            Err(error) => return error,
        };
        if events.send(event).await.is_err() {
            return LaneError::Closed;
        }
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = FromBehaviour;
    type ToBehaviour = ToBehaviour;
    type InboundProtocol = AnyLane;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Lane;

    fn listen_protocol(&self) -> SubstreamProtocol<AnyLane, ()> {
        SubstreamProtocol::new(AnyLane, ())
    }

    /// The connection manager decides when a connection ends, not idleness.
    fn connection_keep_alive(&self) -> bool {
        !self.failed
    }

    fn on_behaviour_event(&mut self, event: FromBehaviour) {
        let lane = match &event {
            FromBehaviour::Control(bytes) => {
                self.queued_control += bytes.len();
                Lane::Control
            }
            FromBehaviour::Content { .. } => Lane::Data,
        };
        self.outbound[lane as usize].queue.push_back(event);
        if self.queued_control > MAX_QUEUED {
            self.fail(LaneError::NotReading(self.queued_control));
        }
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_, AnyLane, ReadyUpgrade<StreamProtocol>, (), Lane>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound {
                protocol, ..
            }) => {
                self.inbound_opened(protocol.0, protocol.1);
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound {
                protocol,
                info,
            }) => {
                self.outbound_opened(info, protocol);
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { error, .. }) => {
                self.fail(LaneError::Open(error.to_string()));
            }
            _ => {}
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<ReadyUpgrade<StreamProtocol>, Lane, ToBehaviour>> {
        for lane in LANES {
            let outbound = &mut self.outbound[lane as usize];
            if !std::mem::replace(&mut outbound.opening, true) {
                let upgrade = ReadyUpgrade::new(PROTOCOLS[lane as usize].clone());
                let protocol = SubstreamProtocol::new(upgrade, lane);
                return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
            }
        }
        if !self.failed
            && let Err(error) = self.poll_lanes(cx)
        {
            self.fail(error);
        }
        // What was read before a fault still counts.
        if let Poll::Ready(Some(event)) = self.events_out.poll_next_unpin(cx) {
            return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(event));
        }
        if let Some(error) = self.fault.take() {
            let event = ToBehaviour::Fault(error);
            return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(event));
        }
        Poll::Pending
    }
}

/// Accepts either lane, and says which it is.
#[derive(Clone, Copy, Debug)]
pub struct AnyLane;

impl UpgradeInfo for AnyLane {
    type Info = StreamProtocol;
    type InfoIter = std::array::IntoIter<StreamProtocol, 2>;

    fn protocol_info(&self) -> Self::InfoIter {
        PROTOCOLS.into_iter()
    }
}

impl<S> InboundUpgrade<S> for AnyLane {
    type Output = (Lane, S);
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_inbound(self, stream: S, protocol: StreamProtocol) -> Self::Future {
        let lane = if protocol == PROTOCOLS[Lane::Data as usize] {
            Lane::Data
        } else {
            Lane::Control
        };
        ready(Ok((lane, stream)))
    }
}
