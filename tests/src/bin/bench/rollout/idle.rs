//! What nodes cost that have nothing to do: packets on their links, CPU, memory.

use std::time::Duration;

use anyhow::{Result, ensure};
use capsule_tests::accounts::{Machine, cpu_of, resident_of};
use capsule_tests::lab::{Lab, Scenario};
use serde::Serialize;

use crate::Setting;
use crate::capsule::pid;
use crate::report::{Column, Limit, Report, Table, Target};
use crate::series::Series;
use crate::tools::empty_dir;

/// How long after all have found each other they count as settled.
const SETTLING: Duration = Duration::from_secs(60);
/// To reach, a node: packets a second, sent and received, and percent of a CPU.
const PACKETS: f64 = 2.0;
const CPU_PERCENT: f64 = 0.1;

const COLUMNS: [Column; 6] = [
    Column::plain("nodes", "nodes", 0),
    Column::plain("packets/s", "packets_per_second", 3),
    Column::plain("B/s", "bytes_per_second", 0),
    Column::plain("CPU %", "cpu_percent", 3),
    Column::mib("resident MiB", "resident_bytes"),
    Column::percent("busy %", "machine_busy", 0),
];

/// What a node used.
#[derive(Debug, Clone, Copy, Serialize)]
struct Node {
    packets_per_second: f64,
    bytes_per_second: f64,
    cpu_percent: f64,
    resident_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Found {
    nodes: Vec<Node>,
    machine_busy: f64,
}

impl Found {
    fn mean(&self, figure: impl Fn(&Node) -> f64) -> f64 {
        self.nodes.iter().map(figure).sum::<f64>() / self.nodes.len() as f64
    }

    fn most(&self, figure: impl Fn(&Node) -> f64) -> f64 {
        self.nodes.iter().map(figure).fold(0.0, f64::max)
    }
}

/// Watches the nodes of a scenario for a while after settling, once.
pub fn run(
    setting: &Setting,
    scenario: &Scenario,
    seconds: u64,
    report: &mut Report,
) -> Result<()> {
    eprintln!("{}: setting up {} nodes", scenario.title, scenario.nodes());
    let lab = Lab::unmeasured(scenario.clone())?;
    let mut series = Series::new("mean of the nodes");
    series.measure(&scenario.title, || watch(setting, &lab, seconds));
    let title = format!("{}, watched for {seconds} s after settling", scenario.title);
    let mut table = Table::new(title, &COLUMNS);
    let figures = |of: &dyn Fn(&Found, fn(&Node) -> f64) -> f64| {
        vec![
            series.median(|found| found.nodes.len() as f64),
            series.median(|found| of(found, |node| node.packets_per_second)),
            series.median(|found| of(found, |node| node.bytes_per_second)),
            series.median(|found| of(found, |node| node.cpu_percent)),
            series.median(|found| of(found, |node| node.resident_bytes as f64)),
            series.median(|found| found.machine_busy),
        ]
    };
    let mean = figures(&|found, figure| found.mean(figure));
    table.target(Target {
        what: "packets sent and received, a node and second".into(),
        found: mean[1],
        limit: Limit::Below(PACKETS),
        unit: "",
    });
    table.target(Target {
        what: "CPU of a node".into(),
        found: mean[3],
        limit: Limit::Below(CPU_PERCENT),
        unit: "%",
    });
    table.row(&series, mean);
    if series.failed.is_none() {
        table.part("the busiest", figures(&|found, figure| found.most(figure)));
    }
    table.note("nothing was published; packets that reach all nodes count at each of them");
    report.tables.push(table);
    Ok(())
}

fn watch(setting: &Setting, lab: &Lab, seconds: u64) -> Result<Found> {
    let dir = setting.scratch.join("leg");
    empty_dir(&dir)?;
    let nodes = lab.fleet(&dir)?;
    std::thread::sleep(SETTLING);
    let cpu = || -> Vec<f64> { nodes.iter().map(|node| cpu_of(pid(node))).collect() };
    let (carried, used, machine) = (lab.network.counters()?, cpu(), Machine::watch());
    std::thread::sleep(Duration::from_secs(seconds));
    let (carried_after, used_after) = (lab.network.counters()?, cpu());
    let machine_busy = machine.busy();
    let span = seconds as f64;
    let found = |number: usize| {
        let carried = carried_after.hosts[number].since(carried.hosts[number]);
        Node {
            packets_per_second: (carried.up_packets + carried.down_packets) as f64 / span,
            bytes_per_second: (carried.up + carried.down) as f64 / span,
            cpu_percent: 100.0 * (used_after[number] - used[number]) / span,
            resident_bytes: resident_of(pid(&nodes[number])),
        }
    };
    let found: Vec<Node> = (0..nodes.len()).map(found).collect();
    // A node that ended would seem to use nothing.
    ensure!(
        found.iter().all(|node| node.resident_bytes > 0),
        "a node ended while it was watched"
    );
    Ok(Found {
        nodes: found,
        machine_busy,
    })
}
