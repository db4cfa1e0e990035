//! Connections: TCP, TLS, admission, yamux. What comes out is a multiplexed connection to a member of the fleet.
//!
//! There is no libp2p protocol negotiation here: TLS's ALPN names the version of all of it, which saves two
//! round trips.

mod admission;
mod outgoing;
mod records;
mod refusal;
mod tls;

use std::sync::Arc;
use std::time::Duration;

use futures::io::{BufReader, BufWriter};
use futures::{AsyncRead, AsyncWrite};
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::Boxed;
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade};
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::identity::Keypair;
use libp2p::{PeerId, Transport, tcp, yamux};
use socket2::{SockRef, TcpKeepalive};

pub use admission::{Gatekeeper, peer_id_of};
pub use outgoing::{Outgoing, Sockets};
use records::Records;
pub use refusal::AdmissionError;
use tls::Tls;

/// Substreams a connection may have: our four, gossip's two, and some that are being closed.
const MAX_STREAMS: usize = 32;
/// Time for a stranger's TLS handshake, of the whole that `admission` allows: who says nothing soon gives its place up.
const TLS_PATIENCE: Duration = Duration::from_secs(5);

/// Silence after which TCP asks whether the other end is there, how often it asks again, and how many times. So an idle connection to a
/// machine that is gone ends after three and a half minutes; to one that is there it costs a packet and its answer in three, from either end.
const ASK_AFTER: Duration = Duration::from_secs(180);
const ASK_EVERY: Duration = Duration::from_secs(10);
const ASKED: u32 = 3;

/// Bytes that the system may hold for a connection before it has sent them: else it takes whole responses at once, on dozens of connections, which
/// is more than thin links carry in a second; then nothing can be chosen late any more, and what is said waits behind all of it.
#[cfg(target_os = "linux")]
const UNSENT: u32 = 16 << 10;

/// Bytes asked of the socket at once: rustls by itself asks for 4 KiB, a quarter of a record.
const READ_AHEAD: usize = 128 << 10;
/// Bytes gathered before they are encrypted, unless the multiplexer flushes: it writes each frame's header by itself, which
/// would become a record, and a packet, of 12 bytes.
const WRITE_BEHIND: usize = 64 << 10;

/// The transport of a node: everything up to the multiplexer.
pub fn build(
    identity: &Keypair,
    gatekeeper: Arc<Gatekeeper>,
    sockets: Arc<Sockets>,
) -> Result<Boxed<(PeerId, StreamMuxerBox)>, String> {
    let tls = Tls::new(identity)?;
    let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
    let upgraded = tcp.and_then(move |socket, endpoint| async move {
        tune(&socket).map_err(AdmissionError::Socket)?;
        let socket = Records::new(sockets.count(socket));
        let upgrade = upgrade(socket, endpoint, tls, gatekeeper);
        tokio::time::timeout(admission::TIMEOUT, upgrade)
            .await
            .unwrap_or(Err(AdmissionError::Timeout))
    });
    // One type for all, so that `admission_error` finds it again.
    Ok(upgraded
        .map_err(|error| error.either(AdmissionError::Socket, |error| error))
        .boxed())
}

/// Has the system find out whether the other end is still there, where nothing is said for long; and take no more than it can soon send.
fn tune(socket: &tcp::tokio::TcpStream) -> std::io::Result<()> {
    let keep_alive = TcpKeepalive::new()
        .with_time(ASK_AFTER)
        .with_interval(ASK_EVERY)
        .with_retries(ASKED);
    let socket = SockRef::from(&socket.0);
    socket.set_tcp_keepalive(&keep_alive)?;
    #[cfg(target_os = "linux")]
    {
        // It does not ask while something sent is not acknowledged.
        socket.set_tcp_user_timeout(Some(ASK_AFTER + ASK_EVERY * ASKED))?;
        socket.set_tcp_notsent_lowat(UNSENT)?;
    }
    Ok(())
}

async fn upgrade<S>(
    socket: S,
    endpoint: ConnectedPoint,
    tls: Tls,
    gatekeeper: Arc<Gatekeeper>,
) -> Result<(PeerId, StreamMuxerBox), AdmissionError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    // In a hole punch both sides dial; libp2p then says which one acts as the server.
    let is_server = match endpoint {
        ConnectedPoint::Listener { .. } => true,
        ConnectedPoint::Dialer { role_override, .. } => role_override == Endpoint::Listener,
    };
    let socket = BufReader::with_capacity(READ_AHEAD, socket);
    let mut secured: futures_rustls::TlsStream<_> = if is_server {
        tokio::time::timeout(TLS_PATIENCE, tls.acceptor.accept(socket))
            .await
            .map_err(|_| AdmissionError::Tls(std::io::ErrorKind::TimedOut.into()))?
            .map_err(AdmissionError::Tls)?
            .into()
    } else {
        let connect = tls.connector.connect(tls::no_server_name(), socket);
        connect.await.map_err(AdmissionError::Tls)?.into()
    };
    let peer = tls::peer_id(secured.get_ref().1).map_err(|_| AdmissionError::Identity)?;
    gatekeeper.admit(peer, &mut secured, is_server).await?;
    let mut config = yamux::Config::default();
    config.set_max_num_streams(MAX_STREAMS);
    let secured = BufWriter::with_capacity(WRITE_BEHIND, secured);
    let muxer = if is_server {
        config.upgrade_inbound(secured, "").await
    } else {
        config.upgrade_outbound(secured, "").await
    };
    Ok((peer, StreamMuxerBox::new(muxer?)))
}

/// The reason in an error of the transport, however deeply libp2p has wrapped it.
pub fn admission_error<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> Option<&'a AdmissionError> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<AdmissionError>() {
            return Some(found);
        }
        // An `io::Error` hides the error that it carries behind that error's own source.
        next = match error
            .downcast_ref::<std::io::Error>()
            .and_then(|io| io.get_ref())
        {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}
