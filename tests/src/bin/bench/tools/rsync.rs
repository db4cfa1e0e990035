//! rsync from a daemon, whole files.

use std::fs;
use std::process::Command;

use anyhow::Result;

use super::Job;
use crate::process::Process;
use crate::transfer::{Done, Meter, Transfer};

/// Measures it.
pub fn measure(job: &Job<'_>) -> Result<Transfer> {
    let (config, target) = (job.path("rsyncd.conf"), job.path(job.name()?));
    let (address, port) = (job.address.to_string(), job.free_port()?);
    let dir = job.source_dir()?.display();
    fs::write(
        &config,
        format!("use chroot = no\n[data]\npath = {dir}\nread only = yes\nuid = root\ngid = root\n"),
    )?;
    let mut server = Command::new("rsync");
    server.args(["--daemon", "--no-detach", "--address", &address]);
    server.args(["--port", &port.to_string()]);
    server.arg("--config").arg(&config);
    let mut server = Process::start(&mut server, &job.path("server.log"))?;
    server.wait_for_port(port, &job.deadline)?;
    let mut client = Command::new("rsync");
    let url = format!("rsync://{address}:{port}/data/{}", job.name()?);
    client.args(["--whole-file", &url]).arg(&target);
    let log = job.path("client.log");
    let (meter, mut client) = Meter::start_with(job.bytes()?, server.pid(), || {
        Process::start(&mut client, &log)
    })?;
    meter.finish(&mut client, Done::Ends, &target, &job.deadline)
}
