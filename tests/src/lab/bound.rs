//! The least time in which content can come to all nodes of a lab, by what its links carried of plain TCP.

use capsule_simulations::bound::{Rates, fluid};

use super::goodput::Measured;

/// Seconds for so many bytes; node 0 is the source. `counts` tells which of the nodes count.
pub fn of(bytes: u64, measured: &Measured, home: usize, counts: &[usize]) -> f64 {
    let bytes = bytes as f64;
    if measured.sites.is_empty() {
        let pullers = counts.iter().map(|node| Rates {
            up: measured.hosts[*node].up,
            down: measured.hosts[*node].down,
        });
        return fluid(bytes, measured.hosts[0].up, pullers);
    }
    // One copy to each site; inside, links are so much faster that they do not count.
    let others = measured.sites.iter().enumerate();
    let slowest = others
        .filter(|(site, _)| *site != home)
        .map(|(_, link)| link.down)
        .fold(f64::INFINITY, f64::min);
    bytes / slowest
}
