//! What nodes cost that have nothing to do: packets on their links, CPU, memory.

use std::time::Duration;

use anyhow::{Result, ensure};
use capsule_tests::accounts::{Machine, cpu_of, resident_of};
use capsule_tests::lab::fleet::Fleet;
use capsule_tests::lab::{Lab, Scenario};
use serde::Serialize;

use crate::Setting;
use crate::capsule::pid;
use crate::report::{Column, Limit, Table, Target};
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct Node {
    packets_per_second: f64,
    bytes_per_second: f64,
    cpu_percent: f64,
    resident_bytes: f64,
}

#[derive(Debug, Serialize)]
struct Found {
    nodes: Vec<Node>,
    machine_busy: f64,
}

impl Found {
    /// Each figure's mean.
    fn mean(&self) -> Node {
        let nodes = self.nodes.len() as f64;
        self.fold(|a, b| a + b).map(|sum| sum / nodes)
    }

    /// Each figure's largest.
    fn most(&self) -> Node {
        self.fold(f64::max)
    }

    fn fold(&self, two: fn(f64, f64) -> f64) -> Node {
        let nodes = self.nodes.iter().copied();
        let fold = |a: Node, b: Node| Node {
            packets_per_second: two(a.packets_per_second, b.packets_per_second),
            bytes_per_second: two(a.bytes_per_second, b.bytes_per_second),
            cpu_percent: two(a.cpu_percent, b.cpu_percent),
            resident_bytes: two(a.resident_bytes, b.resident_bytes),
        };
        nodes.reduce(fold).unwrap_or_default()
    }
}

impl Node {
    fn map(self, figure: impl Fn(f64) -> f64) -> Self {
        Self {
            packets_per_second: figure(self.packets_per_second),
            bytes_per_second: figure(self.bytes_per_second),
            cpu_percent: figure(self.cpu_percent),
            resident_bytes: figure(self.resident_bytes),
        }
    }
}

/// Watches the nodes of a scenario for a while after settling, once.
pub fn run(setting: &Setting, scenario: &Scenario, seconds: u64) -> Result<Table> {
    eprintln!("{}: setting up {} nodes", scenario.title, scenario.nodes());
    let lab = Lab::unmeasured(scenario.clone())?;
    let mut series = Series::new("mean of the nodes");
    series.measure(&scenario.title, || watch(setting, &lab, seconds));
    let title = format!("{}, watched for {seconds} s after settling", scenario.title);
    let mut table = Table::new(title, &COLUMNS);
    let figures = |of: fn(&Found) -> Node| {
        vec![
            series.median(|found| found.nodes.len() as f64),
            series.median(|found| of(found).packets_per_second),
            series.median(|found| of(found).bytes_per_second),
            series.median(|found| of(found).cpu_percent),
            series.median(|found| of(found).resident_bytes),
            series.median(|found| found.machine_busy),
        ]
    };
    let mean = figures(Found::mean);
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
        table.part("the busiest", figures(Found::most));
    }
    table.note("nothing was published; packets that reach all nodes count at each of them");
    Ok(table)
}

fn watch(setting: &Setting, lab: &Lab, seconds: u64) -> Result<Found> {
    let dir = setting.scratch.join("leg");
    empty_dir(&dir)?;
    let nodes = Fleet::start(lab, &dir)?.nodes;
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
            resident_bytes: resident_of(pid(&nodes[number])) as f64,
        }
    };
    let found: Vec<Node> = (0..nodes.len()).map(found).collect();
    // A node that ended would seem to use nothing.
    ensure!(
        found.iter().all(|node| node.resident_bytes > 0.0),
        "a node ended while it was watched"
    );
    Ok(Found {
        nodes: found,
        machine_busy,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_and_extremes_are_of_each_figure() {
        let node = |packets, cpu| Node {
            packets_per_second: packets,
            cpu_percent: cpu,
            ..Node::default()
        };
        let found = Found {
            nodes: vec![node(1.0, 0.2), node(3.0, 0.1), node(2.0, 0.0)],
            machine_busy: 0.5,
        };
        assert_eq!(found.mean().packets_per_second, 2.0);
        assert!((found.mean().cpu_percent - 0.1).abs() < 1e-9);
        assert_eq!(found.most(), node(3.0, 0.2));
    }
}
