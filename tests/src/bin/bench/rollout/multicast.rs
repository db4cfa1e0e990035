//! udpcast: one sender, whose packets reach all nodes of its network at once; who misses some asks for them again.

use std::process::Command;

use anyhow::{Result, ensure};

use super::crowd::{Done, Job};
use super::found::Found;

/// What of the slowest link it may use: a sender without a limit overruns queues, and spends its time on sending again.
const PART: f64 = 0.95;
/// Both directions at once, as on switched networks; its own notes advise so there.
const SENDER: [&str; 4] = ["--full-duplex", "--nokbd", "--no-progress", "--interface"];
const RECEIVER: [&str; 5] = [
    "--nosync",
    "--nokbd",
    "--no-progress",
    "--interface",
    "eth0",
];

/// Rolls out once.
pub fn roll_out(job: &Job<'_>) -> Result<Found> {
    ensure!(
        job.lab.scenario.sites.len() == 1,
        "multicast does not leave its network"
    );
    let hosts = &job.lab.network.hosts;
    let slowest = hosts[1..].iter().map(|host| host.rate.down);
    let mbit = slowest.fold(hosts[0].rate.up, f64::min) * PART;
    let pullers = job.pullers().to_string();
    let command = |node| {
        if node > 0 {
            let mut receiver = Command::new("udp-receiver");
            receiver.args(RECEIVER).arg("--file").arg(job.target(node)?);
            return Ok(receiver);
        }
        let mut sender = Command::new("udp-sender");
        sender
            .args(SENDER)
            .arg("eth0")
            .arg("--file")
            .arg(job.source);
        // It begins when all are there.
        sender.args(["--min-receivers", &pullers]);
        sender.args(["--max-bitrate", &format!("{}k", (mbit * 1000.0) as u64)]);
        Ok(sender)
    };
    job.roll_out(None, command, Done::Ends)
}
