//! Status: what members say of themselves now and then, in short; and what comes by gossip at all.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use capsule_proto::CapsuleId;
use capsule_proto::credential::MachineId;
use capsule_proto::wire::{Control, HeldCapsule, PeerAddress, Status};
use capsule_swarm_core::PeerKey;
use libp2p::PeerId;
use libp2p::gossipsub::{self, MessageAcceptance, MessageId};
use rand::RngExt;

use super::Engine;
use crate::address;
use crate::api::Event;
use crate::transport::peer_id_of;

/// Members whose newest status is remembered.
const MAX_MEMBERS: usize = 4096;
/// When the status is gossiped again though nothing changed: after so long at least, and so long for each member, so that the fleet as a
/// whole does it every other minute. Newcomers are told by those that they are connected to.
const STATUS_EVERY: Duration = Duration::from_secs(300);
const STATUS_EVERY_MEMBER: Duration = Duration::from_secs(120);
/// At most so many members count for that.
const MAX_COUNTED: usize = 240;
/// The same after a failure.
const STATUS_RETRY: Duration = Duration::from_secs(3);
/// A status waits so long for further changes.
const STATUS_DELAY: Duration = Duration::from_millis(300);

/// What this node says of itself, and how new what others said is.
pub(super) struct Statuses {
    machine: MachineId,
    listening: Vec<SocketAddr>,
    capsules: Vec<HeldCapsule>,
    sequence: u64,
    /// When it was last gossiped, and by how much longer or shorter it takes until it is again.
    gossiped: Instant,
    jitter: f64,
    /// When it is told at the latest: something changed, or could not be told.
    due: Option<Instant>,
    heard: BTreeMap<MachineId, u64>,
}

impl Statuses {
    /// Who begins and holds nothing tells those that it is connected to, and nobody else soon: of hundreds of machines that are switched on
    /// together, everybody's word would cross every connection between sites.
    pub(super) fn new(machine: MachineId, listening: Vec<SocketAddr>, sequence: u64) -> Self {
        Self {
            machine,
            listening,
            capsules: Vec::new(),
            sequence,
            gossiped: Instant::now(),
            jitter: 1.0,
            due: None,
            heard: BTreeMap::new(),
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        let members = self.heard.len().min(MAX_COUNTED);
        let again = STATUS_EVERY_MEMBER.saturating_mul(members as u32);
        let again = self.gossiped + again.max(STATUS_EVERY).mul_f64(self.jitter);
        now >= self.due.map_or(again, |due| due.min(again))
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
        let capsules: Vec<_> = capsules.into_iter().map(held).collect();
        if capsules == self.status.capsules {
            return;
        }
        self.status.capsules = capsules;
        let soon = Instant::now() + STATUS_DELAY;
        self.status.due = Some(self.status.due.map_or(soon, |due| due.min(soon)));
    }

    pub(super) fn tick_status(&mut self, now: Instant) {
        if self.status.is_due(now) {
            self.gossip_status(now);
        }
    }

    fn gossip_status(&mut self, now: Instant) {
        self.status.sequence = (self.status.sequence + 1).max((self.unix_time)());
        let status = self.own_status().encode();
        let topic = self.topics.status.clone();
        let published = self.swarm.behaviour_mut().gossip.publish(topic, status);
        self.status.gossiped = now;
        self.status.jitter = self.connector.rng().random_range(0.7..1.3);
        let retry = STATUS_RETRY.mul_f64(self.status.jitter);
        self.status.due = published.is_err().then(|| now + retry);
    }

    fn own_status(&self) -> Status {
        let listening = self.status.listening.iter();
        let reachable = listening.filter(|address| !address.ip().is_unspecified());
        Status {
            machine: self.status.machine,
            sequence: self.status.sequence,
            capsules: self.status.capsules.clone(),
            addresses: reachable
                .map(|address| address::to_multiaddr(*address).to_string())
                .collect(),
            name: self.machine_name.clone(),
            site: self.site.label().to_owned(),
        }
    }

    /// Tells a newcomer who this is, and what it holds: what was gossiped before, it did not hear.
    pub(super) fn send_status(&mut self, key: PeerKey) {
        self.send(key, &Control::Status(self.own_status()));
    }

    /// A peer told its status, as it does once, on connecting.
    pub(super) fn on_status_told(&mut self, key: PeerKey, status: Status) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        if std::mem::replace(&mut peer.told_status, true) {
            return self.fault(key, "it told its status again");
        }
        let source = Some(peer.id);
        if matches!(self.on_status(source, status), MessageAcceptance::Reject) {
            self.fault(key, "it told the status of another machine");
        }
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
            let acceptance = match Status::decode(&message.data) {
                Ok(status) => self.on_status(message.source, status),
                Err(_) => MessageAcceptance::Reject,
            };
            self.judge_message(from, &message_id, acceptance);
        }
    }

    /// Takes in another member's status.
    fn on_status(&mut self, source: Option<PeerId>, status: Status) -> MessageAcceptance {
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
