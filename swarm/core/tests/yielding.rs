//! Over a thin link, what nobody waits for does not stand before what somebody reads.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::{GROUP_LEN, GroupRanges};
use capsule_swarm_core::{
    BlobSpec, Class, DownloadConfig, Downloads, Output, PeerKey, RequestId, Time,
};

const GROUPS: u64 = 4096;
const PROVIDER: PeerKey = PeerKey(1);
/// How often progress is told.
const TICK: u64 = 200;
/// Bytes a millisecond of 384 kbit/s: a group takes a third of a second.
const THIN: u64 = 48;

fn at(ms: u64) -> Time {
    Time::from_start(Duration::from_millis(ms))
}

struct Asked {
    id: RequestId,
    bytes: u64,
    groups: Range<u64>,
    demand: bool,
    /// When the provider has it.
    there: u64,
}

/// A node that fetches from one provider, which serves demands first, but ends what it has begun.
struct Node {
    downloads: Downloads,
    /// Bytes a millisecond.
    rate: u64,
    /// Milliseconds from a request to the first of its bytes.
    delay: u64,
    /// Milliseconds that writing takes.
    store: u64,
    now: u64,
    queue: VecDeque<Asked>,
    sending: Option<(Asked, u64)>,
    untold: u64,
    /// What is being written, and until when.
    writing: VecDeque<(u64, RequestId, Range<u64>)>,
    /// When something was asked for that nobody waits for, and how many groups.
    besides: Vec<(u64, u64)>,
}

impl Node {
    fn over(rate: u64, delay: u64) -> Self {
        let mut downloads = Downloads::new(DownloadConfig::default(), 7);
        assert!(downloads.peer_connected(at(0), PROVIDER, Class::Within));
        Self {
            downloads,
            rate,
            delay,
            store: 1,
            now: 0,
            queue: VecDeque::new(),
            sending: None,
            untold: 0,
            writing: VecDeque::new(),
            besides: vec![],
        }
    }

    /// Fetches so much of a blob, which the provider has.
    fn fetch(&mut self, name: &str, groups: u64, want: Range<u64>) -> RootHash {
        self.fetch_rest(name, groups, want, 0..0)
    }

    /// The same where some is here.
    fn fetch_rest(
        &mut self,
        name: &str,
        groups: u64,
        want: Range<u64>,
        have: Range<u64>,
    ) -> RootHash {
        let (root, now) = (RootHash::of(name.as_bytes()), at(self.now));
        let spec = BlobSpec {
            root,
            size: groups * GROUP_LEN,
            have: have.into(),
            want: want.into(),
            priority: 0,
        };
        self.downloads
            .handle_have(now, PROVIDER, &root, &(0..groups).into());
        self.downloads.add_blob(now, spec).expect("a new blob");
        root
    }

    fn holds(&self, root: &RootHash, groups: &Range<u64>) -> bool {
        let held = self.downloads.held(root);
        held.is_some_and(|held| held.contains_run(groups))
    }

    /// A millisecond passes.
    fn step(&mut self) {
        self.now += 1;
        let now = at(self.now);
        while let Some((_, id, groups)) = self.writing.pop_front_if(|(at, ..)| *at <= self.now) {
            self.downloads.handle_received(now, PROVIDER, id, &groups);
        }
        while let Some(output) = self.downloads.poll_output(now) {
            if let Output::Request {
                id, groups, demand, ..
            } = output
            {
                let count = groups.end - groups.start;
                if !demand {
                    self.besides.push((self.now, count));
                }
                self.queue.push_back(Asked {
                    id,
                    bytes: count * GROUP_LEN,
                    groups,
                    demand,
                    there: self.now + self.delay,
                });
            }
        }
        if self.sending.is_none() {
            let there = |asked: &Asked| asked.there <= self.now;
            let mut all = self.queue.iter();
            let first = all.position(|asked| there(asked) && asked.demand);
            let first = first.or_else(|| self.queue.iter().position(there));
            let next = first.and_then(|first| self.queue.remove(first));
            self.sending = next.map(|asked| (asked, 0));
        }
        let Some((asked, sent)) = &mut self.sending else {
            return;
        };
        *sent += self.rate;
        self.untold += self.rate;
        if *sent >= asked.bytes {
            let (id, groups) = (asked.id, asked.groups.clone());
            let bytes = asked.bytes;
            (self.sending, self.untold) = (None, 0);
            self.downloads.handle_progress(now, PROVIDER, id, bytes);
            self.writing.push_back((self.now + self.store, id, groups));
        } else if self.now.is_multiple_of(TICK) {
            let told = std::mem::take(&mut self.untold);
            self.downloads
                .handle_progress(now, PROVIDER, asked.id, told);
        }
    }

    fn pass(&mut self, ms: u64) {
        (0..ms).for_each(|_| self.step());
    }

    /// Waits for groups; returns how long.
    fn demand(&mut self, root: &RootHash, groups: Range<u64>) -> u64 {
        let began = self.now;
        self.downloads
            .demand(at(began), root, &groups.clone().into())
            .expect("known");
        while !self.holds(root, &groups) {
            self.step();
            assert!(self.now - began < 60_000, "it never came");
        }
        self.now - began
    }

    /// Reads groups that lie apart, one after the other, with so much time between; returns how long it waited for each.
    fn read(&mut self, root: &RootHash, groups: Range<u64>, between: u64) -> Vec<u64> {
        let mut waited = vec![];
        for number in groups {
            let group = (number * 577 + 1000) % GROUPS;
            waited.push(self.demand(root, group..group + 1));
            self.pass(between);
        }
        waited
    }

    /// Requests and groups since then that nobody waited for.
    fn besides_since(&self, ms: u64) -> (u64, u64) {
        let since = self.besides.iter().filter(|(at, _)| *at > ms);
        let groups = since.clone().map(|(_, groups)| groups).sum();
        (since.count() as u64, groups)
    }
}

#[test]
fn over_a_thin_link_reads_in_one_go_wait_for_themselves_only() {
    let mut node = Node::over(THIN, 20);
    let pack = node.fetch("pack", GROUPS, 0..GROUPS);
    node.pass(5_000);
    let began = node.now;
    let mut waited = node.read(&pack, 0..60, 50);
    // What was asked for before comes first, once.
    assert!(waited.remove(0) < 3_200, "{waited:?}");
    waited.sort_unstable();
    assert!(waited[waited.len() / 2] < 400, "{waited:?}");
    assert!(waited.iter().sum::<u64>() < 450 * 59, "{waited:?}");
    let tens = (node.now - began) / 10_000;
    let (requests, groups) = node.besides_since(began);
    assert!((tens - 1..=tens + 1).contains(&requests), "{requests}");
    assert_eq!(groups, requests);
    // When nobody reads any more all goes on.
    let ended = node.now;
    node.pass(30_000);
    let (_, groups) = node.besides_since(ended);
    assert!(groups > 60, "{groups}");
}

#[test]
fn reads_now_and_then_wait_for_a_group_and_leave_the_link_to_others() {
    let mut node = Node::over(THIN, 20);
    let pack = node.fetch("pack", GROUPS, 0..GROUPS);
    node.pass(5_000);
    node.read(&pack, 0..2, 50);
    let began = node.now;
    let waited = node.read(&pack, 2..12, 5_000);
    assert!(waited.iter().all(|ms| *ms < 2 * 341 + 50), "{waited:?}");
    let (_, groups) = node.besides_since(began);
    assert!(groups > 90, "{groups} of some 150 that the link carries");
}

#[test]
fn what_is_read_need_not_be_fetched_otherwise() {
    let mut node = Node::over(THIN, 20);
    let _other = node.fetch("other", GROUPS, 0..GROUPS);
    node.pass(5_000);
    let mut waited = vec![];
    for number in 0..20 {
        // As a reader's fetches do, the blob comes and goes.
        let group = number * 7..number * 7 + 1;
        let pack = node.fetch("pack", GROUPS, group.clone());
        waited.push(node.demand(&pack, group));
        node.downloads.remove_blob(at(node.now), &pack);
        node.pass(50);
    }
    waited.remove(0);
    assert!(waited.iter().sum::<u64>() < 450 * 19, "{waited:?}");
}

#[test]
fn who_demanded_all_of_an_index_reads_nothing_more() {
    let mut node = Node::over(THIN, 20);
    let index = node.fetch("index", 32, 0..32);
    node.demand(&index, 0..32);
    let ended = node.now;
    node.fetch("pack", GROUPS, 0..GROUPS);
    node.pass(1_000);
    let (_, groups) = node.besides_since(ended);
    assert!(groups >= 8, "{groups}");
}

#[test]
fn where_a_response_is_not_felt_all_goes_on() {
    // 20 Mbit/s.
    let mut node = Node::over(2_500, 5);
    let pack = node.fetch("pack", GROUPS, 0..GROUPS);
    node.pass(500);
    let began = node.now;
    let waited = node.read(&pack, 0..20, 50);
    assert!(waited.iter().all(|ms| *ms < 250), "{waited:?}");
    let (_, groups) = node.besides_since(began);
    let most = (node.now - began) * 2_500 / GROUP_LEN;
    assert!(groups * 10 > most * 8, "{groups} of {most}");
}

/// What of the link is used when all of a pack is fetched of which only single groups were read before.
fn used_after_reads(mut node: Node) -> f64 {
    let pack = node.fetch("pack", GROUPS, 0..0);
    node.read(&pack, 0..50, 5);
    let began = node.now;
    node.downloads
        .want(at(began), &pack, &(0..GROUPS).into())
        .expect("known");
    node.read(&pack, 50..80, 5);
    let (_, groups) = node.besides_since(began);
    (groups * GROUP_LEN) as f64 / ((node.now - began) * node.rate) as f64
}

#[test]
fn who_is_far_or_writes_slowly_is_not_thin() {
    let used = used_after_reads(Node::over(2_500, 90));
    assert!(used > 0.5, "far: {used}");
    let mut slow = Node::over(2_500, 5);
    slow.store = 150;
    let used = used_after_reads(slow);
    assert!(used > 0.5, "slow: {used}");
}

#[test]
fn an_index_of_which_some_is_here_is_not_read_either() {
    let mut node = Node::over(THIN, 20);
    let index = node.fetch_rest("index", 32, 0..32, 10..12);
    let rest: GroupRanges = [0..10, 12..32].into_iter().collect();
    let now = at(node.now);
    node.downloads.demand(now, &index, &rest).expect("known");
    while !node.holds(&index, &(0..32)) {
        node.step();
    }
    let ended = node.now;
    node.fetch("pack", GROUPS, 0..GROUPS);
    node.pass(1_000);
    let (_, groups) = node.besides_since(ended);
    assert!(groups >= 8, "{groups}");
}
