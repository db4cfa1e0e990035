//! Over a thin link, what nobody waits for does not stand before what somebody reads.

use std::ops::Range;
use std::time::Duration;

use capsule_proto::hash::RootHash;
use capsule_proto::ranges::{GROUP_LEN, GroupRanges};
use capsule_swarm_core::{
    BlobSpec, Class, DownloadConfig, Downloads, Output, PeerKey, RequestId, Time,
};

const GROUPS: u64 = 4096;
const PROVIDER: PeerKey = PeerKey(1);

fn at(ms: u64) -> Time {
    Time::from_start(Duration::from_millis(ms))
}

fn root() -> RootHash {
    RootHash::of(b"pack")
}

/// A node that fetches all of a pack from one provider, which serves demands first, but ends what it has begun.
struct Pull {
    downloads: Downloads,
    /// Bytes a millisecond.
    rate: u64,
    now: u64,
    queue: Vec<(RequestId, Range<u64>, bool)>,
    sending: Option<(RequestId, Range<u64>, u64)>,
    /// When something was asked for that nobody waits for, and how many groups.
    besides: Vec<(u64, u64)>,
}

impl Pull {
    fn over(rate: u64) -> Self {
        let mut downloads = Downloads::new(DownloadConfig::default(), 7);
        let spec = BlobSpec {
            root: root(),
            size: GROUPS * GROUP_LEN,
            have: GroupRanges::new(),
            want: (0..GROUPS).into(),
            priority: 0,
        };
        downloads.add_blob(at(0), spec).expect("a first blob");
        assert!(downloads.peer_connected(at(0), PROVIDER, Class::Within));
        downloads.handle_have(at(0), PROVIDER, &root(), &(0..GROUPS).into());
        Self {
            downloads,
            rate,
            now: 0,
            queue: vec![],
            sending: None,
            besides: vec![],
        }
    }

    fn holds(&self, group: u64) -> bool {
        let held = self.downloads.held(&root());
        held.is_some_and(|held| held.contains(group))
    }

    /// A millisecond passes.
    fn step(&mut self) {
        self.now += 1;
        let now = at(self.now);
        while let Some(output) = self.downloads.poll_output(now) {
            if let Output::Request {
                id, groups, demand, ..
            } = output
            {
                if !demand {
                    self.besides.push((self.now, groups.end - groups.start));
                }
                self.queue.push((id, groups, demand));
            }
        }
        if self.sending.is_none() && !self.queue.is_empty() {
            let first = self.queue.iter().position(|(_, _, demand)| *demand);
            let (id, groups, _) = self.queue.remove(first.unwrap_or(0));
            self.sending = Some((id, groups, 0));
        }
        if let Some((id, groups, sent)) = &mut self.sending {
            *sent += self.rate;
            let (id, groups) = (*id, groups.clone());
            if *sent < (groups.end - groups.start) * GROUP_LEN {
                self.downloads.handle_progress(now, PROVIDER, id, self.rate);
            } else {
                self.sending = None;
                self.downloads.handle_received(now, PROVIDER, id, &groups);
            }
        }
    }

    fn pass(&mut self, ms: u64) {
        (0..ms).for_each(|_| self.step());
    }

    /// Reads groups that lie apart, one after the other, with a little between; returns how long it waited for each.
    fn read(&mut self, count: u64) -> Vec<u64> {
        let mut waited = vec![];
        for number in 0..count {
            let group = (number * 577 + 1000) % GROUPS;
            let began = self.now;
            let now = at(self.now);
            self.downloads
                .demand(now, &root(), group..group + 1)
                .expect("known");
            while !self.holds(group) {
                self.step();
                assert!(self.now - began < 60_000, "it never came");
            }
            waited.push(self.now - began);
            self.pass(50);
        }
        waited
    }

    /// Requests and groups since then that nobody waited for.
    fn besides_since(&self, ms: u64) -> (usize, u64) {
        let since = self.besides.iter().filter(|(at, _)| *at > ms);
        (since.clone().count(), since.map(|(_, groups)| groups).sum())
    }
}

#[test]
fn over_a_thin_link_reads_wait_for_themselves_only() {
    // 384 kbit/s: a group takes a third of a second.
    let mut pull = Pull::over(48);
    pull.pass(5_000);
    let began = pull.now;
    let waited = pull.read(60);
    // What was asked for before comes first, once.
    assert!(waited[0] < 3_000, "{waited:?}");
    let mut rest = waited[1..].to_vec();
    rest.sort_unstable();
    assert!(rest[rest.len() / 2] < 400, "{rest:?}");
    assert!(rest.iter().sum::<u64>() < 450 * 59, "{rest:?}");
    // The rest goes on a little all the same: a group each ten seconds, or its fetch would be given up.
    let took = pull.now - began;
    let (requests, groups) = pull.besides_since(began);
    let tens = took as usize / 10_000;
    assert!(
        (tens - 1..=tens + 1).contains(&requests),
        "{requests} in {took} ms"
    );
    assert_eq!(groups, requests as u64);
    // And in full when nobody reads any more.
    let ended = pull.now;
    pull.pass(30_000);
    let (_, groups) = pull.besides_since(ended);
    assert!(groups > 40, "{groups}");
}

#[test]
fn where_a_response_is_not_felt_all_goes_on() {
    // 20 Mbit/s.
    let mut pull = Pull::over(2_500);
    pull.pass(500);
    let began = pull.now;
    let waited = pull.read(20);
    assert!(waited.iter().all(|ms| *ms < 250), "{waited:?}");
    let (_, groups) = pull.besides_since(began);
    let most = (pull.now - began) * 2_500 / GROUP_LEN;
    assert!(groups * 10 > most * 8, "{groups} of {most}");
}
