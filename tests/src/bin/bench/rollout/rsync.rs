//! rsync: all nodes fetch whole files from a daemon on the publisher, at the same time.

use std::fs;
use std::process::Command;

use anyhow::Result;

use super::crowd::{Done, Job};
use super::found::Found;

const PORT: u16 = 8730;

/// Rolls out once.
pub fn roll_out(job: &Job<'_>) -> Result<Found> {
    let address = job.lab.network.hosts[0].address;
    let config = job.place(0).join("rsyncd.conf");
    let dir = job.source.with_file_name("");
    fs::write(
        &config,
        format!(
            "use chroot = no\nmax connections = 0\n[data]\npath = {}\nread only = yes\nuid = root\ngid = root\n",
            dir.display()
        ),
    )?;
    let mut server = Command::new("rsync");
    server.args(["--daemon", "--no-detach", "--port", &PORT.to_string()]);
    server.arg("--config").arg(&config);
    let mut server = job.start(0, &mut server)?;
    let namespace = &job.lab.network.hosts[0].namespace;
    namespace.run(|| server.wait_for_port(PORT, &job.deadline))?;
    let name = job.target(0)?;
    let name = name.file_name().unwrap_or_default().to_string_lossy();
    let url = format!("rsync://{address}:{PORT}/data/{name}");
    let client = |node| {
        let mut client = Command::new("rsync");
        client.args(["--whole-file", &url]).arg(job.target(node)?);
        Ok(client)
    };
    job.roll_out(Some(server), client, Done::Ends)
}
