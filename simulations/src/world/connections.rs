//! Connections of a run: who opens them to whom, and how they and nodes end.

use std::time::Duration;

use capsule_swarm_core::Class;
use rand::RngExt;

use super::{Event, World};
use crate::network::Way;
use crate::node::Message;

/// How long a node that lost connections waits before it opens others.
const RECONNECT: Duration = Duration::from_secs(1);
/// Connections beyond its site that a node wants.
const DEGREE_BEYOND: usize = 3;

impl World {
    /// Opens connections to others at random, until the node has as many as it wants; beyond its site only some, but the publisher in any
    /// case: daemons have its address from their token, and who fetches for its site looks for somebody who has all.
    pub(super) fn connect_some(&mut self, node: usize) {
        let n = self.lots.len();
        if !self.is_near(node, 0) && self.may_connect(node, 0) {
            self.connect(node, 0);
        }
        for drawn in 0..n {
            if self.nodes[node].neighbours.len() >= self.plan.degree {
                return;
            }
            let lot = self.rng.random_range(drawn..n);
            self.lots.swap(drawn, lot);
            let other = self.lots[drawn];
            if !self.is_near(node, other) {
                self.connect_beyond(node, other);
                continue;
            }
            if self.may_connect(node, other) {
                self.connect(node, other);
            }
        }
    }

    fn connect_beyond(&mut self, node: usize, other: usize) {
        let beyond = self.nodes[node].neighbours.iter();
        let has = beyond.filter(|n| !self.is_near(node, n.node)).count();
        if has < DEGREE_BEYOND && self.may_connect(node, other) {
            self.connect(node, other);
        }
    }

    /// Daemons know it by the addresses that they heard of.
    fn tell_whether_all_are_near(&mut self, node: usize) {
        let of_site = (0..self.nodes.len()).filter(|&other| self.is_near(node, other));
        let neighbours = &self.nodes[node].neighbours;
        let near = neighbours.iter().filter(|n| self.is_near(node, n.node));
        let all = of_site.count() <= near.count() + 1;
        self.nodes[node].downloads.pass_on_gateways(!all);
    }

    fn is_near(&self, a: usize, b: usize) -> bool {
        self.plan.members[a].site == self.plan.members[b].site
    }

    fn may_connect(&self, node: usize, other: usize) -> bool {
        let (a, b) = (&self.nodes[node], &self.nodes[other]);
        let known = other == node || a.neighbours.iter().any(|n| n.node == other);
        let banned = a.bans.contains(&other) || b.bans.contains(&node);
        !known && !banned && b.alive && b.neighbours.len() < self.plan.degree_max
    }

    fn connect(&mut self, a: usize, b: usize) {
        let connection = self.ways.len() as u64 >> 1;
        self.ways.push(Way::new(&self.plan, a, b));
        self.ways.push(Way::new(&self.plan, b, a));
        let class = if self.is_near(a, b) {
            Class::Within
        } else {
            Class::Beyond
        };
        self.nodes[a].connect(self.now, b, connection, class);
        self.nodes[b].connect(self.now, a, connection, class);
        for node in [a, b] {
            self.tell_whether_all_are_near(node);
        }
        self.wake(b);
    }

    /// Has a node polled that was connected to, and has something to tell the newcomer.
    fn wake(&mut self, node: usize) {
        if self.uplinks[node].timer.is_none_or(|at| at > self.now) {
            self.uplinks[node].timer = Some(self.now);
            self.events.push(self.clock, Event::Timer { node });
        }
    }

    /// A node ends a connection at once; the other learns of it.
    pub(super) fn cut(&mut self, node: usize, connection: u64) {
        self.nodes[node].disconnect(self.now, connection);
        let way = self.way(connection, node);
        self.close(way ^ 1);
        let gone = Event::Message {
            way,
            message: Message::Gone,
        };
        self.after(Duration::from_nanos(self.ways[way].delay), gone);
    }

    /// The receiver of a way has the connection no more, nor does it send anything the other way.
    pub(super) fn close(&mut self, way: usize) {
        let node = self.ways[way].to;
        self.ways[way].open = false;
        self.ways[way ^ 1].waiting.clear();
        let uplink = &mut self.uplinks[node];
        if !std::mem::replace(&mut uplink.connecting, true) {
            self.after(RECONNECT, Event::Connect { node });
        }
    }

    pub(super) fn kill(&mut self, node: usize) {
        // Whoever is done or not there is not killed.
        if !self.nodes[node].alive || self.nodes[node].finished.is_some() {
            return;
        }
        self.stop(node);
        if let Some(churn) = self.plan.churn {
            self.after(churn.away, Event::Start { node });
        }
    }

    pub(super) fn stop(&mut self, node: usize) {
        let connections: Vec<_> = self.nodes[node]
            .neighbours
            .iter()
            .map(|n| n.connection)
            .collect();
        connections
            .into_iter()
            .for_each(|connection| self.cut(node, connection));
        self.nodes[node].kill();
    }
}
