//! `capsule status`, `peers` and `hashes`: what the node is doing, with whom, and what it holds.

use std::time::Duration;

use capsule_node::control::{ConnectedPeer, HashList, Hashes, NodeStatus, PeerList, Peers, Status};
use capsule_proto::RootHash;
use clap::Args;

use super::context::{Context, Output, now};
use super::exit::{Exit, shell_word};
use super::format::{ago, date, duration, percent, plural, short, size};
use super::list::holding;
use super::progress;
use super::rates;
use super::style::Style;
use super::table::{Table, fields};

/// Show how the node is: identity, peers, store, transfers, troubles
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    output: Output,
}

/// List the connected peers
#[derive(Debug, Args)]
pub struct PeersArgs {
    /// Only those that announce this blob or component, and how much of it
    #[arg(long, value_name = "HASH")]
    have: Option<RootHash>,
    /// Whole ids
    #[arg(long)]
    long: bool,
    #[command(flatten)]
    output: Output,
}

/// List the root hashes that this node holds and announces
#[derive(Debug, Args)]
pub struct HashesArgs {
    #[command(flatten)]
    output: Output,
}

/// Runs `status`.
pub fn status(args: StatusArgs, context: &Context) -> Result<(), Exit> {
    args.output
        .print(&context.ask(Status {})?, |status, style| {
            render_status(status, style, now())
        })
}

/// Runs `peers`.
pub fn peers(args: PeersArgs, context: &Context) -> Result<(), Exit> {
    let peers = context.ask(Peers { have: args.have })?;
    if peers.peers.is_empty() {
        args.output.empty(match args.have {
            Some(_) => "no connected peer announces it",
            None => "no peer is connected: `capsule status` tells of troubles",
        });
    }
    args.output
        .print(&peers, |peers, style| render_peers(peers, style, args.long))
}

/// Runs `hashes`.
pub fn hashes(args: HashesArgs, context: &Context) -> Result<(), Exit> {
    let hashes = context.ask(Hashes {})?;
    if hashes.hashes.is_empty() {
        args.output.empty("nothing is held");
    }
    args.output.print(&hashes, render_hashes)
}

fn render_status(status: &NodeStatus, style: Style, now: u64) -> String {
    let mut sections = vec![fields(
        style,
        &[&identity(status)[..], &activity(status)].concat(),
    )];
    if !status.transfers.is_empty() {
        let line = |transfer: &capsule_node::control::TransferInfo| {
            format!(
                "{}  {}\n",
                transfer.capsule,
                progress::line(&transfer.progress)
            )
        };
        sections.push(
            style.bold("transfers\n") + &status.transfers.iter().map(line).collect::<String>(),
        );
    }
    if !status.follows.is_empty() {
        let mut table = Table::new(&["FOLLOWS", "NEWEST", "HERE", "SINCE", "TROUBLE"]);
        for follow in &status.follows {
            table.row([
                follow.channel.clone(),
                follow.newest.clone().unwrap_or_default(),
                if follow.newest.is_some() {
                    holding(follow.holding).to_owned()
                } else {
                    String::new()
                },
                ago(follow.since, now),
                follow.trouble.clone().unwrap_or_default(),
            ]);
        }
        sections.push(table.render(style));
    }
    if !status.bans.is_empty() {
        let mut table = Table::new(&["BANNED", "PEER", "UNTIL", "FOR"]);
        for ban in &status.bans {
            table.row([
                ban.name.clone().unwrap_or_default(),
                tail(&ban.peer).to_owned(),
                ban.until.map(date).unwrap_or_default(),
                ban.reason.clone(),
            ]);
        }
        sections.push(table.render(style));
    }
    if !status.troubles.is_empty() {
        let lines = status
            .troubles
            .iter()
            .map(|trouble| format!("- {}\n", super::style::printable(trouble)));
        sections.push(style.yellow("troubles") + "\n" + &lines.collect::<String>());
    }
    sections.join("\n")
}

fn identity(status: &NodeStatus) -> [(&'static str, String); 9] {
    let roles = if status.roles.is_empty() {
        "member".to_owned()
    } else {
        status.roles.join(", ")
    };
    let channels = match &status.channels {
        _ if !status.roles.iter().any(|role| role == "publisher") => String::new(),
        None => "all".to_owned(),
        Some(channels) => channels.join(", "),
    };
    [
        ("home", shell_word(&status.home)),
        (
            "machine",
            format!("{} ({})", status.machine_name, short(&status.machine)),
        ),
        ("fleet", status.fleet.clone()),
        ("network id", status.peer.clone()),
        ("roles", roles),
        ("may publish to", channels),
        ("credential ends", date(status.credential_expires)),
        ("site", status.site.clone().unwrap_or_default()),
        ("version", status.version.clone()),
    ]
}

fn activity(status: &NodeStatus) -> [(&'static str, String); 8] {
    let banned = if status.banned > 0 {
        format!(", {} banned", status.banned)
    } else {
        String::new()
    };
    let partial = if status.partial > 0 {
        format!(", {} in part", status.partial)
    } else {
        String::new()
    };
    let quota = status
        .quota
        .map(|quota| format!(" of {}", size(quota)))
        .unwrap_or_default();
    [
        ("listening", status.listening.join(" ")),
        ("running for", duration(Duration::from_secs(status.uptime))),
        ("peers", format!("{} connected{banned}", status.peers)),
        ("capsules", format!("{} complete{partial}", status.capsules)),
        (
            "store",
            format!(
                "{}{quota}, {} free on the disk",
                size(status.store_bytes),
                size(status.free_bytes)
            ),
        ),
        ("records", status.records.to_string()),
        (
            "moved",
            format!(
                "{} sent, {} received",
                size(status.sent_bytes),
                size(status.received_bytes)
            ),
        ),
        (
            "caps",
            status
                .caps
                .iter()
                .map(rates::in_words)
                .collect::<Vec<_>>()
                .join("; "),
        ),
    ]
}

fn render_peers(list: &PeerList, style: Style, long: bool) -> String {
    let mut table = Table::new(&[
        "NAME",
        "PEER",
        "ADDRESS",
        "SITE",
        "ROLES",
        ">RTT",
        ">IN/s",
        ">OUT/s",
        ">RECEIVED",
        ">SENT",
        ">BLOBS",
        ">HAS",
        ">FOR",
    ]);
    for peer in &list.peers {
        let has = match (peer.have, peer.have_of) {
            (Some(have), Some(of)) => percent(have, of),
            (Some(have), None) => size(have),
            _ => String::new(),
        };
        table.row([
            peer.name.clone(),
            // The beginning is the same for all Ed25519 keys.
            if long {
                peer.peer.clone()
            } else {
                tail(&peer.peer).to_owned()
            },
            peer.address.clone(),
            site(peer),
            peer.roles.join(", "),
            peer.rtt
                .map(|rtt| format!("{:.1} ms", rtt * 1000.0))
                .unwrap_or_default(),
            size(peer.rate_in),
            size(peer.rate_out),
            size(peer.bytes_in),
            size(peer.bytes_out),
            peer.blobs.to_string(),
            has,
            duration(Duration::from_secs(peer.connected)),
        ]);
    }
    if list.peers.is_empty() {
        String::new()
    } else {
        table.render(style)
    }
}

/// A site's label; without one only whether it is another.
fn site(peer: &ConnectedPeer) -> String {
    let unnamed = if peer.beyond { "another" } else { "" };
    peer.site.clone().unwrap_or_else(|| unnamed.to_owned())
}

/// The last characters of a network id.
fn tail(id: &str) -> &str {
    id.len()
        .checked_sub(12)
        .and_then(|at| id.get(at..))
        .unwrap_or(id)
}

fn render_hashes(list: &HashList, style: Style) -> String {
    let mut table = Table::new(&["ROOT HASH", "KIND", ">SIZE", ">HERE", ">SENT", ">RECEIVED"]);
    for held in &list.hashes {
        table.row([
            held.root.to_string(),
            held.kind.clone(),
            size(held.size),
            percent(held.have, held.size),
            size(held.sent),
            size(held.received),
        ]);
    }
    if list.hashes.is_empty() {
        return String::new();
    }
    let bytes = list.hashes.iter().map(|held| held.have).sum();
    let count = plural(list.hashes.len() as u64, "hash").replace("hashs", "hashes");
    table.render(style) + &style.dim(&format!("{count}, {}", size(bytes))) + "\n"
}

#[cfg(test)]
mod tests {
    use capsule_node::control::HeldHash;

    use super::*;

    #[test]
    fn peers_show_what_they_have_only_when_asked() {
        let mut peer = ConnectedPeer {
            peer: "12D3KooWAbcdefghijkl".into(),
            name: "pc-7".into(),
            machine: "00".into(),
            roles: Vec::new(),
            address: "/ip4/127.0.0.1/tcp/4000".into(),
            site: None,
            beyond: true,
            dialled: true,
            rtt: Some(0.0012),
            rate_in: 0,
            rate_out: 0,
            bytes_in: 0,
            bytes_out: 0,
            blobs: 3,
            connected: 61,
            have: None,
            have_of: None,
        };
        let text = render_peers(
            &PeerList {
                peers: vec![peer.clone()],
            },
            Style::PLAIN,
            false,
        );
        assert!(
            !text.contains("HAS")
                && text.contains("another")
                && text.contains("Abcdefghijkl")
                && text.contains("1.2 ms"),
            "{text}"
        );
        (peer.have, peer.have_of) = (Some(50), Some(100));
        assert!(
            render_peers(&PeerList { peers: vec![peer] }, Style::PLAIN, false).contains("50 %")
        );
    }

    #[test]
    fn hashes_end_with_a_sum() {
        let root = RootHash::of(b"x");
        let held = HeldHash {
            root,
            kind: "pack".into(),
            size: 2048,
            have: 1024,
            sent: 0,
            received: 1024,
        };
        let text = render_hashes(&HashList { hashes: vec![held] }, Style::PLAIN);
        assert!(
            text.contains("50 %") && text.ends_with("1 hash, 1.00 KiB\n"),
            "{text}"
        );
    }
}
