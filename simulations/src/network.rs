//! Links: when what a node sends leaves it, and when it arrives.
//!
//! A response is cut into cells. A node sends one cell at a time, in turn to each peer that it has something for and
//! whose connection has window left (as TCP would). On its way a cell passes the links of the two sites, where these differ, and the
//! receiver's downlink, each of them first come, first served. Messages take their delay alone; their bytes are charged to the links.

use std::collections::VecDeque;
use std::ops::Range;

use capsule_swarm_core::RequestId;

use crate::node::Response;
use crate::plan::{Member, Plan, Site};

/// A cell is what its slowest link carries in this time, seconds: short against the queue that requests make at a provider, and
/// long enough that events are few. Responses of up to a cell and a quarter travel as a whole.
const CELL_SECONDS: f64 = 0.025;
/// Bounds of a cell.
const CELL: (u64, u64) = (16 << 10, 256 << 10);
/// Least window of a connection.
const WINDOW: u64 = 64 << 10;

/// Nanoseconds of virtual time.
pub type Nanos = u64;

/// Seconds as nanoseconds.
pub fn nanos(seconds: f64) -> Nanos {
    (seconds * 1e9) as Nanos
}

/// A part of a response on its way.
#[derive(Clone, Debug)]
pub struct Cell {
    /// The request.
    pub id: RequestId,
    /// The groups of the whole response.
    pub groups: Range<u64>,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Whether the response ends with it.
    pub last: bool,
    /// When it began to leave its sender.
    pub left: Nanos,
}

/// One direction of a connection. Ways come in pairs: that of number `w` leads back as `w ^ 1`.
#[derive(Debug)]
pub struct Way {
    /// Who sends.
    pub from: usize,
    /// Who receives.
    pub to: usize,
    /// The sites whose links it crosses: out of one, into the other.
    pub crosses: Option<(usize, usize)>,
    /// Time from one end to the other.
    pub delay: Nanos,
    /// Whether its receiver still has the connection.
    pub open: bool,
    /// Whether it has its turn at the sender's uplink.
    pub in_turn: bool,
    pub(crate) waiting: VecDeque<Response>,
    cell: u64,
    window: u64,
    in_network: u64,
    /// When the sender will learn of the arrival of so many bytes.
    acknowledged: VecDeque<(Nanos, u64)>,
}

impl Way {
    /// A way between two nodes of a plan.
    pub fn new(plan: &Plan, from: usize, to: usize) -> Self {
        let (a, b) = (&plan.members[from], &plan.members[to]);
        let crosses = match (a.site, b.site) {
            (Some(x), Some(y)) if x != y => Some((x, y)),
            _ => None,
        };
        let (mut delay, mut rate) = (a.link.delay + b.link.delay, a.link.up);
        if let Some((out, into)) = crosses {
            let (out, into) = (plan.sites[out].link, plan.sites[into].link);
            delay += out.delay + into.delay;
            rate = rate.min(out.up).min(into.down);
        }
        let cell = ((rate * CELL_SECONDS) as u64).clamp(CELL.0, CELL.1);
        let trip = 2.0 * delay.as_secs_f64();
        Self {
            from,
            to,
            crosses,
            delay: delay.as_nanos() as Nanos,
            open: true,
            in_turn: false,
            waiting: VecDeque::new(),
            cell,
            window: WINDOW.max(2 * cell).max((2.0 * trip * rate) as u64),
            in_network: 0,
            acknowledged: VecDeque::new(),
        }
    }

    /// The next cell, if there is one and the window allows it.
    pub fn next_cell(&mut self, now: Nanos) -> Option<Cell> {
        self.acknowledge(now);
        if self.in_network >= self.window {
            return None;
        }
        let response = self.waiting.front_mut()?;
        // A short rest does not wait for another turn.
        let left = response.wire - response.sent;
        let bytes = if left <= self.cell + self.cell / 4 {
            left
        } else {
            self.cell
        };
        response.sent += bytes;
        self.in_network += bytes;
        let cell = Cell {
            id: response.id,
            groups: response.groups.clone(),
            bytes,
            last: response.sent >= response.wire,
            left: now,
        };
        if cell.last {
            self.waiting.pop_front();
        }
        Some(cell)
    }

    /// The sender will learn then that a cell arrived.
    pub fn will_be_acknowledged(&mut self, at: Nanos, bytes: u64) {
        self.acknowledged.push_back((at, bytes));
    }

    /// When the window opens next; none while what fills it has not left yet.
    pub fn opens(&self) -> Option<Nanos> {
        self.acknowledged.front().map(|&(at, _)| at)
    }

    fn acknowledge(&mut self, now: Nanos) {
        while let Some(&(at, bytes)) = self.acknowledged.front()
            && at <= now
        {
            self.acknowledged.pop_front();
            self.in_network -= bytes;
        }
    }
}

/// A link that all who use it share, first come, first served.
#[derive(Clone, Debug)]
struct Stage {
    rate: f64,
    /// When what came so far has passed.
    free: Nanos,
}

impl Stage {
    fn new(rate: f64) -> Self {
        Self { rate, free: 0 }
    }

    /// What begins to come at `head` and ends at `tail` passes; returns when it begins and ends to come out.
    fn pass(&mut self, (head, tail): (Nanos, Nanos), bytes: u64) -> (Nanos, Nanos) {
        let begins = head.max(self.free);
        self.free = begins + nanos(bytes as f64 / self.rate);
        (begins, self.free.max(tail))
    }
}

/// The link of a site.
#[derive(Clone, Debug)]
struct Gate {
    out: Stage,
    into: Stage,
}

/// All links but uplinks, which are the senders' business, and what crossed those of sites.
#[derive(Clone, Debug)]
pub struct Network {
    down: Vec<Stage>,
    gates: Vec<Gate>,
    /// Bytes that left each site, and came into it.
    pub crossed: Vec<(u64, u64)>,
}

impl Network {
    /// The idle links of a plan.
    pub fn new(members: &[Member], sites: &[Site]) -> Self {
        let gate = |site: &Site| Gate {
            out: Stage::new(site.link.up),
            into: Stage::new(site.link.down),
        };
        Self {
            down: members.iter().map(|m| Stage::new(m.link.down)).collect(),
            gates: sites.iter().map(gate).collect(),
            crossed: vec![(0, 0); sites.len()],
        }
    }

    /// A cell has left its sender; returns when it will have arrived.
    pub fn carry(&mut self, now: Nanos, way: &Way, cell: &Cell) -> Nanos {
        let mut span = (cell.left, now);
        if let Some(sites) = way.crosses {
            span = self.cross(span, sites, cell.bytes);
        }
        self.down[way.to]
            .pass((span.0 + way.delay, span.1 + way.delay), cell.bytes)
            .1
    }

    /// A message left its sender.
    pub fn charge(&mut self, now: Nanos, way: &Way, bytes: u64) {
        if let Some(sites) = way.crosses {
            self.cross((now, now), sites, bytes);
        }
    }

    fn cross(
        &mut self,
        span: (Nanos, Nanos),
        (out, into): (usize, usize),
        bytes: u64,
    ) -> (Nanos, Nanos) {
        self.crossed[out].0 += bytes;
        self.crossed[into].1 += bytes;
        let span = self.gates[out].out.pass(span, bytes);
        self.gates[into].into.pass(span, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_slower_than_a_link_carries_is_not_delayed() {
        let mut link = Stage::new(1e9);
        assert_eq!(link.pass((0, 1000), 100), (0, 1000));
        // And leaves the rest of it to others.
        assert_eq!(link.pass((0, 1000), 100), (100, 1000));
    }

    #[test]
    fn what_comes_faster_queues() {
        let mut link = Stage::new(1e9);
        assert_eq!(link.pass((0, 10), 100), (0, 100));
        assert_eq!(link.pass((5, 10), 100), (100, 200));
        assert_eq!(link.pass((1000, 1010), 100), (1000, 1100));
    }
}
