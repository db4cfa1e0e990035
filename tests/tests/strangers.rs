//! Strangers at the door: whatever they say, they reach no protocol, cost little, and keep nobody out.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use capsule_proto::credential::{FleetKey, MachineKey};
use capsule_proto::wire::Verdict;
use capsule_tests::member::{Member, all_rights};
use capsule_tests::rogue::{self, ALPN, DOOR_PATIENCE, MULTISTREAM, knock};
use capsule_tests::{Fleet, Node, data, network};
use futures::io::{AsyncReadExt, AsyncWriteExt};
use libp2p::tcp::tokio::TcpStream;

/// A yamux header that opens substream 1, and the negotiation that would follow.
fn multiplexed() -> Vec<u8> {
    let open = [0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0];
    let hello = [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, MULTISTREAM.len() as u8];
    [&open[..], &hello, MULTISTREAM].concat()
}

/// Says something over bare TCP; what comes back until the end.
async fn over_tcp(to: String, bytes: Vec<u8>) -> Vec<u8> {
    let mut stream = TcpStream(rogue::dial(&to, None).await.expect("it listens"));
    // It may be cut off while it speaks.
    let _ = stream.write_all(&bytes).await;
    rogue::rest(&mut stream).await.expect("the node ends it")
}

/// Says something over TLS under a key of its own; what comes back until the end.
async fn over_tls(to: String, bytes: Vec<u8>) -> Vec<u8> {
    let key = MachineKey::from_secret([90; 32]);
    let mut stream = knock(&to, Some(&key), &[ALPN]).await.expect("TLS is open");
    let _ = stream.write_all(&bytes).await;
    let _ = stream.flush().await;
    rogue::rest(&mut stream).await.expect("the node ends it")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_no_credential_is_told_nothing() {
    let fleet = Fleet::of(1);
    let address = || fleet[0].address().to_owned();
    // What a stranger may get: an alert of TLS, which is seven bytes long in the clear.
    let words: [(&str, Vec<u8>); 5] = [
        ("nothing", vec![]),
        ("noise", data::noise(1, 5000)),
        ("a request of the web", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("a negotiation", MULTISTREAM.to_vec()),
        ("multiplexing", multiplexed()),
    ];
    let long = [&u32::MAX.to_be_bytes()[..], &[0; 1000]].concat();
    let cut = [&1000u32.to_be_bytes()[..], &[7; 10]].concat();
    let secured: [(&str, Vec<u8>); 5] = [
        ("nothing", vec![]),
        ("noise", data::noise(2, 5000)),
        ("a greeting beyond its bound", long),
        ("a greeting cut short", cut),
        ("multiplexing", multiplexed()),
    ];
    let bare = words.map(|(what, bytes)| {
        let answer = tokio::spawn(over_tcp(address(), bytes));
        (what, answer)
    });
    let secured = secured.map(|(what, bytes)| {
        let answer = tokio::spawn(over_tls(address(), bytes));
        (what, answer)
    });
    for (what, answer) in bare {
        let answer = answer.await.unwrap();
        let is_alert = answer.len() == 7 && answer[0] == 21;
        assert!(answer.is_empty() || is_alert, "{what}: {answer:?}");
    }
    for (what, answer) in secured {
        let answer = answer.await.unwrap();
        assert!(answer.is_empty(), "{what} in TLS: {answer:?}");
    }
    // Without a certificate, and with a client of something else, not even TLS comes about.
    let key = MachineKey::from_secret([91; 32]);
    for (key, alpn) in [(None, ALPN), (Some(&key), b"h2")] {
        if let Ok(mut stream) = knock(&address(), key, &[alpn]).await {
            let _ = stream.write_all(&rogue::greeting(&[])).await;
            let mut first = [0];
            let read = tokio::time::timeout(DOOR_PATIENCE, stream.read(&mut first)).await;
            assert!(read.expect("the node ends it").is_err(), "it is heard");
        }
    }
    still_serves(&fleet[0], &fleet);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_a_credential_that_does_not_count_is_told_why_and_no_more() {
    let fleet = Fleet::of(1);
    let brief = fleet.invite(&["--expires", "2s"]);
    let expired = Member::of(&brief, 81);
    let member = Member::of(&fleet.invite(&[]), 82);
    let stolen = member.credential.encode();
    // A fleet of their own making; and the same with our fleet's id written over theirs.
    let grant = all_rights(9);
    let own_root = FleetKey::from_secret([83; 32]);
    let own = Member::enrol(&own_root.invite(grant, [84; 32], &[]), 85);
    let replace = |bytes: &[u8], old: &[u8], new: &[u8]| {
        let at = bytes.windows(old.len()).position(|part| part == old);
        let mut bytes = bytes.to_vec();
        bytes[at.expect("it is in there")..][..old.len()].copy_from_slice(new);
        bytes
    };
    let (ours, theirs) = (member.credential.fleet(), own.credential.fleet());
    let forged = replace(&own.credential.encode(), &theirs.0, &ours.0);
    // A member's credential made out to another machine by a member that is not the token.
    let renamed = replace(&stolen, &member.key.machine().0, &own.key.machine().0);
    let mut garbled = stolen.clone();
    *garbled.last_mut().unwrap() ^= 1;
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let thief = MachineKey::from_secret([86; 32]);
    let cases: [(&MachineKey, Vec<u8>, &str); 8] = [
        (&thief, vec![], "malformed"),
        (&thief, data::noise(3, 300), "malformed"),
        (&own.key, own.credential.encode(), "another fleet"),
        (&own.key, forged, "root key did not sign"),
        (&own.key, renamed, "did not sign this machine"),
        (&member.key, garbled, "did not sign this machine"),
        (&thief, stolen, "another machine"),
        (&expired.key, expired.credential.encode(), "expired"),
    ];
    for (key, credential, why) in cases {
        let mut stream = knock(fleet[0].address(), Some(key), &[ALPN]).await.unwrap();
        let greeting = rogue::greeting(&credential);
        let Verdict(verdict) = rogue::greet(&mut stream, &greeting).await.unwrap();
        let reason = verdict.expect_err(why);
        assert!(reason.contains(why), "{why}: {reason}");
        // It goes on as if it had been let in.
        let _ = stream.write_all(&multiplexed()).await;
        let more = rogue::rest(&mut stream).await.expect("the node ends it");
        assert!(more.is_empty(), "{why}: {more:?}");
    }
    let status = fleet[0].json(&["status"]);
    assert_eq!(status["peers"], 0, "{status:#}");
    let troubles = status["troubles"].to_string();
    for why in ["another fleet", "expired", "root key did not sign"] {
        assert!(troubles.contains(why), "{why}: {status:#}");
    }
    still_serves(&fleet[0], &fleet);
}

/// A new member joins the node and pulls from it, in a time that strangers must not stretch.
fn still_serves(node: &Node, fleet: &Fleet) {
    let name = format!("lab:{}", node.json(&["status"])["records"]);
    let (source, copy) = (fleet.path("source"), fleet.path("copy"));
    fs::write(&source, data::noise(5, 300_000)).unwrap();
    node.publish(&source, &name);
    let token = node.ok(&["fleet", "invite", "--addr", node.address()]);
    let mut member = Node::new(fleet.path("member"));
    member.ok(&["join", token.trim()]);
    let started = Instant::now();
    member.start();
    member.ok(&["pull", &name]);
    member.ok(&["export", &name, "--to", copy.to_str().unwrap()]);
    assert!(fs::read(&source).unwrap() == fs::read(&copy).unwrap());
    assert!(
        started.elapsed() < Duration::from_secs(15),
        "it took {:?}",
        started.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_leave_nothing_behind() {
    let fleet = Fleet::of(1);
    let node = &fleet[0];
    // Strangers of each kind once, so that what is made at first use is there.
    visit(node.address(), 8).await;
    node.wait_until("the first strangers are gone", |node| {
        node.open_files() < 60
    });
    let (files, memory) = (node.open_files(), node.resident_bytes());
    for _ in 0..8 {
        visit(node.address(), 48).await;
    }
    node.wait_until("all strangers are gone", |node| node.open_files() <= files);
    let grown = node.resident_bytes().saturating_sub(memory);
    assert!(grown < 16 << 20, "{grown} bytes more after 384 strangers");
    still_serves(node, &fleet);
}

/// Many strangers at once, of several kinds, each until it is sent away or has said what it has to say.
async fn visit(address: &str, count: usize) {
    let visits = (0..count).map(|number| {
        let address = address.to_owned();
        tokio::spawn(async move {
            let key = MachineKey::from_secret([number as u8 + 100; 32]);
            match number % 4 {
                // Not waited for: half a minute of these would be a long test.
                0 => drop(rogue::dial(&address, None).await),
                1 => drop(over_tcp(address, data::noise(number as u64, 3000)).await),
                2 => {
                    if let Ok(mut stream) = knock(&address, Some(&key), &[ALPN]).await {
                        let _ = rogue::greet(&mut stream, &rogue::greeting(&[1; 200])).await;
                    }
                }
                _ => drop(knock(&address, Some(&key), &[ALPN]).await),
            }
        })
    });
    for visit in visits.collect::<Vec<_>>() {
        visit.await.unwrap();
    }
}

const NODE: &str = "10.77.0.1";
const STRANGER: [u8; 4] = [10, 77, 0, 2];

/// Strangers hold as many connections as they get, from another address than the members', while a member comes in.
///
/// Loopback is exempt from the bound on handshakes from one address, so this happens in a network of its own.
#[test]
fn a_crowd_of_silent_strangers_keeps_no_member_out() {
    if !network::is_own() {
        let stranger = STRANGER.map(|part| part.to_string()).join(".");
        let set_up = format!(
            "ip link set lo up; ip address add {NODE}/24 dev lo; ip address add {stranger}/24 dev lo"
        );
        let test = "a_crowd_of_silent_strangers_keeps_no_member_out";
        return network::run_in_its_own(test, &set_up);
    }
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::new(dir.path().join("node0"));
    node.init();
    // No discovery by multicast: the node would dial the members, and they need not come in by the door.
    let listen = format!("{NODE}:0");
    let options = ["--listen", &listen, "--no-lan-discovery"];
    node.start_with(&options);
    let token = node.ok(&["fleet", "invite", "--addr", node.address()]);
    let runtime = rogue::runtime();
    let address = node.address().to_owned();
    let crowd = runtime.spawn(async move {
        let held = (0..200).map(|_| {
            let address = address.clone();
            tokio::spawn(async move {
                loop {
                    let from = SocketAddr::from((STRANGER, 0));
                    if let Ok(stream) = rogue::dial(&address, Some(from)).await {
                        // Held for as long as the node lets it.
                        let _ = rogue::rest(&mut TcpStream(stream)).await;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
        });
        futures::future::join_all(held.collect::<Vec<_>>()).await
    });
    std::thread::sleep(Duration::from_secs(1));
    for number in 1..=3 {
        let mut member = Node::new(dir.path().join(format!("node{number}")));
        member.ok(&["join", token.trim()]);
        let started = Instant::now();
        member.start_with(&options);
        member.wait_for_peers(1);
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "member {number} took {:?} to come in",
            started.elapsed()
        );
        assert!(!crowd.is_finished());
        member.stop();
        node.wait_until("the member is gone", |node| {
            node.json(&["peers"])["peers"]
                .as_array()
                .unwrap()
                .is_empty()
        });
    }
    assert!(node.open_files() < 200, "{}", node.open_files());
    crowd.abort();
}
