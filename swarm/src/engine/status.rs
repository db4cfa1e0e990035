//! Status: what members say of themselves now and then, in short; and what comes by gossip at all.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use capsule_proto::CapsuleId;
use capsule_proto::credential::MachineId;
use capsule_proto::wire::{HeldCapsule, PeerAddress, Status};
use libp2p::PeerId;
use libp2p::gossipsub::{self, MessageAcceptance, MessageId};
use rand::RngExt;

use super::Engine;
use crate::address;
use crate::api::Event;
use crate::transport::peer_id_of;

/// Members whose newest status is remembered.
const MAX_MEMBERS: usize = 4096;
/// When the status is told again though nothing changed, and after a failure.
const STATUS_EVERY: Duration = Duration::from_secs(300);
const STATUS_RETRY: Duration = Duration::from_secs(3);
/// A status waits so long for further changes.
const STATUS_DELAY: Duration = Duration::from_millis(300);

/// What this node says of itself, and how new what others said is.
pub(super) struct Statuses {
    machine: MachineId,
    listening: Vec<SocketAddr>,
    capsules: Vec<HeldCapsule>,
    sequence: u64,
    due: Instant,
    heard: BTreeMap<MachineId, u64>,
}

impl Statuses {
    pub(super) fn new(machine: MachineId, listening: Vec<SocketAddr>) -> Self {
        Self {
            machine,
            listening,
            capsules: Vec::new(),
            sequence: 0,
            due: Instant::now() + STATUS_DELAY,
            heard: BTreeMap::new(),
        }
    }

    /// Where this node listens, for others to dial; an unspecified address means "as you see me".
    pub(super) fn own_address(&self, site: &str) -> Option<PeerAddress> {
        let text = |address: &SocketAddr| address::to_multiaddr(*address).to_string();
        let addresses: Vec<_> = self.listening.iter().map(text).collect();
        (!addresses.is_empty()).then_some(PeerAddress {
            machine: self.machine,
            addresses,
            site: site.to_owned(),
        })
    }
}

impl Engine {
    pub(super) fn set_capsules(&mut self, capsules: Vec<(CapsuleId, bool)>) {
        let held = |(id, complete)| HeldCapsule { id, complete };
        self.status.capsules = capsules.into_iter().map(held).collect();
        self.status.due = self.status.due.min(Instant::now() + STATUS_DELAY);
    }

    pub(super) fn tick_status(&mut self, now: Instant) {
        if now >= self.status.due {
            self.publish_status(now);
        }
    }

    fn publish_status(&mut self, now: Instant) {
        self.status.sequence = (self.status.sequence + 1).max((self.unix_time)());
        let reachable = |address: &&SocketAddr| !address.ip().is_unspecified();
        let text = |address: &SocketAddr| address::to_multiaddr(*address).to_string();
        let status = Status {
            machine: self.status.machine,
            sequence: self.status.sequence,
            capsules: self.status.capsules.clone(),
            addresses: self
                .status
                .listening
                .iter()
                .filter(reachable)
                .map(text)
                .collect(),
            name: self.machine_name.clone(),
            site: self.site.label().to_owned(),
        };
        let topic = self.topics.status.clone();
        let published = self
            .swarm
            .behaviour_mut()
            .gossip
            .publish(topic, status.encode());
        let jitter = self.connector.rng().random_range(0.7..1.3);
        self.status.due = match published {
            Ok(_) => now + STATUS_EVERY.mul_f64(jitter),
            Err(_) => now + STATUS_RETRY.mul_f64(jitter),
        };
    }

    pub(super) fn on_gossip(&mut self, event: gossipsub::Event) {
        let gossipsub::Event::Message {
            propagation_source: from,
            message_id,
            message,
        } = event
        else {
            return;
        };
        if message.topic == self.topics.records.hash() {
            self.on_record_gossiped(from, message_id, message.data);
        } else {
            let acceptance = self.on_status(message.source, &message.data);
            self.judge_message(from, &message_id, acceptance);
        }
    }

    /// Takes in another member's status.
    fn on_status(&mut self, source: Option<PeerId>, bytes: &[u8]) -> MessageAcceptance {
        let Ok(status) = Status::decode(bytes) else {
            return MessageAcceptance::Reject;
        };
        let Some(peer) = source.filter(|source| peer_id_of(&status.machine) == Some(*source))
        else {
            return MessageAcceptance::Reject;
        };
        let heard = &mut self.status.heard;
        if heard
            .get(&status.machine)
            .is_some_and(|newest| *newest >= status.sequence)
        {
            return MessageAcceptance::Ignore;
        }
        if heard.len() >= MAX_MEMBERS && !heard.contains_key(&status.machine) {
            heard.pop_first();
        }
        heard.insert(status.machine, status.sequence);
        let sockets = status
            .addresses
            .iter()
            .filter_map(|text| address::to_socket(&text.parse().ok()?));
        let usable: Vec<_> = sockets
            .filter(|address| !address.ip().is_loopback())
            .collect();
        self.connector
            .directory
            .add_peer(peer, &usable, &status.site);
        let capsules = status
            .capsules
            .iter()
            .map(|held| (held.id, held.complete))
            .collect();
        self.tell(Event::Status {
            peer,
            machine: status.machine,
            name: status.name,
            capsules,
        });
        MessageAcceptance::Accept
    }

    pub(super) fn judge_message(
        &mut self,
        from: PeerId,
        id: &MessageId,
        acceptance: MessageAcceptance,
    ) {
        let gossip = &mut self.swarm.behaviour_mut().gossip;
        let _expired = gossip.report_message_validation_result(id, &from, acceptance);
    }
}
