//! Measured rates: what links to peers and blobs' transfers do, in bytes a second.
//!
//! Only measures. What follows from a rate (windows, lateness) is decided where the rate is used.

use std::time::Duration;

use crate::Time;

/// Length of a sample: long against the jitter of a LAN, short against a transfer.
const SAMPLE: Duration = Duration::from_millis(100);
/// Memory of the average: some responses of a busy provider long, which come in bursts.
const MEMORY: f64 = 1.0;
/// Of a transit: length of one of the two spans that count, and the least time that tells a rate.
const SPAN: Duration = Duration::from_secs(10);
const TELLING: Duration = Duration::from_millis(100);

/// Exponentially weighted rate over the time in which something was expected.
#[derive(Clone, Debug, Default)]
pub(crate) struct RateMeter {
    rate: Option<f64>,
    /// Seconds measured before, up to [`MEMORY`].
    known: f64,
    bytes: u64,
    elapsed: Duration,
    busy_since: Option<Time>,
}

impl RateMeter {
    /// From now on bytes are expected; time counts.
    pub(crate) fn start(&mut self, now: Time) {
        self.busy_since.get_or_insert(now);
    }

    /// From now on none are expected; time does not count.
    pub(crate) fn stop(&mut self, now: Time) {
        if let Some(since) = self.busy_since.take() {
            self.elapsed += now - since;
        }
    }

    /// Forgets the sample that is not full yet: what hindered it was something else than what is measured.
    pub(crate) fn discard(&mut self, now: Time) {
        (self.bytes, self.elapsed) = (0, Duration::ZERO);
        self.busy_since = self.busy_since.map(|_| now);
    }

    /// Counts bytes that came.
    pub(crate) fn add(&mut self, now: Time, bytes: u64) {
        self.bytes += bytes;
        let elapsed = self.sample_length(now);
        if elapsed < SAMPLE {
            return;
        }
        let seconds = elapsed.as_secs_f64();
        let sample = self.bytes as f64 / seconds;
        // By the time that it covers: a burst counts no more than the silence before it.
        let weight = seconds / (self.known + seconds);
        self.rate = Some(
            self.rate
                .map_or(sample, |rate| rate + weight * (sample - rate)),
        );
        self.known = (self.known + seconds).min(MEMORY);
        (self.bytes, self.elapsed) = (0, Duration::ZERO);
        if self.busy_since.is_some() {
            self.busy_since = Some(now);
        }
    }

    /// The rate as last measured; `None` before the first sample is full.
    pub(crate) fn rate(&self) -> Option<f64> {
        self.rate
    }

    /// The rate, taking into account how long nothing (or little) came since the last sample was full.
    pub(crate) fn rate_at(&self, now: Time) -> Option<f64> {
        let elapsed = self.sample_length(now);
        if elapsed < 4 * SAMPLE {
            return self.rate;
        }
        let lately = self.bytes as f64 / elapsed.as_secs_f64();
        Some(self.rate.map_or(lately, |rate| rate.min(lately)))
    }

    fn sample_length(&self, now: Time) -> Duration {
        self.elapsed + self.busy_since.map_or(Duration::ZERO, |since| now - since)
    }
}

/// How fast responses come once they have begun to: what the link carries, however long each is waited for. Of the last ten to twenty seconds: where
/// responses come too fast to be seen on their way, nothing is known soon.
#[derive(Clone, Debug, Default)]
pub(crate) struct Transit {
    /// Responses of which something has come, but not all; and since when it was not counted.
    coming: usize,
    since: Time,
    /// Bytes, and the time in which they came: of this span and the one before.
    spans: [(u64, Duration); 2],
    began: Time,
}

impl Transit {
    /// Bytes came. What comes first of a response says nothing, unless another was coming already.
    pub(crate) fn came(&mut self, now: Time, bytes: u64) {
        self.count(now);
        if self.coming > 0 {
            self.spans[0].0 += bytes;
        }
    }

    /// Something of a response has come.
    pub(crate) fn began(&mut self, now: Time) {
        self.count(now);
        self.coming += 1;
    }

    /// All of it has, or nothing more is expected.
    pub(crate) fn ended(&mut self, now: Time) {
        self.count(now);
        self.coming = self.coming.saturating_sub(1);
    }

    /// Bytes a second; `None` where responses came too fast, or too few, to tell.
    pub(crate) fn rate(&mut self, now: Time) -> Option<f64> {
        self.count(now);
        let [(bytes, time), (before, long)] = self.spans;
        let time = time + long;
        (time >= TELLING).then(|| (bytes + before) as f64 / time.as_secs_f64())
    }

    /// Counts the time that has passed.
    fn count(&mut self, now: Time) {
        let passed = now - self.began;
        if passed >= SPAN {
            let last = std::mem::take(&mut self.spans[0]);
            self.spans[1] = if passed < 2 * SPAN {
                last
            } else {
                Default::default()
            };
            self.began = now;
        }
        if self.coming > 0 {
            self.spans[0].1 += now - self.since;
        }
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::from_start(Duration::from_millis(ms))
    }

    #[test]
    fn idle_time_does_not_count() {
        let mut meter = RateMeter::default();
        for second in 0..10 {
            meter.start(at(second * 1000));
            meter.add(at(second * 1000 + 50), 50_000);
            meter.stop(at(second * 1000 + 50));
        }
        let rate = meter.rate().expect("500 ms of samples");
        assert!((900_000.0..1_100_000.0).contains(&rate), "{rate}");
    }

    #[test]
    fn bursts_are_averaged_with_the_silence_between_them() {
        let mut meter = RateMeter::default();
        meter.start(at(0));
        for second in 0..30 {
            (0..10).for_each(|i| meter.add(at(second * 1000 + i * 20), 10_000));
            let rate = meter.rate().unwrap_or(100_000.0);
            assert!(
                second < 3 || (50_000.0..200_000.0).contains(&rate),
                "{rate}"
            );
        }
    }

    #[test]
    fn transit_is_what_the_link_carries_however_late_it_begins() {
        let mut transit = Transit::default();
        for round in 0..10 {
            let came = at(round * 1000 + 500);
            transit.came(came, 10_000);
            transit.began(came);
            assert_eq!(transit.rate(came).is_some(), round > 0);
            let ended = at(round * 1000 + 700);
            transit.came(ended, 10_000);
            transit.ended(ended);
        }
        assert_eq!(transit.rate(at(9_700)), Some(50_000.0));
        // What comes at once tells nothing, and what was known is forgotten.
        for round in 10..40 {
            transit.came(at(round * 1000), 10_000);
            transit.began(at(round * 1000));
            transit.ended(at(round * 1000));
            assert_eq!(
                transit.rate(at(round * 1000)).is_some(),
                round < 20,
                "{round}"
            );
        }
    }

    #[test]
    fn silence_lowers_the_rate_before_the_next_byte() {
        let mut meter = RateMeter::default();
        meter.start(at(0));
        meter.add(at(100), 100_000);
        assert_eq!(meter.rate_at(at(200)), Some(1_000_000.0));
        meter.add(at(150), 10);
        assert!(meter.rate_at(at(10_000)).is_some_and(|rate| rate < 2.0));
        assert_eq!(RateMeter::default().rate_at(at(10_000)), None);
    }
}
