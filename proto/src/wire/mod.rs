//! What peers say to each other: frames, control messages, gossip.
//!
//! The prost types of `proto/schema/wire.proto` stay in [`generated`]; everything else in Capsule sees the domain types, which were
//! checked as they were parsed. Sockets belong to the swarm. Byte-level description: `proto/docs/wire.md`.

mod control;
mod frame;
#[allow(missing_docs, clippy::all, clippy::pedantic)]
#[rustfmt::skip]
pub mod generated;
mod gossip;

pub use control::{Control, Greeting, MAX_RECORD_IDS, MAX_RUNS_PER_HAVE, Reject, RejectReason, Request, Verdict};
pub use frame::{DATA_HEADER_LEN, DataHeader, FRAME_HEADER_LEN, FrameHeader, FrameKind, MAX_CONTROL_LEN, MAX_DATA_GROUPS, MAX_DATA_LEN};
pub use gossip::{HeldCapsule, PeerAddress, Status};

use thiserror::Error;

/// Version of the protocol; peers of another version refuse each other with a reason.
pub const PROTOCOL: u32 = 1;
/// Longest greeting or verdict, in bytes: a credential and a revocation record.
pub const MAX_GREETING_LEN: usize = 256 << 10;

/// Why a message is refused; its sender breaks the protocol.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum WireError {
    /// Not a protobuf message of the schema.
    #[error("the {what} is malformed: {why}")]
    Malformed {
        /// The message.
        what: &'static str,
        /// What the decoder said.
        why: String,
    },
    /// A length or count beyond its bound.
    #[error("the {what} is {value} long, beyond the bound of {bound}")]
    TooLong {
        /// The field or message.
        what: &'static str,
        /// What was found.
        value: usize,
        /// The bound.
        bound: usize,
    },
    /// A field that breaks a rule.
    #[error("the {what} is invalid: {why}")]
    Invalid {
        /// The field.
        what: &'static str,
        /// The rule.
        why: &'static str,
    },
}

fn bounded(what: &'static str, value: usize, bound: usize) -> Result<(), WireError> {
    if value > bound { Err(WireError::TooLong { what, value, bound }) } else { Ok(()) }
}

fn decode_message<M: prost::Message + Default>(what: &'static str, bytes: &[u8], bound: usize) -> Result<M, WireError> {
    bounded(what, bytes.len(), bound)?;
    M::decode(bytes).map_err(|error| WireError::Malformed { what, why: error.to_string() })
}

fn hash(what: &'static str, bytes: &[u8]) -> Result<crate::RootHash, WireError> {
    let bytes = bytes.try_into().map_err(|_| WireError::Invalid { what, why: "a hash is 32 bytes long" })?;
    Ok(crate::RootHash::from_bytes(bytes))
}

fn texts(what: &'static str, texts: Vec<String>, count: usize, len: usize) -> Result<Vec<String>, WireError> {
    bounded(what, texts.len(), count)?;
    texts.iter().try_for_each(|text| bounded(what, text.len(), len))?;
    Ok(texts)
}
