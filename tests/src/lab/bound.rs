//! The least time in which content can come to all nodes, as a fluid: R. Kumar and K. Ross, "Peer-assisted file distribution: the
//! minimum distribution time" (2006); and where sites have links of their own, what those take for one copy.

use super::goodput::{Goodput, Measured};

/// Seconds from one source to pullers: max(F / us, F / d, N F / (us + sum u)).
pub fn fluid(bytes: u64, source: Goodput, pullers: &[Goodput]) -> f64 {
    let bytes = bytes as f64;
    let slowest = pullers
        .iter()
        .map(|puller| puller.down)
        .fold(f64::INFINITY, f64::min);
    let up: f64 = pullers.iter().map(|puller| puller.up).sum();
    let together = pullers.len() as f64 * bytes / (source.up + up);
    (bytes / source.up).max(bytes / slowest).max(together)
}

/// The same for a lab: node 0 is the source. `counts` tells which of the nodes count.
pub fn of(bytes: u64, measured: &Measured, home: usize, counts: &[usize]) -> f64 {
    let pullers: Vec<Goodput> = counts.iter().map(|node| measured.hosts[*node]).collect();
    let source = measured.hosts[0];
    if measured.sites.is_empty() {
        return fluid(bytes, source, &pullers);
    }
    // One copy to each site; inside, links are so much faster that they do not count.
    let others = measured.sites.iter().enumerate();
    let slowest = others
        .filter(|(site, _)| *site != home)
        .map(|(_, link)| link.down)
        .fold(f64::INFINITY, f64::min);
    bytes as f64 / slowest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_that_of_the_scarcest() {
        let equal = |rate| Goodput {
            up: rate,
            down: rate,
        };
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        // N F / (N + 1) u is less than F / u.
        assert!(near(fluid(100, equal(10.0), &[equal(10.0); 3]), 10.0));
        // A thin source.
        assert!(near(fluid(100, equal(5.0), &[equal(10.0); 3]), 20.0));
        // Thin uplinks: 3 F of 10 + 3.
        let thin = Goodput {
            up: 1.0,
            down: 100.0,
        };
        assert!(near(fluid(100, equal(10.0), &[thin; 3]), 300.0 / 13.0));
    }
}
