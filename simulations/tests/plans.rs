//! Plans as files: those that are there are right, and what is wrong is said.

use capsule_simulations::file::parse;
use capsule_simulations::plan::Plan;

const PLAN: &str = r#"
size_mib = 2
[[group]]
name = "publisher"
role = "publisher"
up_mbit = 20
down_mbit = 20
latency_ms = 0.5
[[group]]
name = "pullers"
role = "puller"
count = 6
up_mbit = 20
down_mbit = 20
latency_ms = 0.5
"#;

fn error(text: &str) -> String {
    match parse("plan", text) {
        Ok(_) => panic!("accepted: {text}"),
        Err(error) => error.to_string(),
    }
}

fn one(text: &str) -> Plan {
    parse("plan", text).expect("a right plan").remove(0)
}

#[test]
fn all_plans_that_are_there_are_right() {
    let plans = concat!(env!("CARGO_MANIFEST_DIR"), "/plans");
    let mut count = 0;
    for entry in std::fs::read_dir(plans).expect("plans") {
        let path = entry.expect("an entry").path();
        let text = std::fs::read_to_string(&path).expect("text");
        let parsed = parse("plan", &text).unwrap_or_else(|error| panic!("{path:?}: {error}"));
        assert!(parsed.iter().all(|plan| plan.bound() > 0.0), "{path:?}");
        count += 1;
    }
    assert!(count >= 9, "{count} plans");
}

#[test]
fn what_is_wrong_with_a_plan_is_said() {
    let with = |from: &str, to: &str| PLAN.replacen(from, to, 1);
    for (text, expected) in [
        (
            with("size_mib = 2", "size_mib = 2\nspeed = 3"),
            "unknown field `speed`",
        ),
        (
            with("size_mib = 2", "size_mib = 0"),
            "size_mib = 0: it must be from 0.015625 to 1048576",
        ),
        (with("size_mib = 2", ""), "missing field `size_mib`"),
        (with("up_mbit = 20", "up_mbit = nan"), "group.up_mbit = NaN"),
        (
            with("count = 6", "count = 0"),
            "group.count = 0: it must be from 1 to",
        ),
        (
            with("count = 6", "count = 6\nmanner = \"lies\""),
            "unknown variant `lies`",
        ),
        (
            with("count = 6", "count = 6\nsite = \"x\""),
            "group.site = x: it must be the name of a site",
        ),
        (
            with("\"publisher\"\nup", "\"puller\"\nup"),
            "publisher in the first group",
        ),
        (
            with("size_mib = 2", "size_mib = 2\ndegree = 20\ndegree_max = 10"),
            "degree_max = 10: it must be from 20 to 256",
        ),
        (
            format!("{PLAN}[churn]\nfraction = 2\nfrom_s = 1\nuntil_s = 2\naway_s = 1"),
            "churn.fraction = 2",
        ),
        (
            format!("{PLAN}[sweep]\ngroup = \"all\"\ncount = [1]"),
            "sweep.group = all: it must be the name of a group",
        ),
        ("#".repeat(1 << 17), "at most 65536"),
    ] {
        let error = error(&text);
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn a_sweep_is_one_plan_for_each_count() {
    let plans = parse(
        "n",
        &format!("{PLAN}[sweep]\ngroup = \"pullers\"\ncount = [1, 5]"),
    );
    let sizes: Vec<_> = plans
        .expect("right")
        .iter()
        .map(|plan| plan.members.len())
        .collect();
    assert_eq!(sizes, [2, 6]);
}

#[test]
fn the_least_time_counts_links_between_sites() {
    let sites = r#"
[[site]]
name = "office"
up_mbit = 8
down_mbit = 8
latency_ms = 10
[[site]]
name = "lab"
up_mbit = 8
down_mbit = 4
latency_ms = 10
"#;
    let placed = PLAN
        .replacen(
            "\"publisher\"\nup",
            "\"publisher\"\nsite = \"office\"\nup",
            1,
        )
        .replacen("count = 6", "count = 6\nsite = \"lab\"", 1);
    let plan = one(&(placed + sites));
    let expected = f64::from(2 << 20) / (4e6 / 8.0);
    assert!((plan.bound() - expected).abs() < 1e-9, "{}", plan.bound());
    let report = plan.run().expect("sound");
    assert_eq!(report.unfinished, 0);
    let into_lab = report.sites[1].2;
    assert!(into_lab >= 2 << 20, "{into_lab}");
    // What leaves one of two sites comes into the other.
    assert_eq!(report.sites[0].1, into_lab);
}

#[test]
fn the_killed_come_back_and_finish_with_what_they_had() {
    let mut text = PLAN.replacen("size_mib = 2", "size_mib = 8", 1);
    text += "[churn]\nfraction = 1\nfrom_s = 0.5\nuntil_s = 2\naway_s = 1";
    let report = one(&text).run().expect("sound");
    assert_eq!(report.unfinished, 0);
    // A node that lost all would fetch much of it twice.
    assert!(report.duplicates < 0.02, "{report}");
    assert!(report.last() > report.bound + 1.0, "{report}");
}

#[test]
fn who_joins_late_finishes_too() {
    let text = PLAN.replacen("count = 6", "count = 6\njoin_s = 3", 1);
    let report = one(&text).run().expect("sound");
    assert_eq!(report.unfinished, 0);
    assert!(report.finished[0] > 3.0, "{report}");
}
