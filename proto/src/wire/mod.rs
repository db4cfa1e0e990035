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

pub use control::{
    Control, Gateway, Greeting, MAX_PEERS, MAX_RECORD_IDS, MAX_RECORDS, MAX_RUNS_PER_GATEWAY,
    MAX_RUNS_PER_HAVE, Reject, RejectReason, Request, Verdict,
};
pub use frame::{
    DATA_HEADER_LEN, DataHeader, FRAME_HEADER_LEN, FrameHeader, FrameKind, MAX_CONTROL_LEN,
    MAX_DATA_GROUPS, MAX_DATA_LEN,
};
pub use gossip::{HeldCapsule, MAX_CAPSULES, MAX_STATUS_LEN, PeerAddress, Status};

use thiserror::Error;

use crate::credential::{MAX_ADDRESS_LEN, MAX_ADDRESSES};

/// Version of the protocol; peers of another version refuse each other with a reason.
pub const PROTOCOL: u32 = 2;
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
    if value > bound {
        Err(WireError::TooLong { what, value, bound })
    } else {
        Ok(())
    }
}

fn decode_message<M: prost::Message + Default>(
    what: &'static str,
    bytes: &[u8],
    bound: usize,
) -> Result<M, WireError> {
    bounded(what, bytes.len(), bound)?;
    M::decode(bytes).map_err(|error| WireError::Malformed {
        what,
        why: error.to_string(),
    })
}

fn hash(what: &'static str, bytes: &[u8]) -> Result<crate::RootHash, WireError> {
    let bytes = bytes.try_into().map_err(|_| WireError::Invalid {
        what,
        why: "a hash is 32 bytes long",
    })?;
    Ok(crate::RootHash::from_bytes(bytes))
}

/// Checks text that people may come to see: a control character could rewrite their terminal.
fn text(what: &'static str, text: String, len: usize) -> Result<String, WireError> {
    bounded(what, text.len(), len)?;
    if text.chars().any(char::is_control) {
        return Err(WireError::Invalid {
            what,
            why: "the text has control characters",
        });
    }
    Ok(text)
}

fn texts(
    what: &'static str,
    texts: Vec<String>,
    count: usize,
    len: usize,
) -> Result<Vec<String>, WireError> {
    bounded(what, texts.len(), count)?;
    texts.into_iter().map(|one| text(what, one, len)).collect()
}

/// Text of our own, made to pass [`text`] at the other end.
fn cut(text: &str, len: usize) -> String {
    let mut kept: String = text.chars().filter(|c| !c.is_control()).collect();
    while kept.len() > len {
        kept.pop();
    }
    kept
}

/// The first addresses that pass [`texts`] at the other end.
fn addresses(addresses: &[String]) -> Vec<String> {
    let fits = |address: &&String| {
        address.len() <= MAX_ADDRESS_LEN && !address.chars().any(char::is_control)
    };
    addresses
        .iter()
        .filter(fits)
        .take(MAX_ADDRESSES)
        .cloned()
        .collect()
}
