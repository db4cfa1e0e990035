//! Which connection gives way when there are too many. No sockets, no clock.
//!
//! Two wishes pull at it. A late joiner must get in, wherever it knocks; and a transfer must not break because somebody
//! knocks. So connections differ by what they are good for just now ([`Use`]):
//!
//! 1. Idle ones give way first, and among them those that have had time to become useful and did not.
//! 2. Then those that only take from us, once they have had their turn ([`TURN`]), the longest first: what they lack
//!    they get elsewhere, or when they come again. So a place is free within a turn, however many wait.
//! 3. Those that give us what we fetch do not, up to [`kept`] of them: the best. Beyond, they have turns as well.
//! 4. If nobody is left who may, the newcomer itself has to try again later.
//!
//! And nobody takes all places by coming in numbers: who enrols machines by the hundred with one token, or connects by the
//! hundred from one address, has at most half of them while others are there; beyond, its machines only replace each other.

use std::net::IpAddr;
use std::time::Duration;

use capsule_proto::credential::TokenId;
use capsule_swarm_core::PeerKey;

/// How long a connection that is used may stay in any case. A machine at 20 Mbit/s takes 75 MB in that time; and at 24 places
/// one becomes free about every second.
const TURN: Duration = Duration::from_secs(30);

/// What a connection is good for just now; the least useful first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// Nothing is asked either way, or nothing moves though it is.
    Idle,
    /// The peer announces something that we fetch.
    Offers,
    /// We answer its requests.
    Takes,
    /// It answers ours.
    Gives,
}

/// One connection, as far as it matters here.
#[derive(Clone, Debug)]
pub struct Standing {
    pub key: PeerKey,
    pub token: TokenId,
    /// Where it is; `None` for this machine, on which many nodes may be.
    pub address: Option<IpAddr>,
    pub age: Duration,
    pub good_for: Use,
    /// Bytes of content that it gave, and took.
    pub given: u64,
    pub taken: u64,
}

/// In which order connections give way; the first does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    Idle,
    Offers,
    /// It is used, but has had its turn.
    Had,
    Newcomer,
    /// It is used, and it is its turn.
    Has,
    Kept,
}

/// The connection that gives way to the newest, where there are more than `max`; which may be the newest itself.
pub fn gives_way(all: &[Standing], newest: PeerKey, max: usize) -> Option<PeerKey> {
    let newcomer = all.iter().find(|standing| standing.key == newest)?;
    let crowd = |other: &&Standing| {
        let same_token = other.token == newcomer.token;
        let same_address = newcomer.address.is_some() && other.address == newcomer.address;
        (same_token, same_address)
    };
    let by_token = all.iter().filter(|other| crowd(other).0).count() > max / 2;
    let by_address = all.iter().filter(|other| crowd(other).1).count() > max / 2;
    let mut givers: Vec<_> = all
        .iter()
        .filter(|standing| standing.good_for == Use::Gives)
        .collect();
    givers.sort_by_key(|standing| std::cmp::Reverse((standing.given, standing.age)));
    givers.truncate(kept(max));
    let turn = |standing: &Standing| match standing.good_for {
        _ if standing.key == newest => Turn::Newcomer,
        Use::Idle => Turn::Idle,
        Use::Offers => Turn::Offers,
        Use::Gives if givers.iter().any(|giver| giver.key == standing.key) => Turn::Kept,
        Use::Takes | Use::Gives if standing.age < TURN => Turn::Has,
        Use::Takes | Use::Gives => Turn::Had,
    };
    let rank = |standing: &&Standing| {
        let turn = turn(standing);
        // Of idle ones those that were of least use, if they had time to be; of others the oldest.
        let had_time = standing.age >= TURN;
        let use_so_far = match turn {
            Turn::Idle | Turn::Offers if had_time => standing.given + standing.taken,
            _ => 0,
        };
        (
            turn,
            !had_time,
            use_so_far,
            std::cmp::Reverse(standing.age),
            standing.key,
        )
    };
    all.iter()
        .filter(|other| !by_token || crowd(other).0)
        .filter(|other| !by_address || crowd(other).1)
        .min_by_key(rank)
        .map(|standing| standing.key)
}

/// How many of those that give us content keep their places in any case: two thirds, so that late joiners find the rest.
fn kept(max: usize) -> usize {
    max - max.div_ceil(3)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 24;
    const OLD: Duration = Duration::from_secs(300);
    const NEW: Duration = Duration::from_secs(3);
    const NEWEST: PeerKey = PeerKey(999);

    fn standing(key: u64, good_for: Use, age: Duration) -> Standing {
        Standing {
            key: PeerKey(key),
            // As many tokens as connections, unless a test says otherwise.
            token: TokenId(key.to_le_bytes()),
            address: None,
            age,
            good_for,
            given: 0,
            taken: 0,
        }
    }

    fn full(good_for: Use, age: Duration) -> Vec<Standing> {
        let mut all: Vec<_> = (0..MAX as u64)
            .map(|key| standing(key, good_for, age))
            .collect();
        all.push(standing(NEWEST.0, Use::Idle, Duration::ZERO));
        all
    }

    /// Who gives way to a newcomer.
    fn gone(all: &[Standing]) -> u64 {
        gives_way(all, NEWEST, MAX).expect("somebody").0
    }

    #[test]
    fn a_transfer_does_not_break_while_others_are_idle_or_newer() {
        for age in [OLD, NEW] {
            let mut all = full(Use::Gives, OLD);
            all[7] = standing(7, Use::Idle, age);
            assert_eq!(gone(&all), 7, "idle for {age:?}");
            all[7] = standing(7, Use::Takes, OLD);
            assert_eq!(gone(&all), 7, "it had its turn");
        }
        let mut all = full(Use::Takes, NEW);
        all[3] = standing(3, Use::Gives, OLD);
        assert_eq!(gone(&all), NEWEST.0, "nobody has had a turn");
    }

    #[test]
    fn newcomers_that_do_nothing_only_replace_each_other() {
        let mut all = full(Use::Takes, OLD);
        (0..8).for_each(|at| all[at] = standing(at as u64, Use::Gives, OLD));
        all[MAX - 1] = standing(23, Use::Idle, OLD);
        for newcomer in 1000..2000 {
            let at = all.len() - 1;
            all[at] = standing(newcomer, Use::Idle, Duration::ZERO);
            let gone = gives_way(&all, PeerKey(newcomer), MAX).expect("somebody");
            let idle = gone.0 == 23 || gone.0 >= 1000;
            assert!(idle && gone.0 != newcomer, "{gone:?} for {newcomer}");
            all.retain(|standing| standing.key != gone);
            for standing in &mut all {
                standing.age += Duration::from_millis(100);
            }
            all.push(standing(0, Use::Idle, Duration::ZERO));
        }
    }

    #[test]
    fn a_late_joiner_gets_in_within_a_turn_though_all_are_used() {
        for good_for in [Use::Takes, Use::Gives] {
            let mut all = full(good_for, Duration::ZERO);
            all.iter_mut()
                .for_each(|standing| standing.given = standing.key.0);
            let mut waited = Duration::ZERO;
            while gone(&all) == NEWEST.0 {
                waited += Duration::from_secs(1);
                all.iter_mut()
                    .filter(|standing| standing.key != NEWEST)
                    .for_each(|standing| standing.age = waited);
            }
            assert_eq!(waited, TURN);
            // Of the givers, one of those that gave least.
            assert!(gone(&all) < 8);
        }
    }

    #[test]
    fn who_has_had_the_longest_turn_goes_and_the_best_givers_stay() {
        let mut all = full(Use::Takes, OLD);
        all[5].age = OLD * 2;
        assert_eq!(gone(&all), 5);
        let mut all = full(Use::Gives, OLD);
        (0..MAX).for_each(|at| all[at].given = at as u64);
        all[2].age = OLD * 2;
        all[9].age = OLD * 3;
        assert_eq!(gone(&all), 2, "9 is among the best 16");
    }

    #[test]
    fn what_was_useful_stays_longest_among_the_idle() {
        let mut all = full(Use::Idle, OLD);
        (0..MAX).for_each(|at| all[at].given = 100 - at as u64);
        assert_eq!(gone(&all), 23);
        all[4] = standing(4, Use::Idle, NEW);
        assert_eq!(gone(&all), 23, "4 has not had time to be of use");
        all[11] = standing(11, Use::Offers, OLD);
        assert_eq!(gone(&all), 23);
    }

    #[test]
    fn one_token_or_address_has_half_of_the_places_while_others_are_there() {
        let token = |standing: &mut Standing| standing.token = TokenId([7; 8]);
        let address = |standing: &mut Standing| standing.address = Some([10, 0, 0, 7].into());
        for crowd in [&token as &dyn Fn(&mut Standing), &address] {
            // Idle ones of others', and a crowd of which one comes on top.
            let mut all = full(Use::Idle, OLD);
            all[..MAX / 2].iter_mut().for_each(|standing| {
                standing.good_for = Use::Takes;
                standing.age = NEW;
                crowd(standing);
            });
            crowd(&mut all[MAX]);
            assert_eq!(gone(&all), NEWEST.0, "none of the others'");
            all[3].age = OLD;
            assert_eq!(gone(&all), 3);
            // One fewer, and it is as welcome as anybody.
            all[3] = standing(3, Use::Idle, OLD);
            assert!((3..24).contains(&gone(&all)));
        }
        // A fleet of one token is no crowd.
        let mut all = full(Use::Idle, OLD);
        all.iter_mut().for_each(token);
        assert_ne!(gone(&all), NEWEST.0);
    }
}
