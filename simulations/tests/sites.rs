//! Sites behind thin links: about one copy comes into each, whoever dies or lies.

use std::time::Duration;

use capsule_simulations::plan::{Churn, Link, Manner, Member, Plan, Site};
use capsule_simulations::report::Report;

const MIB: u64 = 1 << 20;

/// A publisher in a site of its own, and sites of so many nodes each: 100 Mbit/s inside, 4 Mbit/s into each.
fn star(seed: u64, size: u64, sites: usize, nodes: usize) -> Plan {
    let inside = Link::symmetric(100.0, 0.2);
    let thin = |name: &str, mbit| Site {
        name: name.into(),
        link: Link::symmetric(mbit, 10.0),
    };
    let mut plan = Plan {
        name: format!("star of {sites} x {nodes}"),
        degree: 16,
        degree_max: 24,
        give_up: Duration::from_secs(600),
        sites: vec![thin("office", 4.0 * sites as f64)],
        members: vec![Member {
            site: Some(0),
            ..Member::publisher(inside)
        }],
        ..Plan::equal(seed, size, 0, inside)
    };
    for site in 1..=sites {
        plan.sites.push(thin(&format!("site {site}"), 4.0));
        let member = Member {
            site: Some(site),
            group: 1,
            ..Member::puller(inside)
        };
        plan.members.extend(vec![member; nodes]);
    }
    plan
}

/// Runs a plan that must end with everyone complete; the most copies that came into a site.
fn run(plan: Plan) -> (Report, f64) {
    let (name, size) = (plan.name.clone(), plan.size);
    let report = plan
        .run()
        .unwrap_or_else(|violation| panic!("{name}: {violation}"));
    assert_eq!(report.unfinished, 0, "{report}");
    let into = report.sites[1..].iter().map(|(_, _, into)| *into);
    let copies = into.max().unwrap_or_default() as f64 / size as f64;
    println!("{report}; at most {copies:.3} copies into a site");
    (report, copies)
}

#[test]
fn one_copy_crosses_each_thin_link_in_little_more_than_the_least_time() {
    for seed in 1..3 {
        let (report, copies) = run(star(seed, 16 * MIB, 3, 10));
        assert!(
            copies <= 1.05,
            "{copies:.3} copies came into a site: {report}"
        );
        assert!(report.efficiency() >= 0.85, "last node too late: {report}");
    }
}

/// More than any of them is connected to: what gateways say is passed on.
#[test]
fn in_a_large_site_too() {
    let (report, copies) = run(star(1, 16 * MIB, 1, 60));
    assert!(
        copies <= 1.1,
        "{copies:.3} copies came into a site: {report}"
    );
    assert!(report.efficiency() >= 0.8, "last node too late: {report}");
}

#[test]
fn a_site_whose_gateways_die_goes_on() {
    let churn = Churn {
        fraction: 0.4,
        from: Duration::from_secs(2),
        until: Duration::from_secs(30),
        away: Duration::from_secs(8),
    };
    let (report, copies) = run(Plan {
        churn: Some(churn),
        ..star(1, 16 * MIB, 2, 10)
    });
    assert!(
        copies <= 1.25,
        "{copies:.3} copies came into a site: {report}"
    );
    assert!(report.efficiency() >= 0.65, "last node too late: {report}");
}

#[test]
fn a_member_that_claims_all_and_gives_nothing_costs_its_site_a_wait() {
    for manner in [
        Manner::Stalls,
        Manner::Drips,
        Manner::Refuses,
        Manner::Corrupts,
    ] {
        let mut plan = star(1, 8 * MIB, 1, 8);
        plan.name = format!("{manner:?}");
        plan.members[3].manner = manner;
        let (report, copies) = run(plan);
        assert!(
            copies <= 1.2,
            "{copies:.3} copies came into a site: {report}"
        );
        assert!(report.efficiency() >= 0.5, "last node too late: {report}");
    }
}

#[test]
fn a_node_alone_in_its_site_loses_nothing() {
    let (report, copies) = run(star(1, 16 * MIB, 3, 1));
    assert!(
        copies <= 1.05,
        "{copies:.3} copies came into a site: {report}"
    );
    assert!(report.efficiency() >= 0.9, "last node too late: {report}");
}
