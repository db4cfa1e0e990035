//! Caps of rates as people set them: what is then on the link, and what they are told.

use std::fs;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use capsule_tests::short::text;
use capsule_tests::{Fleet, data, network};
use serde_json::{Value, json};

/// Nothing else is on this loopback.
const SET_UP: &str = "ip link set lo up";

/// Bytes that loopback has carried.
fn carried() -> u64 {
    let counted = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = counted
        .lines()
        .find_map(|line| line.trim().strip_prefix("lo:"));
    let received = line.unwrap().split_whitespace().next().unwrap();
    received.parse().unwrap()
}

/// What it carries in a time, in Mbit/s.
fn rate(time: Duration) -> f64 {
    let (begun, before) = (Instant::now(), carried());
    sleep(time);
    (carried() - before) as f64 * 8.0 / 1e6 / begun.elapsed().as_secs_f64()
}

/// The rate of one direction, to or from some peers.
fn told(rates: &Value, direction: &str, peers: &str) -> Value {
    let rates = rates["rates"].as_array().unwrap().iter();
    let mut matching = rates.filter(|it| it["direction"] == direction && it["peers"] == peers);
    matching.next().unwrap().clone()
}

#[test]
fn a_cap_holds_on_the_link_and_can_be_changed_while_content_moves() {
    if !network::is_own() {
        let test = "a_cap_holds_on_the_link_and_can_be_changed_while_content_moves";
        return network::run_in_its_own(test, SET_UP);
    }
    let fleet = Fleet::of(2);
    fleet[1].wait_for_peers(1);
    let file = fleet.path("file");
    data::noise_file(&file, 7, 32 << 20);
    fleet[0].publish(&file, "lab:1");
    // Each end is capped in turn: all peers are on this machine, and so within the site.
    for (name, node, option) in [("lab:1", 0, "--upload"), ("lab:1", 1, "--download")] {
        fleet[node].ok(&["rates", option, "4 Mbit/s", "--within"]);
        let mut pull = fleet[1].command(&["pull", name]);
        let pull = pull.stdout(Stdio::null()).stderr(Stdio::null());
        let mut pull = pull.spawn().unwrap();
        sleep(Duration::from_secs(2));
        // Loopback's packets are long: there are fewer headers than are counted, and receipts beside them.
        let capped = rate(Duration::from_secs(3));
        assert!((3.6..4.3).contains(&capped), "{option}: {capped} Mbit/s");
        fleet[node].ok(&["rates", option, "12 Mbit/s"]);
        sleep(Duration::from_secs(1));
        let changed = rate(Duration::from_secs(2));
        assert!(
            (10.5..13.2).contains(&changed),
            "{option}: {changed} Mbit/s"
        );
        fleet[node].ok(&["rates", option, "unlimited"]);
        let lifted = Instant::now();
        assert!(pull.wait().unwrap().success());
        // What is left would take 15 s and more.
        assert!(lifted.elapsed() < Duration::from_secs(10), "{option}");
        fleet[1].ok(&["rm", "--force", name]);
    }
}

#[test]
fn rates_are_told_kept_over_restarts_and_refused_where_they_are_none() {
    let mut fleet = Fleet::new();
    let node = &fleet[0];
    let free = node.json(&["rates"]);
    for direction in ["upload", "download"] {
        for peers in ["within", "beyond"] {
            let rate = told(&free, direction, peers);
            assert_eq!(rate["schedule"], "unlimited");
            assert_eq!(
                (&rate["cap"], &rate["next_change"]),
                (&json!(null), &json!(null))
            );
        }
    }
    assert_eq!(node.json(&["status"])["caps"], json!([]));
    assert!(!fs::exists(node.home().join("rates.json")).unwrap());

    // Half of the day from now on, give or take: so that it changes, whatever the time is.
    let schedule = "5 Mbit/s, 00:00-12:00 6 Mbit/s, 12:00-24:00 7 Mbit/s";
    let set = node.json(&["rates", "--upload", schedule, "--beyond"]);
    let capped = told(&set, "upload", "beyond");
    assert_eq!(capped["schedule"], schedule);
    let (now, next) = (&capped["cap"], &capped["next_cap"]);
    assert!(
        [now, next] == [6_000_000, 7_000_000] || [now, next] == [7_000_000, 6_000_000],
        "{capped:#}"
    );
    let at = capped["next_change"].as_u64().unwrap();
    let since_1970 = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!(
        (since_1970 - 60..since_1970 + 13 * 3600).contains(&at),
        "{at}"
    );
    assert_eq!(told(&set, "upload", "within")["cap"], json!(null));
    let status = node.json(&["status"]);
    assert_eq!(status["caps"], json!([capped]));
    let for_people = node.ok(&["status"]);
    assert!(for_people.contains("upload beyond "), "{for_people}");

    for (args, why) in [
        (
            ["rates", "--upload", "5 Mb/s"],
            "\"5 Mb/s\" is not a rate: write a number and its unit",
        ),
        (
            ["rates", "--download", "1 kbit/s"],
            "1 kbit/s is less than 64 kbit/s",
        ),
        (
            ["rates", "--download", "9:00-24:01 1 MB/s"],
            "is not hours of the day",
        ),
    ] {
        let said = node.fails(2, &args);
        assert!(said.contains(why), "{said}");
    }
    let said = node.fails(2, &["rates", "--within"]);
    assert!(
        said.contains("give --upload RATES or --download RATES"),
        "{said}"
    );

    fleet[0].stop();
    fleet[0].start();
    assert_eq!(told(&fleet[0].json(&["rates"]), "upload", "beyond"), capped);
    fleet[0].stop();
    let path = fleet[0].home().join("rates.json");
    let broken = fs::read_to_string(&path)
        .unwrap()
        .replace("6 Mbit/s", "6 Mbps");
    fs::write(&path, broken).unwrap();
    let said = fleet[0].fails(1, &["node", "--listen", "127.0.0.1:0"]);
    assert!(
        said.contains(text(&path)) && said.contains("\"6 Mbps\" is not a rate"),
        "{said}"
    );
}
