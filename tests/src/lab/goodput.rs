//! What plain TCP carries over a lab's links while they are busy both ways: what results are compared with.
//!
//! All nodes of a site send in a ring, each to the next, at the same time; then one node of each site to one of the next site. Of several
//! rounds the best of each pair counts: whatever else the machine does takes something away, and a bound that is too easy flatters.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::network::Network;
use super::scenario::{Rate, Scenario};

/// Where sinks listen.
const PORT: u16 = 5001;
/// Before this, windows open and queues fill.
const WARM_UP: Duration = Duration::from_secs(2);
/// Counted.
const SPAN: Duration = Duration::from_secs(4);
/// How often that is measured.
const ROUNDS: usize = 3;
/// How long connecting may take, and one read or write.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes of content a second that a link carried.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Goodput {
    /// Sent.
    pub up: f64,
    /// Received.
    pub down: f64,
}

/// What all links carried.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Measured {
    /// By node.
    pub hosts: Vec<Goodput>,
    /// By site, its link to the router; none where there is one site.
    pub sites: Vec<Goodput>,
    /// Bytes on the nodes' interfaces, both ways, for each byte of content.
    pub overhead: f64,
}

impl Measured {
    /// What links would carry if nothing were lost to headers.
    pub fn nominal(scenario: &Scenario) -> Self {
        let goodput = |rate: Rate| Goodput {
            up: rate.up * 1e6 / 8.0,
            down: rate.down * 1e6 / 8.0,
        };
        let groups = scenario.sites.iter().flat_map(|site| &site.nodes);
        let several = scenario.sites.len() > 1;
        let links = scenario.sites.iter().filter(|_| several);
        Self {
            hosts: groups
                .flat_map(|group| std::iter::repeat_n(goodput(group.rate()), group.count))
                .collect(),
            sites: links.filter_map(|site| site.rate().map(goodput)).collect(),
            overhead: 1.0,
        }
    }
}

/// Measures all links.
pub fn measure(network: &Network) -> Result<Measured> {
    let all: Vec<usize> = (0..network.hosts.len()).collect();
    let sites: Vec<&[usize]> = all
        .chunk_by(|a, b| network.hosts[*a].site == network.hosts[*b].site)
        .collect();
    let rings = sites.iter().filter(|site| site.len() > 1);
    let rings: Vec<_> = rings.flat_map(|site| ring(site)).collect();
    let first: Vec<usize> = sites.iter().map(|site| site[0]).collect();
    let (mut hosts, mut overhead) = (vec![Goodput::default(); all.len()], 1.0);
    if !rings.is_empty() {
        let inside = flows(network, &rings)?;
        overhead = inside.overhead;
        for ((from, to), rate) in rings.into_iter().zip(inside.rates) {
            hosts[from].up = rate;
            hosts[to].down = rate;
        }
    }
    let mut links = Vec::new();
    if first.len() > 1 {
        links = vec![Goodput::default(); first.len()];
        let between = flows(network, &ring(&first))?;
        for (site, rate) in between.rates.into_iter().enumerate() {
            links[site].up = rate;
            links[(site + 1) % first.len()].down = rate;
        }
    }
    Ok(Measured {
        hosts,
        sites: links,
        overhead,
    })
}

/// Each with the next, the last with the first.
fn ring(nodes: &[usize]) -> Vec<(usize, usize)> {
    let next = nodes[1..].iter().chain(&nodes[..1]);
    nodes.iter().copied().zip(next.copied()).collect()
}

struct Flows {
    /// Bytes of content a second, by pair.
    rates: Vec<f64>,
    overhead: f64,
}

/// A stream from each to each, all at the same time: the most that each pair carried in any round, with the least overhead.
fn flows(network: &Network, pairs: &[(usize, usize)]) -> Result<Flows> {
    let mut best = round(network, pairs)?;
    for _ in 1..ROUNDS {
        let again = round(network, pairs)?;
        best.overhead = best.overhead.min(again.overhead);
        for (rate, again) in best.rates.iter_mut().zip(again.rates) {
            *rate = rate.max(again);
        }
    }
    Ok(best)
}

fn round(network: &Network, pairs: &[(usize, usize)]) -> Result<Flows> {
    let streams = pairs
        .iter()
        .map(|(from, to)| connect(network, *from, *to))
        .collect::<Result<Vec<_>>>()?;
    let received: Vec<AtomicU64> = pairs.iter().map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    let counts = || -> Vec<u64> {
        let counts = received.iter().map(|count| count.load(Ordering::Relaxed));
        counts.collect()
    };
    thread::scope(|scope| {
        for ((source, sink), received) in streams.iter().zip(&received) {
            scope.spawn(|| send(source, &stop));
            scope.spawn(|| receive(sink, received, &stop));
        }
        thread::sleep(WARM_UP);
        let (before, carried, started) = (counts(), network.counters(), Instant::now());
        thread::sleep(SPAN);
        let (after, carried_after) = (counts(), network.counters());
        let seconds = started.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        let moved: Vec<u64> = (before.iter().zip(after))
            .map(|(before, after)| after - before)
            .collect();
        for ((from, to), moved) in pairs.iter().zip(&moved) {
            ensure!(*moved > 0, "nothing came from node {from} to node {to}");
        }
        let (carried, carried_after) = (carried?, carried_after?);
        let on_links: u64 = (carried.hosts.iter().zip(&carried_after.hosts))
            .map(|(before, after)| after.since(*before).down)
            .sum();
        Ok(Flows {
            overhead: on_links as f64 / moved.iter().sum::<u64>() as f64,
            rates: moved.iter().map(|moved| *moved as f64 / seconds).collect(),
        })
    })
}

/// Both ends of a stream.
fn connect(network: &Network, from: usize, to: usize) -> Result<(TcpStream, TcpStream)> {
    let (from, to) = (&network.hosts[from], &network.hosts[to]);
    let address = SocketAddr::from((to.address, PORT));
    let listener = to
        .namespace
        .run(|| TcpListener::bind(address).with_context(|| format!("listening on {address}")))?;
    let source = from.namespace.run(|| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // On a busy machine neighbours may take longer to find each other than the kernel waits.
            match TcpStream::connect_timeout(&address, PATIENCE) {
                Err(error)
                    if error.kind() == ErrorKind::HostUnreachable && Instant::now() < deadline => {}
                done => {
                    return done
                        .with_context(|| format!("connecting {} to {address}", from.address));
                }
            }
        }
    })?;
    let (sink, _) = listener.accept()?;
    source.set_write_timeout(Some(PATIENCE))?;
    sink.set_read_timeout(Some(PATIENCE))?;
    Ok((source, sink))
}

fn send(mut source: &TcpStream, stop: &AtomicBool) {
    let content = vec![0x5a; 64 << 10];
    while !stop.load(Ordering::Relaxed) && source.write_all(&content).is_ok() {}
    // Whoever reads is told, and reads no further.
    let _ = source.shutdown(std::net::Shutdown::Both);
}

fn receive(mut sink: &TcpStream, received: &AtomicU64, stop: &AtomicBool) {
    let mut buffer = vec![0; 64 << 10];
    while !stop.load(Ordering::Relaxed) {
        match sink.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => {
                received.fetch_add(len as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    // Its sender may wait for room.
    let _ = sink.shutdown(std::net::Shutdown::Both);
}
