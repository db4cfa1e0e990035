//! Whoever speaks the wire by hand: a stranger at the door, or a member that breaks the protocol once it is in.
//!
//! Written after `proto/docs/wire.md`, not upon the network crate, which would not let it say such things. The door comes in
//! steps, so that a test can stop at any of them: [`knock`] (TCP and TLS), [`greet`] (the exchange of credentials), [`Link::enter`]
//! (all of it, and the four lanes of a member).

use std::future::poll_fn;
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use capsule_proto::credential::{Credential, MachineKey};
use capsule_proto::wire::{
    Control, DATA_HEADER_LEN, DataHeader, FRAME_HEADER_LEN, FrameHeader, FrameKind, Greeting,
    PROTOCOL, Verdict,
};
use futures::io::{AsyncReadExt, AsyncWriteExt};
use futures_rustls::TlsConnector;
use futures_rustls::client::TlsStream;
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt, SubstreamBox};
use libp2p::core::upgrade::OutboundConnectionUpgrade;
use libp2p::identity::Keypair;
use libp2p::{tcp, yamux};
use libp2p_tls::certificate;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

/// What a node's TLS is told by.
pub const ALPN: &[u8] = b"/capsule/tls/1";
/// How long anything at the door may take: a node gives a stranger 10 s.
pub const DOOR_PATIENCE: Duration = Duration::from_secs(15);
/// First line of every negotiation of a substream.
pub const MULTISTREAM: &[u8] = b"\x13/multistream/1.0.0\n";
/// Messages of the node that a link keeps until its test looks.
const MAX_HEARD: usize = 4096;

/// A connection after TLS.
pub type Secured = TlsStream<tcp::tokio::TcpStream>;

/// A runtime for rogues.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

/// A TCP connection from a certain address of this machine.
pub async fn dial(to: &str, from: Option<SocketAddr>) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    if let Some(from) = from {
        socket.bind(from)?;
    }
    let stream = socket
        .connect(to.parse().map_err(|_| ErrorKind::InvalidInput)?)
        .await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// TCP and TLS; without a key no certificate is shown.
pub async fn knock(to: &str, key: Option<&MachineKey>, alpn: &[&[u8]]) -> Result<Secured> {
    let stream = tcp::tokio::TcpStream(dial(to, None).await?);
    let connector = TlsConnector::from(Arc::new(tls(key, alpn)));
    let name = ServerName::IpAddress(std::net::IpAddr::from([0, 0, 0, 0]).into());
    connector.connect(name, stream).await
}

fn tls(key: Option<&MachineKey>, alpn: &[&[u8]]) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody));
    let mut config = match key {
        None => builder.with_no_client_auth(),
        Some(key) => {
            let identity = Keypair::ed25519_from_bytes(key.secret()).expect("the key is one");
            let (certificate, key) = certificate::generate(&identity).expect("it can be made");
            let key = provider
                .key_provider
                .load_private_key(key)
                .expect("it was just made");
            let certified = CertifiedKey::new(vec![certificate], key);
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
        }
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.enable_sni = false;
    config
}

/// Takes every certificate: who meets a rogue need not be afraid for it.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

/// What a member says first; of a stranger, what it makes up.
pub fn greeting(credential: &[u8]) -> Vec<u8> {
    let greeting = Greeting {
        protocol: PROTOCOL,
        credential: credential.to_vec(),
        revocation: None,
        newest_time: 0,
        agent: "rogue".to_owned(),
        site: String::new(),
    };
    greeting.encode()
}

/// Says something in the handshake's framing, and hears the verdict.
pub async fn greet(stream: &mut Secured, greeting: &[u8]) -> Result<Verdict> {
    say(stream, greeting).await?;
    Verdict::decode(&hear(stream).await?).map_err(Error::other)
}

async fn say(stream: &mut Secured, message: &[u8]) -> Result<()> {
    stream
        .write_all(&(message.len() as u32).to_be_bytes())
        .await?;
    stream.write_all(message).await?;
    stream.flush().await
}

async fn hear(stream: &mut Secured) -> Result<Vec<u8>> {
    let mut len = [0; 4];
    stream.read_exact(&mut len).await?;
    let mut message = vec![0; u32::from_be_bytes(len).min(1 << 20) as usize];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// All that still comes until the other side closes; an error if it does not within [`DOOR_PATIENCE`].
pub async fn rest(stream: &mut (impl futures::AsyncRead + Unpin)) -> Result<Vec<u8>> {
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    let reading = async {
        // A reset, or the end of TCP without that of TLS, is an end too.
        while let Ok(len @ 1..) = stream.read(&mut buffer).await {
            bytes.extend_from_slice(&buffer[..len]);
        }
    };
    timeout(DOOR_PATIENCE, reading).await?;
    Ok(bytes)
}

/// What a substream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Messages.
    Control,
    /// Content.
    Data,
}

impl Lane {
    /// The protocol's name, as it is negotiated.
    pub const fn protocol(self) -> &'static str {
        match self {
            Self::Control => "/capsule/control/1",
            Self::Data => "/capsule/data/1",
        }
    }
}

/// Something that the node said on its lanes.
#[derive(Debug)]
pub enum Heard {
    /// A message.
    Control(Control),
    /// Content: its header, and how many bytes came with it.
    Data(DataHeader, usize),
}

/// A connection of a member that says what it likes.
pub struct Link {
    /// Its own lane for messages.
    pub control: SubstreamBox,
    /// Its own lane for content.
    pub data: SubstreamBox,
    open: mpsc::Sender<oneshot::Sender<SubstreamBox>>,
    heard: mpsc::Receiver<Heard>,
    deaf: watch::Sender<bool>,
    connection: tokio::task::JoinHandle<()>,
}

impl Link {
    /// Connects as the member of the credential, and opens both lanes.
    pub async fn enter(to: &str, key: &MachineKey, credential: &Credential) -> Result<Self> {
        timeout(DOOR_PATIENCE, Self::come_in(to, key, credential)).await?
    }

    async fn come_in(to: &str, key: &MachineKey, credential: &Credential) -> Result<Self> {
        let mut stream = knock(to, Some(key), &[ALPN]).await?;
        let Verdict(verdict) = greet(&mut stream, &greeting(&credential.encode())).await?;
        verdict.map_err(Error::other)?;
        Greeting::decode(&hear(&mut stream).await?).map_err(Error::other)?;
        say(&mut stream, &Verdict(Ok(())).encode()).await?;
        let muxer = yamux::Config::default()
            .upgrade_outbound(stream, "")
            .await?;
        let (open, opens) = mpsc::channel(16);
        let (hears, heard) = mpsc::channel(MAX_HEARD);
        let (deaf, ears) = watch::channel(false);
        let muxer = StreamMuxerBox::new(muxer);
        let connection = tokio::spawn(drive(muxer, opens, hears, ears));
        let mut control = new_stream(&open).await?;
        negotiate(&mut control, Lane::Control.protocol()).await?;
        let mut data = new_stream(&open).await?;
        negotiate(&mut data, Lane::Data.protocol()).await?;
        Ok(Self {
            control,
            data,
            open,
            heard,
            deaf,
            connection,
        })
    }

    /// From now on reads nothing that the node sends.
    pub fn turn_deaf(&self) {
        self.deaf.send_replace(true);
    }

    /// One more substream, nothing said on it yet.
    pub async fn stream(&self) -> Result<SubstreamBox> {
        new_stream(&self.open).await
    }

    /// Sends a message as it should be.
    pub async fn say(&mut self, message: &Control) -> Result<()> {
        self.raw(Lane::Control, &frame(FrameKind::Control, &message.encode()))
            .await
    }

    /// Sends a data frame.
    pub async fn answer(&mut self, header: DataHeader, encoded: &[u8]) -> Result<()> {
        let payload = [&header.encode()[..], encoded].concat();
        self.raw(Lane::Data, &frame(FrameKind::Data, &payload))
            .await
    }

    /// Puts bytes on a lane.
    pub async fn raw(&mut self, lane: Lane, bytes: &[u8]) -> Result<()> {
        let stream = match lane {
            Lane::Control => &mut self.control,
            Lane::Data => &mut self.data,
        };
        stream.write_all(bytes).await?;
        stream.flush().await
    }

    /// The next that the node says; `None` once it has cut the link.
    pub async fn hear(&mut self) -> Option<Heard> {
        self.heard.recv().await
    }

    /// Whether the node cuts the link within a time.
    pub async fn is_cut_within(&mut self, patience: Duration) -> bool {
        timeout(patience, &mut self.connection).await.is_ok()
    }
}

/// A frame with an honest header.
pub fn frame(kind: FrameKind, payload: &[u8]) -> Vec<u8> {
    let header = FrameHeader {
        kind,
        len: payload.len(),
    };
    [&header.encode()[..], payload].concat()
}

async fn new_stream(open: &mpsc::Sender<oneshot::Sender<SubstreamBox>>) -> Result<SubstreamBox> {
    let (reply, stream) = oneshot::channel();
    let gone = |_| Error::from(ErrorKind::ConnectionAborted);
    open.send(reply)
        .await
        .map_err(|_| ErrorKind::ConnectionAborted)?;
    stream.await.map_err(gone)
}

/// Asks for a protocol on a new substream.
pub async fn negotiate(stream: &mut SubstreamBox, protocol: &str) -> Result<()> {
    stream.write_all(MULTISTREAM).await?;
    stream.write_all(&line(protocol)).await?;
    stream.flush().await?;
    let mut answer = vec![0; MULTISTREAM.len() + protocol.len() + 2];
    stream.read_exact(&mut answer).await?;
    if answer == [MULTISTREAM, &line(protocol)].concat() {
        Ok(())
    } else {
        Err(Error::other(format!("{protocol} is refused")))
    }
}

fn line(text: &str) -> Vec<u8> {
    [&[text.len() as u8 + 1], text.as_bytes(), b"\n"].concat()
}

/// Moves the connection's bytes, opens substreams, and listens on the node's; ends with the connection.
async fn drive(
    mut muxer: StreamMuxerBox,
    mut opens: mpsc::Receiver<oneshot::Sender<SubstreamBox>>,
    heard: mpsc::Sender<Heard>,
    deaf: watch::Receiver<bool>,
) {
    let mut asked = None;
    poll_fn(|cx| {
        loop {
            if let Poll::Ready(stream) = muxer.poll_inbound_unpin(cx) {
                let Ok(stream) = stream else {
                    return Poll::Ready(());
                };
                tokio::spawn(listen(stream, heard.clone(), deaf.clone()));
                continue;
            }
            if asked.is_none() {
                match opens.poll_recv(cx) {
                    Poll::Ready(Some(reply)) => asked = Some(reply),
                    // The link was dropped: so is the connection.
                    Poll::Ready(None) => return Poll::Ready(()),
                    Poll::Pending => {}
                }
            }
            if asked.is_some()
                && let Poll::Ready(stream) = muxer.poll_outbound_unpin(cx)
            {
                let Ok(stream) = stream else {
                    return Poll::Ready(());
                };
                if let Some(reply) = asked.take() {
                    let _gone = reply.send(stream);
                }
                continue;
            }
            return match muxer.poll_unpin(cx) {
                Poll::Ready(Err(_)) => Poll::Ready(()),
                Poll::Ready(Ok(_)) => continue,
                Poll::Pending => Poll::Pending,
            };
        }
    })
    .await
}

/// Takes a substream that the node opened: its lanes are read, anything else (gossip) is declined.
async fn listen(
    mut stream: SubstreamBox,
    heard: mpsc::Sender<Heard>,
    mut deaf: watch::Receiver<bool>,
) -> Result<()> {
    let mut header = [0; MULTISTREAM.len()];
    stream.read_exact(&mut header).await?;
    stream.write_all(MULTISTREAM).await?;
    let lane = loop {
        stream.flush().await?;
        let mut len = [0; 1];
        stream.read_exact(&mut len).await?;
        let mut asked = vec![0; len[0].into()];
        stream.read_exact(&mut asked).await?;
        let lane = [Lane::Control, Lane::Data]
            .into_iter()
            .find(|lane| asked == line(lane.protocol())[1..]);
        match lane {
            Some(lane) => break lane,
            None => stream.write_all(&line("na")).await?,
        }
    };
    stream.write_all(&line(lane.protocol())).await?;
    stream.flush().await?;
    loop {
        let mut header = [0; FRAME_HEADER_LEN];
        stream.read_exact(&mut header).await?;
        // Until the link is dropped.
        if deaf.wait_for(|deaf| !deaf).await.is_err() {
            return Ok(());
        }
        let header = FrameHeader::decode(&header).map_err(Error::other)?;
        let mut payload = vec![0; header.len];
        stream.read_exact(&mut payload).await?;
        let said = match payload.first_chunk::<DATA_HEADER_LEN>() {
            Some(data) if header.kind == FrameKind::Data => Heard::Data(
                DataHeader::decode(data).map_err(Error::other)?,
                payload.len() - DATA_HEADER_LEN,
            ),
            _ => Heard::Control(Control::decode(&payload).map_err(Error::other)?),
        };
        // Nobody looks: it is read all the same, so that the node is not held up.
        let _full = heard.try_send(said);
    }
}
