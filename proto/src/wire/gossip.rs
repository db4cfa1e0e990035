//! What members tell the whole fleet now and then, and the addresses they pass on.

use prost::Message;

use super::generated as pb;
use super::{WireError, addresses, bounded, cut, decode_message, hash, text, texts};
use crate::credential::{MAX_ADDRESS_LEN, MAX_ADDRESSES, MAX_MACHINE_NAME_LEN, MachineId};
use crate::hash::CapsuleId;

/// Longest status, in bytes.
pub const MAX_STATUS_LEN: usize = 32 << 10;
/// Most capsules in a status: the newest are told.
pub const MAX_CAPSULES: usize = 512;

/// What a member holds, in short, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The member.
    pub machine: MachineId,
    /// Orders the statuses of one member: the highest counts.
    pub sequence: u64,
    /// Capsules that it holds, wholly or in part.
    pub capsules: Vec<HeldCapsule>,
    /// Where it listens: multiaddr texts.
    pub addresses: Vec<String>,
    /// Its name, for people.
    pub name: String,
    /// Its site, where configured.
    pub site: String,
}

/// A capsule that a member holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldCapsule {
    /// The capsule.
    pub id: CapsuleId,
    /// Whether all of it is there.
    pub complete: bool,
}

/// Where a member listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// The member.
    pub machine: MachineId,
    /// Multiaddr texts, at least one.
    pub addresses: Vec<String>,
    /// Label of its site, where known.
    pub site: String,
}

impl Status {
    /// The message's bytes; capsules beyond [`MAX_CAPSULES`] and addresses beyond their bounds are left out, texts are cut.
    pub fn encode(&self) -> Vec<u8> {
        pb::Status::from(self).encode_to_vec()
    }

    /// Parses and bounds the message. That the member itself sent it is for the receiver to check.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let message: pb::Status = decode_message("status", bytes, MAX_STATUS_LEN)?;
        message.try_into()
    }
}

impl From<&Status> for pb::Status {
    fn from(status: &Status) -> Self {
        let capsule = |held: &HeldCapsule| pb::HeldCapsule {
            id: held.id.0.as_bytes().to_vec(),
            complete: held.complete,
        };
        Self {
            machine: status.machine.0.to_vec(),
            sequence: status.sequence,
            capsules: status
                .capsules
                .iter()
                .take(MAX_CAPSULES)
                .map(capsule)
                .collect(),
            addresses: addresses(&status.addresses),
            name: cut(&status.name, MAX_MACHINE_NAME_LEN),
            site: cut(&status.site, MAX_MACHINE_NAME_LEN),
        }
    }
}

impl TryFrom<pb::Status> for Status {
    type Error = WireError;

    fn try_from(message: pb::Status) -> Result<Self, WireError> {
        bounded("capsules", message.capsules.len(), MAX_CAPSULES)?;
        let capsule = |held: pb::HeldCapsule| {
            Ok(HeldCapsule {
                id: CapsuleId(hash("held capsule", &held.id)?),
                complete: held.complete,
            })
        };
        Ok(Self {
            machine: machine(&message.machine)?,
            sequence: message.sequence,
            capsules: message
                .capsules
                .into_iter()
                .map(capsule)
                .collect::<Result<_, _>>()?,
            addresses: texts(
                "addresses",
                message.addresses,
                MAX_ADDRESSES,
                MAX_ADDRESS_LEN,
            )?,
            name: text("name", message.name, MAX_MACHINE_NAME_LEN)?,
            site: text("site", message.site, MAX_MACHINE_NAME_LEN)?,
        })
    }
}

impl From<&PeerAddress> for pb::PeerAddress {
    fn from(peer: &PeerAddress) -> Self {
        Self {
            machine: peer.machine.0.to_vec(),
            addresses: addresses(&peer.addresses),
            site: cut(&peer.site, MAX_MACHINE_NAME_LEN),
        }
    }
}

impl TryFrom<pb::PeerAddress> for PeerAddress {
    type Error = WireError;

    fn try_from(peer: pb::PeerAddress) -> Result<Self, WireError> {
        let addresses = texts("addresses", peer.addresses, MAX_ADDRESSES, MAX_ADDRESS_LEN)?;
        if addresses.is_empty() {
            return Err(WireError::Invalid {
                what: "peer",
                why: "it has an address",
            });
        }
        Ok(Self {
            machine: machine(&peer.machine)?,
            addresses,
            site: text("site", peer.site, MAX_MACHINE_NAME_LEN)?,
        })
    }
}

pub(super) fn machine(bytes: &[u8]) -> Result<MachineId, WireError> {
    let bytes = bytes.try_into().map_err(|_| WireError::Invalid {
        what: "machine",
        why: "a machine's id is 32 bytes long",
    })?;
    Ok(MachineId(bytes))
}
