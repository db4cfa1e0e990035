//! The checks of simulations fail when they should: nodes are spoilt from outside, by what a bug might do to them.

use capsule_proto::GroupRanges;
use capsule_simulations::World;
use capsule_simulations::checks::{AUDIT_EVERY, Fault, Violation};
use capsule_simulations::node::Node;
use capsule_simulations::plan::{Link, Plan};
use capsule_swarm_core::{BlobSpec, DownloadConfig, Downloads, PauseReason};

const MIB: u64 = 1 << 20;
/// The node that is spoilt.
const SPOILT: usize = 3;

fn plan(seed: u64) -> Plan {
    Plan {
        name: "spoilt".into(),
        ..Plan::equal(seed, 4 * MIB, 5, Link::symmetric(20.0, 0.5))
    }
}

/// Runs half of a plan, spoils a node, and goes on.
fn spoil(plan: Plan, spoil: impl Fn(&mut Node, capsule_swarm_core::Time)) -> Violation {
    let mut world = World::new(plan);
    while world.progress() < 0.5 {
        world.step().expect("sound so far");
    }
    let now = world.now();
    spoil(&mut world.nodes[SPOILT], now);
    world.run().expect_err("spoilt")
}

#[test]
fn content_that_never_came_is_not_held() {
    let violation = spoil(plan(1), |node, _| {
        let first = node.stored.runs()[0].clone();
        node.stored.remove(first);
    });
    assert_eq!(violation.node, SPOILT);
    assert!(
        matches!(violation.fault, Fault::Unverified(_)),
        "{violation}"
    );
}

#[test]
fn what_was_committed_is_not_lost() {
    let violation = spoil(plan(1), |node, now| {
        let (root, size) = (*node.root(), node.geometry.size());
        node.downloads.remove_blob(now, &root);
        let spec = BlobSpec {
            root,
            size,
            have: GroupRanges::new(),
            want: GroupRanges::all(size),
            priority: 0,
        };
        node.downloads.add_blob(now, spec).expect("known no more");
    });
    assert_eq!(violation.node, SPOILT);
    assert!(matches!(violation.fault, Fault::Lost(_)), "{violation}");
}

#[test]
fn nobody_waits_beside_a_provider() {
    let mut plan = plan(1);
    plan.give_up *= 10;
    let violation = spoil(plan, |node, now| {
        let root = *node.root();
        node.downloads
            .pause_blob(now, &root, PauseReason::StoreFailed)
            .expect("known");
    });
    assert_eq!(violation.node, SPOILT);
    assert!(
        matches!(violation.fault, Fault::Stuck { .. }),
        "{violation}"
    );
    assert!(violation.at > 60.0);
}

#[test]
fn a_scheduler_that_takes_a_blob_for_whole_is_found_out() {
    let violation = spoil(plan(1), |node, now| {
        node.downloads = Downloads::new(DownloadConfig::default(), 7);
        let (root, size) = (*node.root(), node.geometry.size());
        let spec = BlobSpec {
            root,
            size,
            have: GroupRanges::all(size),
            want: GroupRanges::all(size),
            priority: 0,
        };
        node.downloads.add_blob(now, spec).expect("a first blob");
    });
    assert_eq!(violation.node, SPOILT);
    assert!(
        matches!(violation.fault, Fault::Unverified(_)),
        "{violation}"
    );
}

#[test]
fn a_violation_says_how_to_see_it_again_and_is_seen_again() {
    let forget = |node: &mut Node, _| {
        let first = node.stored.runs()[0].clone();
        node.stored.remove(first);
    };
    let violation = spoil(plan(42), forget);
    let text = violation.to_string();
    for part in ["plan spoilt", "seed 42", "node 3", "--seed 42"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(spoil(plan(42), forget), violation);
}

#[test]
fn a_sound_run_is_audited_and_passes() {
    let report = plan(1).run().expect("sound");
    assert_eq!(report.unfinished, 0);
    assert!(report.events > 4 * AUDIT_EVERY, "{} events", report.events);
}
