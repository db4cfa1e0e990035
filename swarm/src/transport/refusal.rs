//! Why a connection did not come about, and why we let somebody not in.

use std::io;

use capsule_proto::credential::CredentialError;
use capsule_proto::wire::{PROTOCOL, WireError};
use libp2p::PeerId;
use thiserror::Error;

use super::admission::TIMEOUT;

/// Why we do not let a peer in; the text is told to it.
#[derive(Debug, Error)]
pub enum Refusal {
    /// It speaks another version of the protocol.
    #[error("this node speaks protocol version {PROTOCOL}, not {0}: upgrade the older one")]
    Version(u32),
    /// Its credential does not count.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// The credential is not of the machine that TLS proved.
    #[error("the credential is of another machine than the connection")]
    OtherMachine,
    /// It sent wrong content before.
    #[error("the machine was banned for sending wrong content")]
    Banned,
    /// It is this very node.
    #[error("the address is this node's own")]
    Myself,
}

/// Why a connection did not come about.
#[derive(Debug, Error)]
pub enum AdmissionError {
    /// There is no connection.
    #[error("{0}")]
    Socket(io::Error),
    /// TLS failed: no capsule node, or another version.
    #[error("no secure connection: {0}")]
    Tls(io::Error),
    /// The other side's identity is not a key.
    #[error("the peer did not prove an identity")]
    Identity,
    /// The connection broke during the exchange.
    #[error("the connection broke while credentials were exchanged: {0}")]
    Io(#[from] io::Error),
    /// The other side sent something else than a greeting and a verdict.
    #[error("the peer broke the exchange of credentials: {0}")]
    Malformed(#[from] WireError),
    /// It took too long.
    #[error("the peer did not finish the exchange of credentials in {} s", TIMEOUT.as_secs())]
    Timeout,
    /// They did not let us in.
    #[error("the peer refused us: {0}")]
    RefusedByPeer(String),
    /// We did not let them in.
    #[error("we refused peer {peer}: {refusal}")]
    Refused {
        /// Who.
        peer: PeerId,
        /// Why.
        refusal: Refusal,
    },
}

impl AdmissionError {
    /// Whether the other side is this node itself; whichever side was first to say so.
    pub fn is_myself(&self) -> bool {
        match self {
            Self::Refused { refusal, .. } => matches!(refusal, Refusal::Myself),
            Self::RefusedByPeer(reason) => *reason == Refusal::Myself.to_string(),
            _ => false,
        }
    }
}
