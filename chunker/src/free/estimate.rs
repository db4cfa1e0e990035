//! What trimming would save, without reading all that is free.

use std::ops::Range;

use super::ranges::first_after;
use crate::content::{ReadError, Source};

/// Pages that are looked at; the estimate is then right to about three hundredths of what is stored.
const SAMPLES: u64 = 256;
const PAGE: u64 = 4 << 10;

/// Bytes of ordered ranges that a source stores, and does not know to be zero.
pub fn data_in(source: &dyn Source, ranges: &[Range<u64>]) -> Result<u64, ReadError> {
    let mut total = 0;
    walk(source, ranges, |piece| {
        total += piece.end - piece.start;
        Ok(())
    })?;
    Ok(total)
}

/// About how many bytes of ordered ranges are not zero; reads at most 256 pages of 4 KiB.
pub fn old_data_in(source: &dyn Source, ranges: &[Range<u64>]) -> Result<u64, ReadError> {
    let total = data_in(source, ranges)?;
    let samples = SAMPLES.min(total.div_ceil(PAGE));
    let (mut seen, mut taken, mut old) = (0, 0, 0);
    walk(source, ranges, |piece| {
        let end = seen + (piece.end - piece.start);
        // The middles of equal parts of what is stored.
        while taken < samples {
            let place = part(total, 2 * taken + 1, 2 * samples);
            if place >= end {
                break;
            }
            let at = piece.start + (place - seen);
            let mut page = [0; PAGE as usize];
            let start = (at - at % PAGE).max(piece.start);
            let page = &mut page[..PAGE.min(piece.end - start) as usize];
            source.read_at(start, page)?;
            old += u64::from(page.iter().any(|byte| *byte != 0));
            taken += 1;
        }
        seen = end;
        Ok(())
    })?;
    Ok(if taken == 0 {
        0
    } else {
        part(total, old, taken)
    })
}

/// `total * numerator / denominator`, of which the product may not fit.
fn part(total: u64, numerator: u64, denominator: u64) -> u64 {
    (u128::from(total) * u128::from(numerator) / u128::from(denominator)) as u64
}

/// Goes through what a source stores of ordered ranges.
fn walk(
    source: &dyn Source,
    ranges: &[Range<u64>],
    mut each: impl FnMut(Range<u64>) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    for extent in source.extents() {
        let extent = extent?;
        if extent.zero {
            continue;
        }
        for range in &ranges[first_after(ranges, extent.range.start)..] {
            let piece = range.start.max(extent.range.start)..range.end.min(extent.range.end);
            if piece.is_empty() {
                break;
            }
            each(piece)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges, some of one"
)]
mod tests {
    use super::*;
    use crate::content::BytesSource;

    #[test]
    fn the_estimate_is_near_what_is_there() {
        let mut bytes = vec![0; 16 << 20];
        bytes[4 << 20..7 << 20].fill(1);
        let source = BytesSource(bytes);
        let ranges = [1 << 20..6 << 20, 8 << 20..16 << 20];
        assert_eq!(data_in(&source, &ranges).unwrap(), 13 << 20);
        let old = old_data_in(&source, &ranges).unwrap();
        assert!(old.abs_diff(2 << 20) < 300 << 10, "{old}");
        assert_eq!(old_data_in(&source, &[]).unwrap(), 0);
        assert_eq!(
            old_data_in(&source, &[4 << 20..(4 << 20) + 4096]).unwrap(),
            4096
        );
    }
}
