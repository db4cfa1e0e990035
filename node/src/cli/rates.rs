//! `capsule rates`: caps of what is sent and received, and their hours.

use capsule_node::control::{PeersWhere, RateInfo, RateList, Rates};
use capsule_swarm::{Rate, Schedule, ScheduleError};
use clap::Args;
use jiff::{Timestamp, tz::TimeZone};

use super::context::{Context, Output};
use super::exit::Exit;
use super::style::Style;
use super::table::Table;

/// Show or set how fast the node may send and receive, at which hours of the day
///
/// Without options it shows what holds now. What is set holds at once, and over restarts. Hours are this machine's local time.
#[derive(Debug, Args)]
pub struct RatesArgs {
    /// Most that is sent: a rate, then other rates for hours of the day, such as "5 Mbit/s, 22:00-06:00 unlimited"
    #[arg(long, value_name = "RATES", value_parser = schedule)]
    upload: Option<Schedule>,
    /// Most that is received
    #[arg(long, value_name = "RATES", value_parser = schedule)]
    download: Option<Schedule>,
    /// Only to and from peers within this machine's site
    #[arg(long, conflicts_with = "beyond")]
    within: bool,
    /// Only to and from peers beyond it
    #[arg(long)]
    beyond: bool,
    #[command(flatten)]
    output: Output,
}

/// Runs the command.
pub fn run(args: RatesArgs, context: &Context) -> Result<(), Exit> {
    let peers = match (args.within, args.beyond) {
        (true, _) => Some(PeersWhere::Within),
        (_, true) => Some(PeersWhere::Beyond),
        _ => None,
    };
    if peers.is_some() && args.upload.is_none() && args.download.is_none() {
        let message = "--within and --beyond say of which peers rates are set: give --upload RATES or --download RATES with them";
        return Err(Exit::Usage(message.to_owned()));
    }
    let rates = context.ask(Rates {
        upload: args.upload,
        download: args.download,
        peers,
    })?;
    args.output.print(&rates, render)
}

fn schedule(text: &str) -> Result<Schedule, ScheduleError> {
    text.parse()
}

fn render(list: &RateList, style: Style) -> String {
    let mut table = Table::new(&["DIRECTION", "PEERS", "NOW", "NEXT", "SET"]);
    for rate in &list.rates {
        let next = rate
            .next_change
            .map(|at| format!("{} at {}", cap(rate.next_cap), clock(at)));
        table.row([
            rate.direction.clone(),
            whom(rate.peers).to_owned(),
            cap(rate.cap),
            next.unwrap_or_default(),
            rate.schedule.clone(),
        ]);
    }
    table.render(style)
}

/// One that holds, in a line of `status`.
pub fn in_words(rate: &RateInfo) -> String {
    let until = rate
        .next_change
        .map_or_else(String::new, |at| format!(" until {}", clock(at)));
    format!(
        "{} {} {}{until}",
        rate.direction,
        whom(rate.peers),
        cap(rate.cap)
    )
}

const fn whom(peers: PeersWhere) -> &'static str {
    match peers {
        PeersWhere::Within => "within the site",
        PeersWhere::Beyond => "beyond",
    }
}

fn cap(bits: Option<u64>) -> String {
    bits.map_or_else(
        || "unlimited".to_owned(),
        |bits| {
            Rate::from_bits(bits).map_or_else(|_| format!("{bits} bit/s"), |rate| rate.to_string())
        },
    )
}

/// The local time of day.
fn clock(unix: u64) -> String {
    let time = i64::try_from(unix).ok();
    let time = time.and_then(|time| Timestamp::from_second(time).ok());
    time.map_or_else(String::new, |time| {
        time.to_zoned(TimeZone::system())
            .strftime("%H:%M")
            .to_string()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(next: Option<(u64, Option<u64>)>) -> RateInfo {
        RateInfo {
            direction: "upload".into(),
            peers: PeersWhere::Beyond,
            schedule: "5 Mbit/s, 22:00-06:00 unlimited".into(),
            cap: Some(5_000_000),
            next_change: next.map(|(at, _)| at),
            next_cap: next.and_then(|(_, cap)| cap),
        }
    }

    #[test]
    fn the_cap_now_and_the_next_are_told() {
        let list = RateList {
            rates: vec![rate(Some((1_800_000_000, None)))],
        };
        let text = render(&list, Style::PLAIN);
        let next = format!("unlimited at {}", clock(1_800_000_000));
        assert!(
            text.contains(&next) && text.contains("5 Mbit/s, 22:00-06:00"),
            "{text}"
        );
        assert_eq!(in_words(&rate(None)), "upload beyond 5 Mbit/s");
        let until = in_words(&rate(Some((1_800_000_000, None))));
        assert!(
            until.starts_with("upload beyond 5 Mbit/s until "),
            "{until}"
        );
    }
}
