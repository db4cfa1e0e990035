//! Events and links: who sends which cell when, and when it arrives.
//!
//! Each node sends one cell (16 KiB) at a time, in turn to each peer that it has something for and
//! whose connection has window left (as TCP would). Cells queue at the receiver's downlink. Messages
//! take their delay, and their bytes are charged to the sender's uplink.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::GroupRanges;
use capsule_swarm_core::{PeerKey, RequestId, Time};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use super::node::{Message, Node, Response};
use super::{Manner, Plan, Report};

const CELL: u64 = 16 << 10;
/// Least window of a connection.
const WINDOW: u64 = 64 << 10;

enum Event {
    Message {
        from: usize,
        to: usize,
        message: Message,
    },
    /// The sender's uplink is free again; the cell is on its way.
    Sent {
        from: usize,
        to: usize,
        response: Response,
        bytes: u64,
    },
    Arrived {
        from: usize,
        to: usize,
        response: Response,
        bytes: u64,
    },
    /// The sender learns that a cell arrived.
    Acknowledged {
        from: usize,
        to: usize,
        bytes: u64,
    },
    Drip {
        from: usize,
        to: usize,
        id: RequestId,
    },
    Timer {
        node: usize,
    },
}

pub struct World {
    plan: Plan,
    nodes: Vec<Node>,
    now: Time,
    heap: BinaryHeap<Reverse<(Time, u64, usize)>>,
    events: Vec<Option<Event>>,
    free: Vec<usize>,
    sequence: u64,
    sending: Vec<bool>,
    /// Whose turn it is at each uplink.
    turn: Vec<usize>,
    /// Bytes of messages to charge to each uplink.
    debt: Vec<u64>,
    down_free: Vec<Time>,
    timers: Vec<Option<Time>>,
    processor_free: Time,
    /// What the publisher has sent in full, and when that was all.
    copy_out: (GroupRanges, Option<Time>),
}

impl World {
    pub fn new(plan: Plan) -> Self {
        let root = RootHash::of(b"blob");
        let nodes: Vec<_> = plan
            .members
            .iter()
            .enumerate()
            .map(|(i, &m)| Node::new(i, m, root, plan.size, plan.seed))
            .collect();
        let n = nodes.len();
        let mut world = Self {
            plan,
            nodes,
            now: Time::ZERO,
            heap: BinaryHeap::new(),
            events: Vec::new(),
            free: Vec::new(),
            sequence: 0,
            sending: vec![false; n],
            turn: vec![0; n],
            debt: vec![0; n],
            down_free: vec![Time::ZERO; n],
            timers: vec![None; n],
            processor_free: Time::ZERO,
            copy_out: (GroupRanges::new(), None),
        };
        world.connect_all();
        (0..n).for_each(|i| world.poke(i));
        world
    }

    fn connect_all(&mut self) {
        let n = self.nodes.len();
        let mut rng = SmallRng::seed_from_u64(self.plan.seed);
        for a in 0..n {
            let mut others: Vec<_> = (0..n).filter(|&b| b != a).collect();
            others.shuffle(&mut rng);
            for b in others.into_iter().take(self.plan.degree) {
                if !self.nodes[a].flows.contains_key(&b) {
                    self.nodes[a].connect(Time::ZERO, b);
                    self.nodes[b].connect(Time::ZERO, a);
                }
            }
        }
    }

    pub fn run(mut self) -> Report {
        let end = Time::ZERO + self.plan.give_up;
        while let Some(Reverse((at, _, slot))) = self.heap.pop() {
            let Some(event) = self.events[slot].take() else {
                continue;
            };
            self.free.push(slot);
            self.now = at;
            if at > end || self.all_done() {
                break;
            }
            self.carry_out(event);
        }
        self.report()
    }

    fn pullers(&self) -> impl Iterator<Item = &Node> {
        self.nodes
            .iter()
            .filter(|node| node.member.manner == Manner::Honest && !node.member.seeds)
    }

    fn all_done(&self) -> bool {
        self.pullers().all(|node| node.finished.is_some())
    }

    fn carry_out(&mut self, event: Event) {
        match event {
            Event::Message { from, to, message } => {
                if self.nodes[to].member.manner == Manner::Drips
                    && let Message::Request { id, .. } = &message
                {
                    self.schedule(
                        Duration::from_secs(1),
                        Event::Drip {
                            from: to,
                            to: from,
                            id: *id,
                        },
                    );
                }
                self.nodes[to].handle(self.now, from, message);
                self.poke(to);
            }
            Event::Sent {
                from,
                to,
                response,
                bytes,
            } => {
                self.sending[from] = false;
                self.sent(from, to, response, bytes);
                self.poke(from);
            }
            Event::Arrived {
                from,
                to,
                response,
                bytes,
            } => {
                let manner = self.nodes[from].member.manner;
                let done = response.sent >= response.wire;
                self.nodes[to].handle_cell(self.now, from, &response, bytes, manner);
                let back = self.delay(from, to);
                self.schedule(back, Event::Acknowledged { from, to, bytes });
                self.poke(to);
                if done {
                    self.maybe_kill_publisher();
                }
            }
            Event::Acknowledged { from, to, bytes } => {
                if let Some(flow) = self.nodes[from].flows.get_mut(&to) {
                    flow.in_network -= bytes.min(flow.in_network);
                }
                self.transmit(from);
            }
            Event::Drip { from, to, id } => {
                if self.nodes[to].flows.contains_key(&from) {
                    self.nodes[to]
                        .downloads
                        .handle_progress(self.now, PeerKey(from as u64), id, 1);
                    self.poke(to);
                    self.schedule(Duration::from_secs(1), Event::Drip { from, to, id });
                }
            }
            // One that was replaced by an earlier one is void.
            Event::Timer { node } if self.timers[node] == Some(self.now) => {
                self.timers[node] = None;
                self.poke(node);
            }
            Event::Timer { .. } => {}
        }
    }

    /// A cell left the uplink.
    fn sent(&mut self, from: usize, to: usize, response: Response, bytes: u64) {
        let peer = PeerKey(to as u64);
        self.nodes[from]
            .uploads
            .handle_sent(self.now, peer, response.id, bytes);
        if response.sent >= response.wire {
            self.nodes[from]
                .uploads
                .handle_finished(self.now, peer, response.id, true);
            self.nodes[from].served += response.content;
            if from == 0 {
                self.copy_out.0.insert(response.groups.clone());
                if self
                    .copy_out
                    .0
                    .contains_run(&(0..self.nodes[0].geometry.groups()))
                {
                    self.copy_out.1.get_or_insert(self.now);
                }
            }
        }
        let link = self.nodes[to].member.link;
        let arrives = self.now + self.delay(from, to);
        let begins = arrives.max(self.down_free[to]);
        self.down_free[to] = begins + Duration::from_secs_f64(bytes as f64 / link.down);
        let wait = self.down_free[to].since(self.now);
        self.schedule(
            wait,
            Event::Arrived {
                from,
                to,
                response,
                bytes,
            },
        );
    }

    /// Lets a node do what it wants to, and starts its uplink.
    fn poke(&mut self, node: usize) {
        if !self.nodes[node].alive {
            return;
        }
        for other in self.nodes[node].poll(self.now) {
            self.nodes[node].disconnect(self.now, other);
            self.nodes[other].disconnect(self.now, node);
            self.poke(node);
        }
        for (to, message) in std::mem::take(&mut self.nodes[node].outbox) {
            self.nodes[node].control += message.bytes();
            self.debt[node] += message.bytes();
            let delay = self.delay(node, to);
            self.schedule(
                delay,
                Event::Message {
                    from: node,
                    to,
                    message,
                },
            );
        }
        self.transmit(node);
        if let Some(at) = self.nodes[node].timeout()
            && self.timers[node].is_none_or(|other| at < other)
        {
            self.timers[node] = Some(at);
            self.schedule(at.since(self.now), Event::Timer { node });
        }
    }

    /// Sends the next cell of a node, if its uplink is free.
    fn transmit(&mut self, from: usize) {
        if self.sending[from] || !self.nodes[from].alive {
            return;
        }
        let Some(to) = self.next_flow(from) else {
            return;
        };
        self.turn[from] = to + 1;
        let link = self.nodes[from].member.link;
        let Some(flow) = self.nodes[from].flows.get_mut(&to) else {
            return;
        };
        let Some(response) = flow.waiting.front_mut() else {
            return;
        };
        // A short rest does not wait for another turn.
        let left = response.wire - response.sent;
        let bytes = if left < CELL + CELL / 4 { left } else { CELL };
        response.sent += bytes;
        flow.in_network += bytes;
        let response = response.clone();
        if response.sent >= response.wire {
            flow.waiting.pop_front();
        }
        let bytes_charged = bytes + std::mem::take(&mut self.debt[from]);
        let mut begins = self.now;
        let mut takes = Duration::from_secs_f64(bytes_charged as f64 / link.up);
        if let Some(rate) = self.plan.processors {
            begins = begins.max(self.processor_free);
            takes = takes.max(Duration::from_secs_f64(bytes_charged as f64 / rate));
            self.processor_free = begins + takes;
        }
        self.sending[from] = true;
        self.schedule(
            (begins + takes).since(self.now),
            Event::Sent {
                from,
                to,
                response,
                bytes,
            },
        );
    }

    /// The next peer, in turn, that a node can send a cell to.
    fn next_flow(&self, from: usize) -> Option<usize> {
        let node = &self.nodes[from];
        let open = |&(&to, flow): &(&usize, &super::node::Flow)| {
            let trip = 2.0 * self.delay(from, to).as_secs_f64();
            let window = WINDOW.max((2.0 * trip * node.member.link.up) as u64);
            !flow.waiting.is_empty() && flow.in_network < window
        };
        let after = node.flows.range(self.turn[from]..).find(open);
        after
            .or_else(|| node.flows.iter().find(open))
            .map(|(&to, _)| to)
    }

    fn maybe_kill_publisher(&mut self) {
        if !self.plan.publisher_dies || !self.nodes[0].alive {
            return;
        }
        let groups = self.nodes[0].geometry.groups();
        let mut union = GroupRanges::new();
        for node in self.pullers() {
            node.downloads
                .held(&node.root)
                .into_iter()
                .for_each(|held| union.union_with(held));
        }
        if union.contains_run(&(0..groups)) {
            self.nodes[0].alive = false;
            for to in 1..self.nodes.len() {
                self.schedule(
                    Duration::from_millis(1),
                    Event::Message {
                        from: 0,
                        to,
                        message: Message::Gone,
                    },
                );
            }
        }
    }

    fn delay(&self, a: usize, b: usize) -> Duration {
        self.nodes[a].member.link.delay + self.nodes[b].member.link.delay
    }

    fn schedule(&mut self, wait: Duration, event: Event) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[slot] = Some(event);
        self.sequence += 1;
        self.heap
            .push(Reverse((self.now + wait, self.sequence, slot)));
    }

    fn report(&self) -> Report {
        let mut finished: Vec<_> = self
            .pullers()
            .filter_map(|node| node.finished)
            .map(|at| at.since_start().as_secs_f64())
            .collect();
        finished.sort_unstable_by(f64::total_cmp);
        let received: u64 = self.pullers().map(|node| node.received).sum();
        let held: u64 = self
            .pullers()
            .filter_map(|node| node.downloads.blob_stats(&node.root))
            .map(|s| s.held)
            .sum();
        let control: u64 = self.nodes.iter().map(|node| node.control).sum();
        let bans = |node: &Node| {
            node.bans
                .iter()
                .map(|&whom| (node.me, whom))
                .collect::<Vec<_>>()
        };
        Report {
            seed: self.plan.seed,
            unfinished: self.pullers().count() - finished.len(),
            finished,
            bound: self.plan.bound(),
            publisher_copies: self.nodes[0].served as f64 / self.plan.size as f64,
            duplicates: (received - held) as f64 / received as f64,
            control: control as f64 / received as f64,
            bans: self.nodes.iter().flat_map(bans).collect(),
            copy_out: self
                .copy_out
                .1
                .map_or(f64::INFINITY, |at| at.since_start().as_secs_f64()),
            requests: self.pullers().map(|node| node.requests).sum(),
            events: self.sequence,
        }
    }
}
