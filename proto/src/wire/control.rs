//! Control messages as domain types, and the two messages of the handshake.

use std::ops::Range;

use prost::Message;

use super::frame::{MAX_CONTROL_LEN, MAX_DATA_GROUPS};
use super::generated as pb;
use super::gossip::{PeerAddress, Status, machine};
use super::{MAX_GREETING_LEN, WireError, bounded, cut, decode_message, hash, text};
use crate::RootHash;
use crate::credential::{MAX_CREDENTIAL_LEN, MAX_MACHINE_NAME_LEN, MachineId};
use crate::ranges::{GROUP_LEN, GroupRanges, Height, MAX_CONTENT_LEN, group_count};
use crate::record::{MAX_RECORD_LEN, RecordId};

/// Most runs in one `Have` or `Drop`; more are told in several.
pub const MAX_RUNS_PER_HAVE: usize = 16_384;
/// Most runs in one `Gateway`.
pub const MAX_RUNS_PER_GATEWAY: usize = 1024;
/// Most record ids in one message.
pub const MAX_RECORD_IDS: usize = 16_384;
/// Most records in one message.
pub const MAX_RECORDS: usize = 256;
/// Most peers in one message of peer exchange.
pub const MAX_PEERS: usize = 64;
const MAX_TEXT: usize = 1024;

/// First message of each side of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// Version of the protocol.
    pub protocol: u32,
    /// The sender's credential, encoded.
    pub credential: Vec<u8>,
    /// The newest revocation record that the sender has, encoded.
    pub revocation: Option<Vec<u8>>,
    /// Newest signed time that the sender has seen: seconds since 1970.
    pub newest_time: u64,
    /// Program and version, for people.
    pub agent: String,
    /// Label of the sender's site, where configured.
    pub site: String,
}

/// Second message of each side: whether it takes the other in; else why not, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict(pub Result<(), String>);

/// A control message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// The sender holds more groups of a blob.
    Have {
        /// The blob.
        root: RootHash,
        /// Its length in bytes, as the sender believes.
        size: u64,
        /// The groups, beside those said before.
        groups: GroupRanges,
    },
    /// The sender no longer holds groups of a blob.
    Drop {
        /// The blob.
        root: RootHash,
        /// The groups; none: all of the blob, however many those are. An empty set takes nothing back.
        groups: Option<GroupRanges>,
    },
    /// The sender asks for groups.
    Request(Request),
    /// The sender no longer needs the answer to a request.
    Cancel {
        /// The request.
        id: u64,
    },
    /// The sender will not answer a request.
    Reject(Reject),
    /// What records the sender holds, in short.
    RecordSummary {
        /// How many.
        count: u64,
        /// Hash of their sorted ids.
        digest: RootHash,
    },
    /// Ids of records that the sender holds.
    RecordIds {
        /// Some of them.
        ids: Vec<RecordId>,
        /// Whether no more follow.
        last: bool,
    },
    /// Records that the sender asks for.
    RecordWant {
        /// Their ids.
        ids: Vec<RecordId>,
    },
    /// Signed records.
    Records {
        /// Their encodings.
        records: Vec<Vec<u8>>,
    },
    /// Members that the sender is connected to.
    Peers(Vec<PeerAddress>),
    /// Asks for a pong.
    Ping {
        /// To be repeated.
        nonce: u64,
    },
    /// Answers a ping.
    Pong {
        /// The ping's.
        nonce: u64,
    },
    /// Asks what the receiver holds of a blob: for a `Have`, or a `Drop` of all.
    SizeQuery {
        /// The blob.
        root: RootHash,
    },
    /// A machine of the sender's site fetches a blob from beyond the site.
    Gateway(Gateway),
    /// What the sender itself holds, in short: for who was not there when it was gossiped.
    Status(Status),
}

/// Word of a machine that fetches a blob from beyond its site, so that others of the site need not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateway {
    /// The blob.
    pub root: RootHash,
    /// The machine: the sender, or one whose word it passes on.
    pub machine: MachineId,
    /// Grows with each word of that machine.
    pub sequence: u64,
    /// What it is fetching, all of it: at most [`MAX_RUNS_PER_GATEWAY`] runs.
    pub groups: GroupRanges,
}

/// A request for a run of chunk groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Chosen by the requester, unique within the connection.
    pub id: u64,
    /// The blob.
    pub root: RootHash,
    /// Its length in bytes.
    pub size: u64,
    /// The groups: 1 to [`MAX_DATA_GROUPS`], all within the blob. One data frame answers them.
    pub groups: Range<u64>,
    /// Somebody waits for it: before everything else.
    pub demand: bool,
    /// Leaves may come zstd-compressed.
    pub compress: bool,
    /// Up to where the answer proves the groups: the requester has the hash of the node of that height above them.
    pub height: Height,
}

/// Word that a request will not be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reject {
    /// The request.
    pub id: u64,
    /// Why.
    pub reason: RejectReason,
}

/// Why a request is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RejectReason {
    /// The provider does not hold the groups, or not any more.
    NotHeld,
    /// The provider has too many requests already.
    Busy,
    /// The provider found its copy damaged.
    Damaged,
    /// The requester's cancel came in time.
    Cancelled,
}

impl Greeting {
    /// The message's bytes.
    pub fn encode(&self) -> Vec<u8> {
        pb::Greeting {
            protocol: self.protocol,
            credential: self.credential.clone(),
            revocation: self.revocation.clone().unwrap_or_default(),
            newest_time: self.newest_time,
            agent: cut(&self.agent, MAX_TEXT),
            site: cut(&self.site, MAX_MACHINE_NAME_LEN),
        }
        .encode_to_vec()
    }

    /// Parses and bounds the message; the credential itself is checked later.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let message: pb::Greeting = decode_message("greeting", bytes, MAX_GREETING_LEN)?;
        bounded("credential", message.credential.len(), MAX_CREDENTIAL_LEN)?;
        bounded("revocation", message.revocation.len(), MAX_RECORD_LEN)?;
        Ok(Self {
            protocol: message.protocol,
            credential: message.credential,
            revocation: Some(message.revocation).filter(|record| !record.is_empty()),
            newest_time: message.newest_time,
            agent: text("agent", message.agent, MAX_TEXT)?,
            site: text("site", message.site, MAX_MACHINE_NAME_LEN)?,
        })
    }
}

impl Verdict {
    /// The message's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let reason = self
            .0
            .as_ref()
            .err()
            .map(|reason| cut(reason, MAX_TEXT))
            .unwrap_or_default();
        pb::Verdict {
            accepted: self.0.is_ok(),
            reason,
        }
        .encode_to_vec()
    }

    /// Parses and bounds the message.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let message: pb::Verdict = decode_message("verdict", bytes, MAX_GREETING_LEN)?;
        let reason = text("reason", message.reason, MAX_TEXT)?;
        Ok(Self(if message.accepted {
            Ok(())
        } else {
            Err(reason)
        }))
    }
}

impl Control {
    /// The message's bytes. Sets of more than [`MAX_RUNS_PER_HAVE`] runs and lists beyond [`MAX_RECORD_IDS`],
    /// [`MAX_RECORDS`] or [`MAX_CONTROL_LEN`] bytes of records are the caller's to split. Peers without an address that may
    /// travel are left out, as are those beyond [`MAX_PEERS`].
    pub fn encode(&self) -> Vec<u8> {
        pb::Control {
            kind: Some(self.to_wire()),
        }
        .encode_to_vec()
    }

    /// Parses and bounds a message.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let message: pb::Control = decode_message("control message", bytes, MAX_CONTROL_LEN)?;
        let none = WireError::Invalid {
            what: "control message",
            why: "it is of no known kind: upgrade capsule",
        };
        message.kind.ok_or(none)?.try_into()
    }

    fn to_wire(&self) -> pb::control::Kind {
        use pb::control::Kind;
        let ids = |ids: &[RecordId]| ids.iter().map(|id| id.0.as_bytes().to_vec()).collect();
        match self {
            Self::Have { root, size, groups } => Kind::Have(pb::Have {
                root: root.as_bytes().to_vec(),
                size: *size,
                runs: runs_to_wire(groups),
            }),
            Self::Drop { root, groups } => Kind::Drop(pb::Drop {
                root: root.as_bytes().to_vec(),
                runs: groups.as_ref().map(runs_to_wire).unwrap_or_default(),
                all: groups.is_none(),
            }),
            Self::Request(request) => Kind::Request(pb::Request {
                id: request.id,
                root: request.root.as_bytes().to_vec(),
                size: request.size,
                first: request.groups.start,
                count: request.groups.end - request.groups.start,
                demand: request.demand,
                compress: request.compress,
                known: match request.height {
                    Height::ROOT => 0,
                    height => u32::from(height.get()) + 1,
                },
            }),
            Self::Cancel { id } => Kind::Cancel(pb::Cancel { id: *id }),
            Self::Reject(reject) => Kind::Reject(pb::Reject {
                id: reject.id,
                reason: reject.reason as u32,
            }),
            Self::RecordSummary { count, digest } => Kind::RecordSummary(pb::RecordSummary {
                count: *count,
                digest: digest.as_bytes().to_vec(),
            }),
            Self::RecordIds { ids: list, last } => Kind::RecordIds(pb::RecordIds {
                ids: ids(list),
                last: *last,
            }),
            Self::RecordWant { ids: list } => Kind::RecordWant(pb::RecordWant { ids: ids(list) }),
            Self::Records { records } => Kind::Records(pb::Records {
                records: records.clone(),
            }),
            Self::Peers(peers) => {
                let peers = peers
                    .iter()
                    .map(pb::PeerAddress::from)
                    .filter(|peer| !peer.addresses.is_empty());
                Kind::Peers(pb::Peers {
                    peers: peers.take(MAX_PEERS).collect(),
                })
            }
            Self::Ping { nonce } => Kind::Ping(pb::Ping { nonce: *nonce }),
            Self::Pong { nonce } => Kind::Pong(pb::Ping { nonce: *nonce }),
            Self::SizeQuery { root } => Kind::SizeQuery(pb::SizeQuery {
                root: root.as_bytes().to_vec(),
            }),
            Self::Gateway(gateway) => Kind::Gateway(pb::Gateway {
                root: gateway.root.as_bytes().to_vec(),
                machine: gateway.machine.0.to_vec(),
                sequence: gateway.sequence,
                runs: runs_to_wire(&gateway.groups),
            }),
            Self::Status(status) => Kind::Status(status.into()),
        }
    }
}

impl TryFrom<pb::control::Kind> for Control {
    type Error = WireError;

    fn try_from(kind: pb::control::Kind) -> Result<Self, WireError> {
        use pb::control::Kind;
        Ok(match kind {
            Kind::Have(have) => {
                let groups = runs_from_wire(&have.runs)?;
                let within = groups
                    .runs()
                    .last()
                    .is_none_or(|last| last.end <= group_count(have.size));
                if have.size > MAX_CONTENT_LEN || groups.is_empty() || !within {
                    return Err(WireError::Invalid {
                        what: "have",
                        why: "its groups lie within the blob, at least one",
                    });
                }
                Self::Have {
                    root: hash("have", &have.root)?,
                    size: have.size,
                    groups,
                }
            }
            Kind::Drop(drop) => {
                let groups = runs_from_wire(&drop.runs)?;
                if drop.all && !groups.is_empty() {
                    return Err(WireError::Invalid {
                        what: "drop",
                        why: "it names all groups or some, not both",
                    });
                }
                Self::Drop {
                    root: hash("drop", &drop.root)?,
                    groups: Some(groups).filter(|_| !drop.all),
                }
            }
            Kind::Request(request) => Self::Request(request.try_into()?),
            Kind::Cancel(cancel) => Self::Cancel { id: cancel.id },
            Kind::Reject(reject) => {
                let reason = match reject.reason {
                    0 => RejectReason::NotHeld,
                    1 => RejectReason::Busy,
                    2 => RejectReason::Damaged,
                    3 => RejectReason::Cancelled,
                    _ => {
                        return Err(WireError::Invalid {
                            what: "reject",
                            why: "reasons are 0 to 3",
                        });
                    }
                };
                Self::Reject(Reject {
                    id: reject.id,
                    reason,
                })
            }
            Kind::RecordSummary(summary) => Self::RecordSummary {
                count: summary.count,
                digest: hash("record summary", &summary.digest)?,
            },
            Kind::RecordIds(message) => Self::RecordIds {
                ids: ids_from_wire(message.ids)?,
                last: message.last,
            },
            Kind::RecordWant(message) => Self::RecordWant {
                ids: ids_from_wire(message.ids)?,
            },
            Kind::Records(message) => {
                bounded("records", message.records.len(), MAX_RECORDS)?;
                message
                    .records
                    .iter()
                    .try_for_each(|record| bounded("record", record.len(), MAX_RECORD_LEN))?;
                Self::Records {
                    records: message.records,
                }
            }
            Kind::Peers(message) => {
                bounded("peers", message.peers.len(), MAX_PEERS)?;
                Self::Peers(
                    message
                        .peers
                        .into_iter()
                        .map(TryInto::try_into)
                        .collect::<Result<_, _>>()?,
                )
            }
            Kind::Ping(ping) => Self::Ping { nonce: ping.nonce },
            Kind::Pong(pong) => Self::Pong { nonce: pong.nonce },
            Kind::SizeQuery(query) => Self::SizeQuery {
                root: hash("size query", &query.root)?,
            },
            Kind::Gateway(gateway) => {
                bounded("runs", gateway.runs.len(), 2 * MAX_RUNS_PER_GATEWAY)?;
                Self::Gateway(Gateway {
                    root: hash("gateway", &gateway.root)?,
                    machine: machine(&gateway.machine)?,
                    sequence: gateway.sequence,
                    groups: runs_from_wire(&gateway.runs)?,
                })
            }
            Kind::Status(status) => Self::Status(status.try_into()?),
        })
    }
}

impl TryFrom<pb::Request> for Request {
    type Error = WireError;

    fn try_from(request: pb::Request) -> Result<Self, WireError> {
        let groups = request.first..request.first.saturating_add(request.count);
        let long = request.count > MAX_DATA_GROUPS;
        if long
            || request.size > MAX_CONTENT_LEN
            || groups.is_empty()
            || groups.end > group_count(request.size)
        {
            return Err(WireError::Invalid {
                what: "request",
                why: "its groups lie within the blob, 1 to 64 of them",
            });
        }
        let height = match request.known.checked_sub(1) {
            None => Some(Height::ROOT),
            Some(height) => u8::try_from(height).ok().and_then(Height::new),
        };
        let Some(height) = height.filter(|height| height.spans(&groups)) else {
            return Err(WireError::Invalid {
                what: "request",
                why: "its groups lie below one node of the height that it names",
            });
        };
        let root = hash("request", &request.root)?;
        Ok(Self {
            id: request.id,
            root,
            size: request.size,
            groups,
            demand: request.demand,
            compress: request.compress,
            height,
        })
    }
}

fn ids_from_wire(ids: Vec<Vec<u8>>) -> Result<Vec<RecordId>, WireError> {
    bounded("record ids", ids.len(), MAX_RECORD_IDS)?;
    ids.iter()
        .map(|id| hash("record id", id).map(RecordId))
        .collect()
}

fn runs_to_wire(groups: &GroupRanges) -> Vec<u64> {
    let mut next = 0;
    let mut numbers = Vec::with_capacity(groups.runs().len() * 2);
    for run in groups.runs() {
        numbers.extend([run.start - next, run.end - run.start]);
        next = run.end;
    }
    numbers
}

fn runs_from_wire(numbers: &[u64]) -> Result<GroupRanges, WireError> {
    bounded("runs", numbers.len(), MAX_RUNS_PER_HAVE * 2)?;
    let invalid = |why| WireError::Invalid { what: "runs", why };
    if !numbers.len().is_multiple_of(2) {
        return Err(invalid("they are pairs of numbers"));
    }
    let bound = group_count(MAX_CONTENT_LEN);
    let mut next = 0u64;
    let mut runs = Vec::with_capacity(numbers.len() / 2);
    for pair in numbers.chunks_exact(2) {
        if pair[0] > bound || pair[1] > bound || next > bound {
            return Err(invalid("they lie within the largest content"));
        }
        let start = next + pair[0];
        next = start + pair[1];
        runs.push(start..next);
    }
    GroupRanges::from_runs(runs)
        .map_err(|_| invalid("they are sorted, not empty, and do not touch"))
}

const _: () = assert!(MAX_RUNS_PER_HAVE * 2 * 10 < MAX_CONTROL_LEN && GROUP_LEN == 16_384);
const _: () =
    assert!(MAX_RECORD_IDS * 34 < MAX_CONTROL_LEN && MAX_RECORD_LEN * 4 < MAX_CONTROL_LEN);
