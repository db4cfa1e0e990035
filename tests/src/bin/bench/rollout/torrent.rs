//! BitTorrent: a seeder that has checked its data, a tracker beside it, and a client on each node that seeds until all are done.

use std::fs;

use anyhow::Result;

use super::crowd::{Done, Job};
use super::found::Found;
use crate::tools::bittorrent::{self, Client, Company, End};
use crate::tools::script;
use crate::tools::tracker::Tracker;

/// Node 0 listens here, the others from here on.
const FIRST_PORT: u16 = 6881;

/// Rolls out once.
pub fn roll_out(client: Client, job: &Job<'_>) -> Result<Found> {
    let hosts = &job.lab.network.hosts;
    let publisher = &hosts[0];
    let tracker = publisher
        .namespace
        .run(|| Tracker::start(publisher.address))?;
    let torrent = job.dir.join("torrent");
    bittorrent::torrent(&tracker, job.source, &torrent)?;
    let place = |node: usize| (job.place(node), job.place(node).join("into"));
    let port = |node: usize| FIRST_PORT + node as u16;
    let (home, dir) = (job.place(0), job.source.with_file_name(""));
    let mut seeder = client.command(&End {
        address: publisher.address,
        port: port(0),
        web: 0,
        torrent: &torrent,
        data: &dir,
        home,
        hook: None,
        company: Company::Many,
    })?;
    let mut seeder = job.start(0, &mut seeder)?;
    job.deadline
        .wait("the seeder's check of its own data", || {
            seeder.check_runs()?;
            Ok(client.is_ready(&seeder, tracker.told(port(0))))
        })?;
    publisher
        .namespace
        .run(|| seeder.wait_for_port(port(0), &job.deadline))?;
    let leecher = |node: usize| {
        let (home, into) = place(node);
        let hook = home.join("hook");
        let told = job.told(node);
        script(&hook, &format!("#!/bin/sh\n: > '{}'\n", told.display()))?;
        let home = home.join("home");
        fs::create_dir(&home)?;
        client.command(&End {
            address: hosts[node].address,
            port: port(node),
            web: 0,
            torrent: &torrent,
            data: &into,
            home,
            hook: Some(&hook),
            company: Company::Many,
        })
    };
    job.roll_out(Some(seeder), leecher, Done::Tells)
}
