//! A run: nodes that come, go, connect and talk, event by event, in virtual time.

mod connections;

use std::collections::VecDeque;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::GroupRanges;
use capsule_swarm_core::{RequestId, Time};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::checks::Violation;
use crate::network::{Cell, Nanos, Network, Way, nanos};
use crate::node::{Message, Node};
use crate::plan::{Manner, Plan};
use crate::queue::Queue;
use crate::report::{Curves, Report};

enum Event {
    Message {
        way: usize,
        message: Message,
    },
    /// The sender's uplink is free again; the cell is on its way.
    Sent {
        way: usize,
        cell: Cell,
    },
    Arrived {
        way: usize,
        cell: Cell,
    },
    /// A window may be open again.
    Retry {
        node: usize,
    },
    Drip {
        way: usize,
        id: RequestId,
    },
    Timer {
        node: usize,
    },
    Start {
        node: usize,
    },
    Kill {
        node: usize,
    },
    Connect {
        node: usize,
    },
    Sample,
}

/// A node's uplink.
#[derive(Debug, Default)]
struct Uplink {
    sending: bool,
    /// The ways that have something to send, in turn.
    turn: VecDeque<usize>,
    /// Bytes of messages to charge.
    debt: u64,
    retry: Option<Nanos>,
    timer: Option<Time>,
    /// Whether it is about to open connections.
    connecting: bool,
}

/// A run in progress.
pub struct World {
    pub(crate) plan: Plan,
    /// The nodes, by their number. A test may spoil one to see that it is noticed.
    pub nodes: Vec<Node>,
    pub(crate) now: Time,
    clock: Nanos,
    events: Queue<Event>,
    pub(crate) carried_out: u64,
    uplinks: Vec<Uplink>,
    ways: Vec<Way>,
    network: Network,
    processor_free: Nanos,
    rng: SmallRng,
    /// The nodes, in the order in which they were last drawn.
    lots: Vec<usize>,
    unfinished: usize,
    /// What the publisher has sent in full, and when that was all.
    copy_out: (GroupRanges, Option<Time>),
    /// What honest pullers hold between them.
    spread: GroupRanges,
    curves: Curves,
    pub(crate) violation: Option<Violation>,
}

impl World {
    /// Everybody who is there from the start, connected.
    pub fn new(plan: Plan) -> Self {
        let root = RootHash::of(b"blob");
        let nodes: Vec<_> = plan
            .members
            .iter()
            .enumerate()
            .map(|(i, &member)| Node::new(i, member, root, plan.size, plan.seed))
            .collect();
        let n = nodes.len();
        let mut world = Self {
            network: Network::new(&plan.members, &plan.sites),
            unfinished: nodes.iter().filter(|node| node.member.pulls()).count(),
            nodes,
            now: Time::ZERO,
            clock: 0,
            events: Queue::default(),
            carried_out: 0,
            uplinks: (0..n).map(|_| Uplink::default()).collect(),
            ways: Vec::new(),
            processor_free: 0,
            rng: SmallRng::seed_from_u64(plan.seed),
            lots: (0..n).collect(),
            copy_out: (GroupRanges::new(), None),
            spread: GroupRanges::new(),
            curves: Curves::new(plan.bound()),
            violation: None,
            plan,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        let (there, later): (Vec<_>, Vec<_>) =
            (0..self.nodes.len()).partition(|&i| self.plan.members[i].joins.is_zero());
        there
            .iter()
            .for_each(|&node| self.nodes[node].start(Time::ZERO));
        there.iter().for_each(|&node| self.connect_some(node));
        there.iter().for_each(|&node| self.poke(node));
        for node in later {
            let at = self.plan.members[node].joins.as_nanos() as Nanos;
            self.events.push(at, Event::Start { node });
        }
        if let Some(churn) = self.plan.churn {
            let pullers: Vec<_> = (0..self.nodes.len())
                .filter(|&i| self.plan.members[i].pulls())
                .collect();
            let count = (pullers.len() as f64 * churn.fraction).round() as usize;
            for at in rand::seq::index::sample(&mut self.rng, pullers.len(), count) {
                let span = churn.until.saturating_sub(churn.from).as_secs_f64();
                let when = churn.from.as_secs_f64() + span * self.rng.random::<f64>();
                let node = pullers[at];
                self.events.push(nanos(when), Event::Kill { node });
            }
        }
        self.events.push(self.curves.period(), Event::Sample);
    }

    /// Runs to the end: all honest pullers are complete, or time is up.
    pub fn run(mut self) -> Result<Report, Violation> {
        while self.step()? {}
        self.check_progress();
        match self.violation.take() {
            Some(violation) => Err(violation),
            None => Ok(self.report()),
        }
    }

    /// Carries out one event. False at the end.
    pub fn step(&mut self) -> Result<bool, Violation> {
        if let Some(violation) = &self.violation {
            return Err(violation.clone());
        }
        if self.unfinished == 0 {
            return Ok(false);
        }
        let Some((at, event)) = self.events.pop() else {
            return Ok(false);
        };
        let now = Time::from_start(Duration::from_nanos(at));
        if now.since_start() > self.plan.give_up {
            return Ok(false);
        }
        (self.clock, self.now) = (at, now);
        self.carried_out += 1;
        self.carry_out(event);
        Ok(true)
    }

    /// Part of the wanted bytes that is there: for those who watch.
    pub fn progress(&self) -> f64 {
        let pullers = self.nodes.iter().filter(|node| node.member.pulls());
        let (count, held) = pullers.fold((0, 0), |(count, held), node| {
            (count + 1, held + node.received - node.duplicate)
        });
        held as f64 / (self.plan.size as f64 * f64::from(count.max(1)))
    }

    fn carry_out(&mut self, event: Event) {
        match event {
            Event::Message { way, message } => self.message(way, message),
            Event::Sent { way, cell } => self.sent(way, cell),
            Event::Arrived { way, cell } => self.arrived(way, cell),
            Event::Retry { node } => {
                // One that was replaced by an earlier one does no harm.
                self.uplinks[node].retry = None;
                self.transmit(node);
            }
            Event::Drip { way, id } => {
                let (node, other) = (self.ways[way].to, self.ways[way].from);
                if self.ways[way].open && self.nodes[other].alive {
                    self.nodes[node].handle_part(self.now, way as u64 >> 1, id, 1);
                    self.poke(node);
                    self.after(Duration::from_secs(1), Event::Drip { way, id });
                }
            }
            // One that was replaced by an earlier one is void.
            Event::Timer { node } if self.uplinks[node].timer == Some(self.now) => {
                self.uplinks[node].timer = None;
                self.poke(node);
            }
            Event::Timer { .. } => {}
            Event::Start { node } => {
                self.nodes[node].start(self.now);
                self.connect_some(node);
                self.poke(node);
            }
            Event::Kill { node } => self.kill(node),
            Event::Connect { node } => {
                self.uplinks[node].connecting = false;
                if self.nodes[node].alive {
                    self.connect_some(node);
                    self.poke(node);
                }
            }
            Event::Sample => self.sample(),
        }
    }

    fn message(&mut self, way: usize, message: Message) {
        if !self.ways[way].open {
            return;
        }
        let to = self.ways[way].to;
        match &message {
            Message::Request { id, .. } if self.nodes[to].member.manner == Manner::Drips => {
                let drip = Event::Drip {
                    way: way ^ 1,
                    id: *id,
                };
                self.after(Duration::from_secs(1), drip);
            }
            Message::Gone => self.close(way),
            _ => {}
        }
        self.nodes[to].handle(self.now, way as u64 >> 1, message);
        self.poke(to);
    }

    /// A cell left the uplink.
    fn sent(&mut self, way: usize, cell: Cell) {
        let Way { from, delay, .. } = self.ways[way];
        self.uplinks[from].sending = false;
        if self.nodes[from].alive {
            self.account(way, from, &cell);
        }
        let arrives = self.network.carry(self.clock, &self.ways[way], &cell);
        self.ways[way].will_be_acknowledged(arrives + delay, cell.bytes);
        self.events.push(arrives, Event::Arrived { way, cell });
        self.poke(from);
    }

    fn account(&mut self, way: usize, from: usize, cell: &Cell) {
        let (node, now) = (&mut self.nodes[from], self.now);
        let peer = capsule_swarm_core::PeerKey(way as u64 >> 1);
        node.uploads.handle_sent(now, peer, cell.id, cell.bytes);
        if !cell.last {
            return;
        }
        node.uploads.handle_finished(now, peer, cell.id, true);
        node.served += node.geometry.bytes(&cell.groups);
        if from == 0 && self.copy_out.1.is_none() {
            self.copy_out.0.insert(cell.groups.clone());
            let whole = 0..node.geometry.groups();
            if self.copy_out.0.contains_run(&whole) {
                self.copy_out.1 = Some(now);
            }
        }
    }

    fn arrived(&mut self, way: usize, cell: Cell) {
        let Way { from, to, open, .. } = self.ways[way];
        if !open {
            return;
        }
        let connection = way as u64 >> 1;
        if cell.last {
            let spoilt = self.nodes[from].member.manner == Manner::Corrupts;
            self.nodes[to].handle_last(self.now, connection, cell.id, &cell.groups, spoilt);
            if self.plan.publisher_dies && !spoilt {
                self.spread.insert(cell.groups);
            }
        } else {
            self.nodes[to].handle_part(self.now, connection, cell.id, cell.bytes);
        }
        self.poke(to);
        let whole = 0..self.nodes[0].geometry.groups();
        if self.plan.publisher_dies && self.nodes[0].alive && self.spread.contains_run(&whole) {
            self.stop(0);
        }
    }

    /// Lets a node do what it wants to, and starts its uplink.
    fn poke(&mut self, node: usize) {
        if !self.nodes[node].alive {
            return;
        }
        let was_done = self.nodes[node].finished.is_some();
        loop {
            let cut = self.nodes[node].poll(self.now);
            if cut.is_empty() {
                break;
            }
            for connection in cut {
                self.cut(node, connection);
            }
        }
        if !was_done && self.nodes[node].finished.is_some() {
            self.unfinished -= 1;
        }
        self.check_node(node);
        self.post(node);
        self.transmit(node);
        if let Some(at) = self.nodes[node].timeout()
            && self.uplinks[node].timer.is_none_or(|other| at < other)
        {
            let at = at.max(self.now);
            self.uplinks[node].timer = Some(at);
            self.events
                .push(at.since_start().as_nanos() as Nanos, Event::Timer { node });
        }
    }

    /// Puts on their way the messages and responses of a node.
    fn post(&mut self, node: usize) {
        let mut outbox = std::mem::take(&mut self.nodes[node].outbox);
        for (connection, message) in outbox.drain(..) {
            let way = self.way(connection, node);
            // What was meant for one who is gone.
            if !self.ways[way ^ 1].open {
                continue;
            }
            let bytes = message.bytes();
            self.nodes[node].control += bytes;
            self.uplinks[node].debt += bytes;
            self.network.charge(self.clock, &self.ways[way], bytes);
            let at = self.clock + self.ways[way].delay;
            self.events.push(at, Event::Message { way, message });
        }
        self.nodes[node].outbox = outbox;
        let mut responses = std::mem::take(&mut self.nodes[node].responses);
        for (connection, response) in responses.drain(..) {
            let at = self.way(connection, node);
            if !self.ways[at ^ 1].open {
                continue;
            }
            let way = &mut self.ways[at];
            way.waiting.push_back(response);
            if !std::mem::replace(&mut way.in_turn, true) {
                self.uplinks[node].turn.push_back(at);
            }
        }
        self.nodes[node].responses = responses;
    }

    /// The way of a connection that leads away from a node.
    fn way(&self, connection: u64, from: usize) -> usize {
        let first = (connection as usize) << 1;
        first + usize::from(self.ways[first].from != from)
    }

    /// Sends the next cell of a node, if its uplink is free.
    fn transmit(&mut self, node: usize) {
        if self.uplinks[node].sending || !self.nodes[node].alive {
            return;
        }
        let mut opens: Option<Nanos> = None;
        for _ in 0..self.uplinks[node].turn.len() {
            let Some(at) = self.uplinks[node].turn.pop_front() else {
                break;
            };
            let way = &mut self.ways[at];
            let cell = way.next_cell(self.clock);
            way.in_turn = !way.waiting.is_empty();
            if way.in_turn {
                self.uplinks[node].turn.push_back(at);
            }
            if let Some(cell) = cell {
                return self.send(node, at, cell);
            }
            if let Some(other) = self.ways[at].opens() {
                opens = Some(opens.map_or(other, |opens| opens.min(other)));
            }
        }
        if let Some(at) = opens
            && self.uplinks[node].retry.is_none_or(|other| at < other)
        {
            self.uplinks[node].retry = Some(at);
            self.events.push(at, Event::Retry { node });
        }
    }

    fn send(&mut self, node: usize, way: usize, cell: Cell) {
        let uplink = &mut self.uplinks[node];
        uplink.sending = true;
        let bytes = (cell.bytes + std::mem::take(&mut uplink.debt)) as f64;
        let mut begins = self.clock;
        let mut takes = bytes / self.plan.members[node].link.up;
        if let Some(rate) = self.plan.processors {
            begins = begins.max(self.processor_free);
            takes = takes.max(bytes / rate);
            self.processor_free = begins + nanos(takes);
        }
        let at = begins + nanos(takes);
        self.events.push(at, Event::Sent { way, cell });
    }

    fn after(&mut self, wait: Duration, event: Event) {
        self.events
            .push(self.clock + wait.as_nanos() as Nanos, event);
    }

    fn sample(&mut self) {
        self.check_progress();
        self.curves.sample(
            self.clock,
            &self.nodes,
            &self.network.crossed,
            self.plan.size,
        );
        self.events
            .push(self.clock + self.curves.period(), Event::Sample);
    }

    fn report(mut self) -> Report {
        self.curves.sample(
            self.clock,
            &self.nodes,
            &self.network.crossed,
            self.plan.size,
        );
        let copy_out = self
            .copy_out
            .1
            .map_or(f64::INFINITY, |at| at.since_start().as_secs_f64());
        Report::new(
            &self.plan,
            &self.nodes,
            copy_out,
            &self.network.crossed,
            self.carried_out,
            self.curves,
        )
    }
}
