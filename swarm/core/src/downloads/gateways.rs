//! Who of this node's site fetches a blob from beyond it, and what of it: one blob's table.
//!
//! Links between sites are dear, so two nodes of a site ask beyond it, its gateways, and what one of them asks for the others wait
//! for. Who that is follows from the blob and the nodes' names (rendezvous hashing: Thaler and Ravishankar 1998), among those that
//! said they would; nobody has to agree on a list of members.

use std::collections::BTreeMap;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::GroupRanges;

use super::api::GatewayNotice;
use crate::{NodeId, Time};

/// Gateways that a site has for a blob.
const GATEWAYS: usize = 2;
/// How long a gateway counts after its last word: three of its notices lost.
const HEARD_FOR: Duration = Duration::from_secs(3);
/// Words of one gateway that follow each other sooner are not listened to.
const HEARD_AFTER: Duration = Duration::from_millis(20);
/// How long it counts while what it asks for stays the same: longer than the slowest request should take.
const MOVES_WITHIN: Duration = Duration::from_secs(15);
/// Most gateways remembered of one blob.
const MAX_GATEWAYS: usize = 16;
/// Most runs that a gateway may claim; as many as requests can be open at some peers.
pub(super) const MAX_CLAIMED_RUNS: usize = 1024;

/// The gateways of one blob that this node heard of.
#[derive(Clone, Debug)]
pub(super) struct Gateways {
    root: RootHash,
    mine: u64,
    others: BTreeMap<NodeId, Gateway>,
}

#[derive(Clone, Debug)]
struct Gateway {
    weight: u64,
    sequence: u64,
    claimed: GroupRanges,
    heard: Time,
    /// When what it claims last changed.
    moved: Time,
}

impl Gateways {
    pub fn new(root: RootHash, me: &NodeId) -> Self {
        Self {
            root,
            mine: weight(&root, me),
            others: BTreeMap::new(),
        }
    }

    /// Takes in what a gateway says of itself. False if that is no news.
    pub fn hear(&mut self, now: Time, notice: &GatewayNotice) -> bool {
        self.others.retain(|_, other| now - other.heard < HEARD_FOR);
        let weight = weight(&self.root, &notice.node);
        let may_come = self.others.contains_key(&notice.node)
            || notice.groups.runs().len() <= MAX_CLAIMED_RUNS && self.makes_room(weight);
        match self.others.get_mut(&notice.node) {
            Some(known) if known.sequence >= notice.sequence => false,
            Some(known) if now - known.heard < HEARD_AFTER => false,
            Some(known) => {
                if known.claimed != notice.groups {
                    known.moved = now;
                }
                known.sequence = notice.sequence;
                known.claimed.clone_from(&notice.groups);
                known.heard = now;
                true
            }
            None if !may_come => false,
            None => {
                let gateway = Gateway {
                    weight,
                    sequence: notice.sequence,
                    claimed: notice.groups.clone(),
                    heard: now,
                    moved: now,
                };
                self.others.insert(notice.node, gateway);
                true
            }
        }
    }

    /// Where too many are remembered, one that counts less gives way.
    fn makes_room(&mut self, weight: u64) -> bool {
        if self.others.len() < MAX_GATEWAYS {
            return true;
        }
        let least = self.others.iter().min_by_key(|(_, other)| other.weight);
        let Some((&node, _)) = least.filter(|(_, other)| other.weight < weight) else {
            return false;
        };
        self.others.remove(&node);
        true
    }

    /// Something that differs from node to node, for what they had better not do all at once.
    pub fn lot(&self) -> u64 {
        self.mine
    }

    /// How many come before this node.
    pub fn better(&self, now: Time) -> usize {
        self.before_me(now).count()
    }

    /// Whether there are as many better ones as are needed.
    pub fn suffice(&self, now: Time) -> bool {
        self.better(now) >= GATEWAYS
    }

    /// Which part of the blob this node had better begin with: each gateway with its own.
    pub fn part(&self, now: Time) -> (u64, u64) {
        ((self.better(now) % GATEWAYS) as u64, GATEWAYS as u64)
    }

    /// What others fetch.
    pub fn claimed(&self, now: Time) -> GroupRanges {
        union(self.working(now))
    }

    /// What those fetch that come before this node.
    pub fn claimed_by_better(&self, now: Time) -> GroupRanges {
        union(self.before_me(now))
    }

    fn before_me(&self, now: Time) -> impl Iterator<Item = &Gateway> {
        self.working(now).filter(|other| other.weight > self.mine)
    }

    fn working(&self, now: Time) -> impl Iterator<Item = &Gateway> {
        self.others
            .values()
            .filter(move |other| now - other.heard < HEARD_FOR && now - other.moved < MOVES_WITHIN)
    }
}

fn union<'a>(gateways: impl Iterator<Item = &'a Gateway>) -> GroupRanges {
    let mut claimed = GroupRanges::new();
    gateways.for_each(|other| claimed.union_with(&other.claimed));
    claimed
}

/// How much a node is meant to be a blob's gateway.
fn weight(root: &RootHash, node: &NodeId) -> u64 {
    let mut both = [0; 64];
    both[..32].copy_from_slice(root.as_bytes());
    both[32..].copy_from_slice(&node.0);
    let hash = RootHash::of(&both);
    hash.as_bytes()[..8]
        .iter()
        .fold(0, |weight, byte| weight << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::from_start(Duration::from_millis(ms))
    }

    fn notice(node: u8, sequence: u64, groups: std::ops::Range<u64>) -> GatewayNotice {
        GatewayNotice {
            root: RootHash::of(b"blob"),
            node: NodeId([node; 32]),
            sequence,
            groups: groups.into(),
        }
    }

    fn table(me: u8) -> Gateways {
        Gateways::new(RootHash::of(b"blob"), &NodeId([me; 32]))
    }

    #[test]
    fn all_agree_on_two() {
        let tables = (0..10).map(|me| {
            let mut table = table(me);
            (0..10).filter(|other| *other != me).for_each(|other| {
                assert!(table.hear(at(0), &notice(other, 1, 0..0)));
            });
            table
        });
        let chosen = tables.filter(|table| !table.suffice(at(1))).count();
        assert_eq!(chosen, GATEWAYS);
    }

    #[test]
    fn who_is_silent_or_stuck_counts_no_more() {
        let mut table = table(0);
        assert!(table.hear(at(0), &notice(1, 1, 5..9)));
        assert!(!table.hear(at(10), &notice(1, 1, 5..12)), "said before");
        assert_eq!(table.claimed(at(2_900)), (5..9).into());
        assert!(table.claimed(at(3_100)).is_empty(), "silent");
        for second in 4..19 {
            assert!(table.hear(at(1_000 * second), &notice(1, second, 5..9)));
            let claims = !table.claimed(at(1_000 * second)).is_empty();
            assert!(claims, "{second}");
        }
        assert!(table.hear(at(19_001), &notice(1, 20, 5..9)));
        assert!(table.claimed(at(19_001)).is_empty(), "stuck");
        assert!(table.hear(at(19_500), &notice(1, 21, 6..9)));
        assert_eq!(table.claimed(at(19_500)), (6..9).into(), "moves again");
        // After a restart it counts anew.
        assert!(table.hear(at(30_000), &notice(1, 1, 0..1)));
    }

    #[test]
    fn the_table_is_bounded() {
        let mut table = table(0);
        (1..=255).for_each(|node| {
            table.hear(at(0), &notice(node, 1, 0..1));
        });
        assert_eq!(table.others.len(), MAX_GATEWAYS);
        // Those that count most are among them, whoever came first.
        let best = (1..=255).max_by_key(|node| weight(&table.root, &NodeId([*node; 32])));
        assert!(table.others.contains_key(&NodeId([best.unwrap(); 32])));
        let runs = (0..=MAX_CLAIMED_RUNS as u64)
            .map(|i| 2 * i..2 * i + 1)
            .collect();
        let long = GatewayNotice {
            groups: runs,
            ..notice(7, 1, 0..0)
        };
        assert!(!super::Gateways::new(RootHash::of(b"blob"), &NodeId([0; 32])).hear(at(0), &long));
    }
}
