//! The lab's network: a bridge for each site, a router between the sites, a namespace for each node; each link shaped in both
//! directions by `tbf` where it begins.
//!
//! ```text
//! node (n3)                 the lab's own namespace             router
//!   eth0 [up] ======== [down] v3 -- b0 (bridge) -- w0 [up] ======== [down] s0
//! ```

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use super::namespace::{Namespace, batch, make_room_for_names, unfilter_bridges};
use super::scenario::{Rate, Scenario};

/// What a bucket may send at once, in time of its link; and at least, in bytes. Capacity that comes while a busy
/// machine serves the link's timer late is lost beyond it: with 4 ms, 33 nodes' links carried 16.5 to 18.7 Mbit/s of 20 from one run to the next.
const BURST_SECONDS: f64 = 0.02;
const LEAST_BURST: u64 = 16 << 10;
/// What may wait before a link beside that, in time of the link; and at least, in bytes.
const QUEUE_SECONDS: f64 = 0.05;
const LEAST_QUEUE: u64 = 32 << 10;
/// How hosts' TCP avoids congestion: as machines do that nobody has tuned, whatever the one does that runs the lab. Routes say so, as
/// namespaces may be set to nothing else than that one.
const CONGESTION_CONTROL: &str = "cubic";
/// Sites have networks of 10.80.0.0, 10.81.0.0 and so on.
const FIRST_NETWORK: u8 = 80;
/// The router's place in each; nodes come after it.
const ROUTER: u16 = 1;

/// Headers of a packet with content: Ethernet, IPv4, TCP with timestamps.
const HEADERS: u64 = 14 + 20 + 32;

/// All that was set up. It is taken down with it, and in any case with the namespaces that the program runs in.
#[derive(Debug)]
pub struct Network {
    /// By the node's number.
    pub hosts: Vec<Host>,
    sites: usize,
}

/// A node's place.
#[derive(Debug)]
pub struct Host {
    /// Its namespace.
    pub namespace: Arc<Namespace>,
    /// Its address.
    pub address: Ipv4Addr,
    /// Position of its site.
    pub site: usize,
    /// Its own link.
    pub rate: Rate,
}

/// What an interface has carried, seen from whoever is behind it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Carried {
    /// Bytes sent.
    pub up: u64,
    /// Bytes received.
    pub down: u64,
    /// Packets sent.
    pub up_packets: u64,
    /// Packets received.
    pub down_packets: u64,
}

/// What all interfaces have carried.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// By node.
    pub hosts: Vec<Carried>,
    /// By site: its link to the router.
    pub sites: Vec<Carried>,
}

impl Network {
    /// Sets up what a scenario asks for.
    pub fn set_up(scenario: &Scenario) -> Result<Self> {
        make_room_for_names()?;
        unfilter_bridges();
        let mut ip = String::from("link set lo up\n");
        let mut tc = String::new();
        let routed = scenario.sites.len() > 1;
        if routed {
            writeln!(ip, "netns add router")?;
        }
        let mut planned = Vec::new();
        for (site, room) in scenario.sites.iter().enumerate() {
            writeln!(ip, "link add b{site} type bridge")?;
            writeln!(ip, "link set b{site} up")?;
            // For those who are cut off from the others, together.
            writeln!(ip, "link add p{site} type bridge")?;
            writeln!(ip, "link set p{site} up")?;
            let mut place = ROUTER;
            for group in &room.nodes {
                for _ in 0..group.count {
                    place += 1;
                    let number = planned.len();
                    writeln!(ip, "netns add n{number}")?;
                    veth(
                        &mut ip,
                        &format!("v{number}"),
                        &format!("eth0 address {}", hardware(site, place)),
                        &format!("n{number}"),
                    )?;
                    writeln!(ip, "link set v{number} master b{site}")?;
                    shape(&mut tc, "add", &format!("v{number}"), group.rate().down)?;
                    planned.push(Place {
                        site,
                        number: place,
                        rate: group.rate(),
                    });
                }
            }
            if let Some(rate) = room.rate() {
                veth(
                    &mut ip,
                    &format!("w{site}"),
                    &format!("s{site} address {}", hardware(site, ROUTER)),
                    "router",
                )?;
                writeln!(ip, "link set w{site} master b{site}")?;
                shape(&mut tc, "add", &format!("w{site}"), rate.up)?;
            }
        }
        batch(Command::new("ip").args(["-batch", "-"]), &ip)?;
        batch(Command::new("tc").args(["-batch", "-"]), &tc)?;
        if routed {
            set_up_router(scenario, &planned)?;
        }
        let mut hosts = Vec::with_capacity(planned.len());
        for of_site in planned.chunk_by(|one, other| one.site == other.site) {
            let mut neighbours = neighbours(of_site, "eth0")?;
            if routed {
                neighbour(&mut neighbours, of_site[0].site, ROUTER, "eth0")?;
            }
            for place in of_site {
                let namespace = Arc::new(Namespace::open(&format!("n{}", hosts.len()))?);
                set_up_host(&namespace, place, routed, &neighbours)?;
                hosts.push(Host {
                    namespace,
                    address: address(place.site, place.number),
                    site: place.site,
                    rate: place.rate,
                });
            }
        }
        Ok(Self {
            hosts,
            sites: scenario.sites.len(),
        })
    }

    /// What the interfaces have carried so far. Towards nodes, and between sites, it is counted where links are shaped: there, packets
    /// that were put together to save work have the headers of all that they stand for.
    pub fn counters(&self) -> Result<Counters> {
        let here = shaped(Command::new("tc").args(["-s", "-j", "qdisc", "show"]))?;
        let sent = interfaces()?;
        let host = |number| -> Result<Carried> {
            let name = format!("v{number}");
            let (down, down_packets) = found(&here, &name)?;
            let (up, up_packets) = found(&sent, &name)?;
            Ok(Carried {
                up,
                down,
                up_packets,
                down_packets,
            })
        };
        let mut sites = vec![Carried::default(); self.sites];
        if self.sites > 1 {
            let mut tc = Command::new("tc");
            let there = shaped(tc.args(["-n", "router", "-s", "-j", "qdisc", "show"]))?;
            for (number, site) in sites.iter_mut().enumerate() {
                let (up, up_packets) = found(&here, &format!("w{number}"))?;
                let (down, down_packets) = found(&there, &format!("s{number}"))?;
                *site = Carried {
                    up,
                    down,
                    up_packets,
                    down_packets,
                };
            }
        }
        Ok(Counters {
            hosts: (0..self.hosts.len()).map(host).collect::<Result<_>>()?,
            sites,
        })
    }

    /// Shapes a node's link anew.
    pub fn reshape(&self, node: usize, rate: Rate) -> Result<()> {
        let (mut down, mut up) = (String::new(), String::new());
        shape(&mut down, "change", &format!("v{node}"), rate.down)?;
        shape(&mut up, "change", "eth0", rate.up)?;
        let name = self.hosts[node].namespace.name();
        batch(Command::new("tc").args(["-batch", "-"]), &down)?;
        batch(Command::new("tc").args(["-n", name, "-batch", "-"]), &up)
    }

    /// Takes a node's cable out, or puts it back.
    pub fn plug(&self, node: usize, there: bool) -> Result<()> {
        let state = if there { "up" } else { "down" };
        let orders = format!("link set v{node} {state}\n");
        batch(Command::new("ip").args(["-batch", "-"]), &orders)
    }

    /// Cuts nodes off from all others but each other, within their site; or joins them to all again.
    pub fn part(&self, nodes: &[usize], apart: bool) -> Result<()> {
        let bridge = if apart { 'p' } else { 'b' };
        let mut orders = String::new();
        for node in nodes {
            let site = self.hosts[*node].site;
            writeln!(orders, "link set v{node} master {bridge}{site}")?;
        }
        batch(Command::new("ip").args(["-batch", "-"]), &orders)
    }

    /// Cuts a site off from the others, or joins it to them again.
    pub fn join_site(&self, site: usize, there: bool) -> Result<()> {
        if self.sites == 1 {
            bail!("there is only one site");
        }
        let state = if there { "up" } else { "down" };
        let orders = format!("link set w{site} {state}\n");
        batch(Command::new("ip").args(["-batch", "-"]), &orders)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let mut orders = String::new();
        for number in 0..self.hosts.len() {
            orders += &format!("link delete v{number}\nnetns delete n{number}\n");
        }
        for site in 0..self.sites {
            orders += &format!("link delete b{site}\nlink delete p{site}\n");
            if self.sites > 1 {
                orders += &format!("link delete w{site}\n");
            }
        }
        if self.sites > 1 {
            orders += "netns delete router\n";
        }
        // What stays would only be in the way of the next network, which says so.
        let _ = batch(Command::new("ip").args(["-force", "-batch", "-"]), &orders);
    }
}

impl Carried {
    /// What came since then.
    pub const fn since(self, before: Self) -> Self {
        Self {
            up: self.up.saturating_sub(before.up),
            down: self.down.saturating_sub(before.down),
            up_packets: self.up_packets.saturating_sub(before.up_packets),
            down_packets: self.down_packets.saturating_sub(before.down_packets),
        }
    }

    /// Sent bytes without headers: what programs sent over TCP, retransmissions included.
    pub const fn content_up(self) -> u64 {
        self.up.saturating_sub(self.up_packets * HEADERS)
    }

    /// The same of received bytes.
    pub const fn content_down(self) -> u64 {
        self.down.saturating_sub(self.down_packets * HEADERS)
    }
}

/// Bytes and packets by interface.
type Counts = BTreeMap<String, (u64, u64)>;

fn found(counts: &Counts, name: &str) -> Result<(u64, u64)> {
    let found = counts.get(name).copied();
    found.with_context(|| format!("the interface {name} is gone"))
}

/// What shaped interfaces have sent, as `tc` tells.
fn shaped(tc: &mut Command) -> Result<Counts> {
    #[derive(serde::Deserialize)]
    struct Discipline {
        kind: String,
        dev: String,
        bytes: u64,
        packets: u64,
    }
    let output = tc.stdin(Stdio::null()).output();
    let output = output.context("starting tc (iproute2)")?;
    ensure!(
        output.status.success(),
        "tc: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let all: Vec<Discipline> = serde_json::from_slice(&output.stdout).context("reading from tc")?;
    let all = all.into_iter().filter(|found| found.kind == "tbf");
    Ok(all
        .map(|found| (found.dev, (found.bytes, found.packets)))
        .collect())
}

/// What the interfaces here have received, which their other ends have sent.
fn interfaces() -> Result<Counts> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    // NAME: bytes and packets that were received, and other figures.
    let counts = |line: &str| {
        let (name, figures) = line.split_once(':')?;
        let mut figures = figures.split_whitespace().map_while(|f| f.parse().ok());
        Some((name.trim().to_owned(), (figures.next()?, figures.next()?)))
    };
    Ok(text.lines().filter_map(counts).collect())
}

const fn network(site: usize) -> u8 {
    // Scenarios have few sites.
    FIRST_NETWORK + site as u8
}

fn address(site: usize, place: u16) -> Ipv4Addr {
    let [high, low] = place.to_be_bytes();
    Ipv4Addr::new(10, network(site), high, low)
}

/// A cable: one end here, the other in a namespace.
fn veth(ip: &mut String, here: &str, there: &str, namespace: &str) -> Result<()> {
    writeln!(
        ip,
        "link add {here} type veth peer name {there} netns {namespace}"
    )?;
    // Neighbours would look for IPv6 routers.
    writeln!(ip, "link set {here} addrgenmode none")?;
    writeln!(ip, "link set {here} up")?;
    Ok(())
}

fn shape(tc: &mut String, order: &str, interface: &str, mbit: f64) -> Result<()> {
    let bytes = mbit * 1e6 / 8.0;
    let burst = ((bytes * BURST_SECONDS) as u64).max(LEAST_BURST);
    let queue = ((bytes * QUEUE_SECONDS) as u64).max(LEAST_QUEUE) + burst;
    let bits = (mbit * 1e6) as u64;
    writeln!(
        tc,
        "qdisc {order} dev {interface} root tbf rate {bits}bit burst {burst} limit {queue}"
    )?;
    Ok(())
}

/// Where a host is to be.
struct Place {
    site: usize,
    /// Its number in the site.
    number: u16,
    rate: Rate,
}

/// The hardware address that goes with an address.
fn hardware(site: usize, place: u16) -> String {
    let [high, low] = place.to_be_bytes();
    format!("02:50:00:{site:02x}:{high:02x}:{low:02x}")
}

/// Tells a host of a neighbour. All are told, as the kernel's table of those that were found by themselves is one for all namespaces, and
/// too small for hundreds of hosts; real machines have one each.
fn neighbour(ip: &mut String, site: usize, place: u16, interface: &str) -> Result<()> {
    let (address, hardware) = (address(site, place), hardware(site, place));
    writeln!(
        ip,
        "neigh replace {address} lladdr {hardware} dev {interface} nud permanent"
    )?;
    Ok(())
}

fn neighbours(places: &[Place], interface: &str) -> Result<String> {
    let mut ip = String::new();
    for place in places {
        neighbour(&mut ip, place.site, place.number, interface)?;
    }
    Ok(ip)
}

fn set_up_host(namespace: &Namespace, place: &Place, routed: bool, neighbours: &str) -> Result<()> {
    let (network, address) = (network(place.site), address(place.site, place.number));
    let mut ip = String::from("link set lo up\nlink set eth0 addrgenmode none\nlink set eth0 up\n");
    writeln!(
        ip,
        "address add {address}/16 broadcast + dev eth0 noprefixroute"
    )?;
    let tcp = format!("congctl {CONGESTION_CONTROL}");
    writeln!(
        ip,
        "route add 10.{network}.0.0/16 dev eth0 src {address} {tcp}"
    )?;
    writeln!(ip, "route add 224.0.0.0/4 dev eth0")?;
    if routed {
        writeln!(ip, "route add default via 10.{network}.0.{ROUTER} {tcp}")?;
    }
    ip += neighbours;
    let mut tc = String::new();
    shape(&mut tc, "add", "eth0", place.rate.up)?;
    let name = namespace.name();
    batch(Command::new("ip").args(["-n", name, "-batch", "-"]), &ip)?;
    batch(Command::new("tc").args(["-n", name, "-batch", "-"]), &tc)
}

fn set_up_router(scenario: &Scenario, planned: &[Place]) -> Result<()> {
    let (mut ip, mut tc) = (String::from("link set lo up\n"), String::new());
    for (site, room) in scenario.sites.iter().enumerate() {
        let Some(rate) = room.rate() else { continue };
        writeln!(ip, "link set s{site} addrgenmode none")?;
        writeln!(ip, "link set s{site} up")?;
        writeln!(ip, "address add {}/16 dev s{site}", address(site, ROUTER))?;
        let (interface, here) = (format!("s{site}"), |place: &&Place| place.site == site);
        for place in planned.iter().filter(here) {
            neighbour(&mut ip, site, place.number, &interface)?;
        }
        shape(&mut tc, "add", &format!("s{site}"), rate.down)?;
    }
    batch(
        Command::new("ip").args(["-n", "router", "-batch", "-"]),
        &ip,
    )?;
    batch(
        Command::new("tc").args(["-n", "router", "-batch", "-"]),
        &tc,
    )?;
    Namespace::open("router")?.run(|| {
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")
            .context("letting the router forward packets")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_what_headers_leave() {
        let carried = Carried {
            up: 3 * 66 + 1448 * 2,
            down: 60,
            up_packets: 3,
            down_packets: 1,
        };
        assert_eq!((carried.content_up(), carried.content_down()), (2896, 0));
        assert_eq!(carried.since(carried), Carried::default());
    }
}
