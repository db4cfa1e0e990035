//! Caps of rates: which hold now, by the schedules that people set and this machine's time of day.
//!
//! The network is told whenever they change. Here is the only place that knows local time.

use std::sync::Arc;
use std::time::Duration;

use capsule_swarm::{Caps, Rate, Schedule};
use jiff::Zoned;
use jiff::civil::Time;
use tokio::sync::{Mutex, watch};

use crate::control::{self, Failure, FailureCode, PeersWhere, RateInfo, RateList};
use crate::home::{HomeError, Rates};
use crate::node::Node;
use crate::work::blocking;

/// Longest sleep between looks at the time: a clock may be set, and a machine wake up.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// The rates that people set, and who waits for them to change.
#[derive(Debug)]
pub struct RateKeeper {
    set: watch::Sender<Rates>,
    /// One change at a time is saved and applied.
    saving: Mutex<()>,
}

impl RateKeeper {
    /// With what was set before.
    pub fn new(rates: Rates) -> Self {
        Self {
            set: watch::Sender::new(rates),
            saving: Mutex::new(()),
        }
    }

    /// Those that cap something now.
    pub fn in_force(&self) -> Vec<RateInfo> {
        let mut list = list(&self.set.borrow(), &Zoned::now());
        list.retain(|rate| rate.cap.is_some());
        list
    }
}

/// Answers `rates`: changes what is asked for, and tells what there is.
pub async fn rates(node: &Arc<Node>, request: control::Rates) -> Result<RateList, Failure> {
    if request.upload.is_some() || request.download.is_some() {
        // Whoever asked may go away in the middle.
        let changing = tokio::spawn(save_and_apply(node.clone(), request));
        match changing.await {
            Ok(changed) => changed?,
            Err(error) => {
                // Else the runtime ends, and whoever asked with it.
                if let Ok(panic) = error.try_into_panic() {
                    std::panic::resume_unwind(panic);
                }
            }
        }
    }
    let rates = list(&node.rates.set.borrow(), &Zoned::now());
    Ok(RateList { rates })
}

async fn save_and_apply(node: Arc<Node>, request: control::Rates) -> Result<(), Failure> {
    let keeper = &node.rates;
    let _saving = keeper.saving.lock().await;
    let mut rates = keeper.set.borrow().clone();
    change(&mut rates, request);
    let (home, saved) = (node.home.clone(), rates.clone());
    let failed = |error: HomeError| {
        Failure::new(FailureCode::Io, error.to_string()).hint("the rates are as they were")
    };
    blocking(move || home.save_rates(&saved).map_err(failed)).await?;
    keeper.set.send_replace(rates);
    apply(&node).await?;
    Ok(())
}

fn change(rates: &mut Rates, request: control::Rates) {
    let set = |schedule: Option<Schedule>, [within, beyond]: [&mut Schedule; 2]| {
        let Some(schedule) = schedule else { return };
        if request.peers != Some(PeersWhere::Beyond) {
            within.clone_from(&schedule);
        }
        if request.peers != Some(PeersWhere::Within) {
            *beyond = schedule;
        }
    };
    set(
        request.upload,
        [&mut rates.upload_within, &mut rates.upload_beyond],
    );
    set(
        request.download,
        [&mut rates.download_within, &mut rates.download_beyond],
    );
}

/// Has the caps of this minute hold.
pub async fn apply(node: &Node) -> Result<[Caps; 2], Failure> {
    let caps = node.rates.set.borrow().at(minute(&Zoned::now()));
    let [upload, download] = caps;
    node.network.set_caps(upload, download).await?;
    Ok(caps)
}

/// Has other caps hold when their hours begin. Runs until the network ends.
pub async fn follow_hours(node: Arc<Node>) {
    let mut set = node.rates.set.subscribe();
    let mut applied = None;
    loop {
        let saving = node.rates.saving.lock().await;
        let now = Zoned::now();
        let caps = node.rates.set.borrow().at(minute(&now));
        if applied != Some(caps) {
            if apply(&node).await.is_err() {
                return;
            }
            if applied.is_some() {
                tracing::info!("other caps of rates hold from now on: see `capsule rates`");
            }
            applied = Some(caps);
        }
        drop(saving);
        // Hours begin with a minute.
        let into = Duration::from_secs(u64::from(now.second().unsigned_abs()));
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY.saturating_sub(into)) => {}
            // Whoever set them knows.
            _ = set.changed() => applied = None,
        }
    }
}

/// Minutes since local midnight.
fn minute(now: &Zoned) -> u16 {
    // From 0 to 23, and 0 to 59.
    60 * now.hour().unsigned_abs() as u16 + now.minute().unsigned_abs() as u16
}

fn list(rates: &Rates, now: &Zoned) -> Vec<RateInfo> {
    let of = |direction: &str, peers, schedule: &Schedule| {
        let minute = minute(now);
        let next = schedule.next_change(minute);
        RateInfo {
            direction: direction.to_owned(),
            peers,
            schedule: schedule.to_string(),
            cap: schedule.at(minute).map(Rate::bits),
            next_cap: next.and_then(|(_, cap)| cap).map(Rate::bits),
            next_change: next.and_then(|(at, _)| next_time(now, at)),
        }
    };
    vec![
        of("upload", PeersWhere::Within, &rates.upload_within),
        of("upload", PeersWhere::Beyond, &rates.upload_beyond),
        of("download", PeersWhere::Within, &rates.download_within),
        of("download", PeersWhere::Beyond, &rates.download_beyond),
    ]
}

/// When it is that minute of the day next, in seconds since 1970. A minute that a clock put forward leaves out is that much later.
fn next_time(now: &Zoned, minute: u16) -> Option<u64> {
    let time = Time::new((minute / 60) as i8, (minute % 60) as i8, 0, 0).ok()?;
    let today = now.date().to_datetime(time);
    let next = if today > now.datetime() {
        today
    } else {
        now.date().tomorrow().ok()?.to_datetime(time)
    };
    let at = next.to_zoned(now.time_zone().clone()).ok()?;
    u64::try_from(at.timestamp().as_second()).ok()
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;

    use super::*;

    /// A zone whose clocks are put forward at 02:00 on 28 March 2027, and back at 03:00 on 31 October.
    fn zoned(text: &str) -> Zoned {
        let zone = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        let civil: jiff::civil::DateTime = text.parse().unwrap();
        civil.to_zoned(zone).unwrap()
    }

    fn rates(upload_beyond: &str) -> Rates {
        Rates {
            upload_beyond: upload_beyond.parse().unwrap(),
            ..Rates::default()
        }
    }

    #[test]
    fn the_next_change_is_told_as_a_time_also_where_clocks_are_changed() {
        let rates = rates("5 Mbit/s, 22:00-06:00 unlimited");
        let next = |now: &str| {
            let info = &list(&rates, &zoned(now))[1];
            (info.cap, info.next_change, info.next_cap)
        };
        let at = |text: &str| Some(zoned(text).timestamp().as_second() as u64);
        assert_eq!(
            next("2026-11-28T12:00:30"),
            (Some(5_000_000), at("2026-11-28T22:00:00"), None)
        );
        assert_eq!(
            next("2026-11-28T22:00:00"),
            (None, at("2026-11-29T06:00:00"), Some(5_000_000))
        );
        // A night of seven hours, and one of nine.
        let length = |from: &str| {
            let (_, until, _) = next(from);
            until.unwrap() - at(from).unwrap()
        };
        assert_eq!(length("2027-03-27T22:00:00"), 7 * 3600);
        assert_eq!(length("2027-10-30T22:00:00"), 9 * 3600);
    }

    #[test]
    fn a_request_changes_what_it_names_and_nothing_else() {
        let request = |peers| control::Rates {
            upload: Some("1 Mbit/s".parse().unwrap()),
            download: None,
            peers,
        };
        let capped = |peers| {
            let mut changed = rates("2 Mbit/s");
            change(&mut changed, request(peers));
            let all = [
                changed.upload_within,
                changed.upload_beyond,
                changed.download_within,
                changed.download_beyond,
            ];
            all.map(|schedule| schedule.to_string())
        };
        let free = "unlimited";
        assert_eq!(capped(None), ["1 Mbit/s", "1 Mbit/s", free, free]);
        assert_eq!(
            capped(Some(PeersWhere::Within)),
            ["1 Mbit/s", "2 Mbit/s", free, free]
        );
        assert_eq!(
            capped(Some(PeersWhere::Beyond)),
            [free, "1 Mbit/s", free, free]
        );
    }
}
