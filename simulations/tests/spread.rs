//! Fleets of real schedulers on simulated links: how near to the bound they come, and who cannot stop them.
//!
//! Every report names its seed; `--nocapture` prints all of them.

use std::time::Duration;

use capsule_simulations::plan::{Link, Manner, Member, Plan};
use capsule_simulations::report::Report;

const MIB: u64 = 1 << 20;

/// Runs a plan that must end with everyone complete.
fn run(what: &str, plan: Plan) -> Report {
    let report = plan
        .run()
        .unwrap_or_else(|violation| panic!("{what}: {violation}"));
    println!("{what}: {report}");
    assert_eq!(report.unfinished, 0, "{what}: {report}");
    report
}

/// Checks what a run should reach: part of the bound at the last node, publisher copies, duplicates, control traffic.
fn reaches(report: &Report, efficiency: f64, copies: f64, duplicates: f64, control: f64) {
    assert!(
        report.efficiency() >= efficiency,
        "last node too late: {report}"
    );
    assert!(
        report.publisher_copies <= copies,
        "publisher sent too much: {report}"
    );
    assert!(
        report.duplicates <= duplicates,
        "too many duplicates: {report}"
    );
    assert!(
        report.control <= control,
        "too much control traffic: {report}"
    );
}

fn lan() -> Link {
    Link::symmetric(20.0, 0.5)
}

#[test]
fn one_publisher_and_seven_pullers_come_near_the_bound() {
    for seed in 1..3 {
        let report = run("1 + 7", Plan::equal(seed, 96 * MIB, 7, lan()));
        reaches(&report, 0.93, 1.1, 0.01, 0.01);
        assert!(
            report.last() / report.finished[3] < 1.1,
            "stragglers: {report}"
        );
    }
}

#[test]
fn thirty_two_nodes_come_near_the_bound() {
    let report = run("1 + 31", Plan::equal(1, 96 * MIB, 31, lan()));
    reaches(&report, 0.92, 1.1, 0.01, 0.01);
}

#[test]
fn thirty_two_nodes_with_twenty_connections_each_too() {
    let report = run(
        "1 + 31, degree 20",
        Plan {
            degree: 16,
            degree_max: 24,
            ..Plan::equal(1, 32 * MIB, 31, lan())
        },
    );
    reaches(&report, 0.85, 1.2, 0.01, 0.02);
}

#[test]
fn a_small_update_spreads_too() {
    let report = run("1 + 31, 4 MiB", Plan::equal(1, 4 * MIB, 31, lan()));
    reaches(&report, 0.75, 1.1, 0.01, 0.04);
}

#[test]
fn on_very_fast_links_the_publisher_still_sends_about_one_copy() {
    // With one seed in four some nodes end 0.45 s late, which is twice as long as all of it takes: known, and not understood yet.
    let link = Link::symmetric(10_000.0, 0.1);
    let runs = (1..10).map(|seed| run("10 Gbit/s", Plan::equal(seed, 256 * MIB, 7, link)));
    let mut runs: Vec<Report> = runs.collect();
    runs.sort_by(|one, other| one.last().total_cmp(&other.last()));
    runs.iter()
        .for_each(|report| reaches(report, 0.0, 1.5, 0.01, 0.01));
    reaches(&runs[runs.len() / 2], 0.85, 1.5, 0.01, 0.01);
}

#[test]
fn on_shared_processors_the_publisher_still_sends_about_one_copy() {
    let plan = Plan {
        processors: Some(1e9),
        ..Plan::equal(1, 256 * MIB, 7, Link::symmetric(100_000.0, 0.02))
    };
    reaches(&run("processors", plan), 0.95, 1.5, 0.01, 0.01);
}

/// Seven pullers on equal links, and a publisher on another.
fn beside_a_publisher_on(publisher: Link, pullers: Link) -> Plan {
    let mut plan = Plan::equal(1, 128 * MIB, 7, pullers);
    plan.members[0].link = publisher;
    plan
}

#[test]
fn a_publisher_faster_than_its_peers_is_spared_where_they_can_do_it_among_themselves() {
    let plan = beside_a_publisher_on(Link::symmetric(1000.0, 0.5), Link::symmetric(200.0, 0.5));
    reaches(&run("fast publisher", plan), 0.9, 2.0, 0.01, 0.01);
}

#[test]
fn a_fast_publisher_helps_where_peers_have_thin_uplinks() {
    let thin = Link {
        up: 10e6 / 8.0,
        ..Link::symmetric(100.0, 5.0)
    };
    let plan = beside_a_publisher_on(Link::symmetric(500.0, 5.0), thin);
    reaches(&run("thin uplinks", plan), 0.9, 7.0, 0.01, 0.01);
}

#[test]
fn one_peer_fills_the_link() {
    let report = run(
        "1 Gbit/s, 2 ms",
        Plan::equal(1, 256 * MIB, 1, Link::symmetric(1000.0, 0.5)),
    );
    reaches(&report, 0.97, 1.0, 0.0, 0.01);
    // Half of the time goes into finding out that 25 MB must be under way at once.
    let report = run(
        "1 Gbit/s, 200 ms",
        Plan::equal(1, 256 * MIB, 1, Link::symmetric(1000.0, 50.0)),
    );
    reaches(&report, 0.5, 1.0, 0.0, 0.01);
}

/// Seven pullers, among as many bad peers as given.
fn among(manner: Manner, bad: usize) -> Plan {
    let mut plan = Plan::equal(1, 16 * MIB, 7, lan());
    let member = Member {
        manner,
        seeds: false,
        ..plan.members[1]
    };
    plan.members.extend(std::iter::repeat_n(member, bad));
    plan
}

#[test]
fn peers_that_announce_everything_and_serve_nothing_hold_nobody_up() {
    // That a peer stalls is noticed after 5 s, which is most of this run: from 0.77 to 0.82, by the seed. Dripping peers left 0.73 to 0.92: how many of
    // their responses, a second each, somebody waits for at the end is chance. Refusing ones left 0.90 to 0.94.
    for (manner, usual, least) in [
        (Manner::Stalls, 0.75, 0.73),
        (Manner::Drips, 0.78, 0.7),
        (Manner::Refuses, 0.85, 0.8),
    ] {
        let mut runs: Vec<_> = (1..=5)
            .map(|seed| {
                let mut plan = among(manner, 3);
                plan.seed = seed;
                run(&format!("{manner:?}"), plan)
            })
            .collect();
        for report in &runs {
            reaches(report, least, 1.2, 0.01, 0.02);
            assert_eq!(report.bans, []);
        }
        runs.sort_by(|a, b| a.efficiency().total_cmp(&b.efficiency()));
        reaches(&runs[runs.len() / 2], usual, 1.2, 0.01, 0.02);
    }
}

#[test]
fn peers_that_send_wrong_bytes_are_banned_by_all_and_hold_nobody_up() {
    let report = run("Corrupts", among(Manner::Corrupts, 3));
    reaches(&report, 0.8, 1.2, 0.01, 0.02);
    assert!(report.bans.iter().all(|&(_, whom)| whom > 7), "{report}");
    assert!(!report.bans.is_empty(), "{report}");
}

#[test]
fn the_publisher_may_die_once_a_full_copy_is_out() {
    for seed in 1..4 {
        let plan = Plan {
            publisher_dies: true,
            ..Plan::equal(seed, 16 * MIB, 7, lan())
        };
        reaches(&run("dies", plan), 0.8, 1.2, 0.01, 0.02);
    }
}

#[test]
fn slow_nodes_do_not_slow_down_the_fast_ones() {
    let fast = run("24 fast", Plan::equal(1, 16 * MIB, 24, lan()));
    let mut plan = Plan::equal(1, 16 * MIB, 31, lan());
    plan.members[25..]
        .iter_mut()
        .for_each(|member| member.link = Link::symmetric(5.0, 0.5));
    let mixed = run("24 fast, 7 slow", plan);
    let last_fast = mixed.finished[23];
    assert!(
        last_fast < 1.25 * fast.last(),
        "{last_fast} s against {} s",
        fast.last()
    );
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let plan = || Plan {
        give_up: Duration::from_secs(60),
        ..Plan::equal(5, 4 * MIB, 7, lan())
    };
    assert_eq!(plan().run(), plan().run());
}
