//! Members find each other on a LAN by multicast, and what listens on loopback sends none.

use std::fs;
use std::time::Duration;

use capsule_tests::{Node, network};

const SET_UP: &str = "
    ip link set lo up
    ip link add lan0 type veth peer name lan1
    ip link set lan0 addrgenmode none
    ip link set lan1 addrgenmode none
    ip link set lan0 up
    ip link set lan1 up
    ip address add 10.78.0.1/24 dev lan0
    ip route add 224.0.0.0/4 dev lan0";

/// Packets that left by the LAN's interface.
fn packets() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("lan0:"));
    // Received: bytes packets errs drop fifo frame compressed multicast; then sent: bytes packets.
    let sent = line.unwrap().split_whitespace().nth(9).unwrap();
    sent.parse().unwrap()
}

/// Two nodes of one fleet, the second of which was told an address where nobody is.
fn two(dir: &std::path::Path, listen: &str) -> [Node; 2] {
    let [mut first, mut second] = ["node0", "node1"].map(|name| Node::new(dir.join(name)));
    first.init();
    let token = first.ok(&["fleet", "invite", "--addr", "127.0.0.1:1"]);
    second.ok(&["join", token.trim()]);
    first.start_on(listen);
    second.start_on(listen);
    [first, second]
}

#[test]
fn members_find_each_other_by_multicast() {
    if !network::is_own() {
        return network::run_in_its_own("members_find_each_other_by_multicast", SET_UP);
    }
    let dir = tempfile::tempdir().unwrap();
    let nodes = two(dir.path(), "10.78.0.1:0");
    nodes[1].wait_for_peers(1);
    assert!(packets() > 0);
}

#[test]
fn a_node_on_loopback_sends_nothing_beyond_it() {
    if !network::is_own() {
        return network::run_in_its_own("a_node_on_loopback_sends_nothing_beyond_it", SET_UP);
    }
    let dir = tempfile::tempdir().unwrap();
    let before = packets();
    let nodes = two(dir.path(), "127.0.0.1:0");
    // Looking for others begins at once, and goes on as long as nobody is found.
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(packets(), before);
    let peers = nodes[1].json(&["peers"]);
    assert!(peers["peers"].as_array().unwrap().is_empty());
}
