//! The least time in which content can come to all nodes, if it flows like water: R. Kumar and K. Ross, "Peer-assisted file
//! distribution: the minimum distribution time" (2006). Simulations and the lab stand beside the same.

/// A puller's link, in bytes a second.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// What it can send.
    pub up: f64,
    /// What it can receive.
    pub down: f64,
}

/// Seconds for F bytes, from sources with an uplink of us together, to N pullers: `max(F/us, F/dmin, N F / (us + sum u))`.
pub fn fluid(bytes: f64, sources_up: f64, pullers: impl IntoIterator<Item = Rates>) -> f64 {
    let (mut count, mut up, mut slowest) = (0.0, 0.0, f64::INFINITY);
    for puller in pullers {
        count += 1.0;
        up += puller.up;
        slowest = puller.down.min(slowest);
    }
    (bytes / sources_up)
        .max(bytes / slowest)
        .max(count * bytes / (sources_up + up))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_that_of_the_scarcest() {
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} {b}");
        let equal = Rates {
            up: 10.0,
            down: 10.0,
        };
        // N F / (N + 1) u is less than F / u.
        near(fluid(100.0, 10.0, [equal; 3]), 10.0);
        // A thin source.
        near(fluid(100.0, 5.0, [equal; 3]), 20.0);
        // One thin downlink.
        let thin = Rates { down: 2.0, ..equal };
        near(fluid(100.0, 10.0, [equal, thin]), 50.0);
        // Thin uplinks: 3 F of 10 + 3.
        let thin = Rates {
            up: 1.0,
            down: 100.0,
        };
        near(fluid(100.0, 10.0, [thin; 3]), 300.0 / 13.0);
    }
}
