//! The ladders as bars, in SVG: bytes on a logarithmic scale, with bytes and minutes beside each bar.

use std::fmt::Write;

use super::found::Ladder;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 230.0;
const RIGHT: f64 = 190.0;
const BAR: f64 = 18.0;
const GAP: f64 = 8.0;
const TITLE: f64 = 40.0;
/// Where the scale begins, in bytes: below what any step leaves.
const LEAST: f64 = 1e6;
/// Measured in a real run, and reckoned.
const MEASURED: &str = "#1f5fa8";
const RECKONED: &str = "#9db9d8";

/// All ladders, one below the other.
pub fn ladders(all: &[Ladder]) -> String {
    let height = |ladder: &Ladder| TITLE + ladder.steps.len() as f64 * (BAR + GAP);
    let total = all.iter().map(height).sum::<f64>() + TITLE;
    let bytes = all.iter().flat_map(|ladder| &ladder.steps);
    let most = bytes
        .map(|step| step.bytes as f64)
        .fold(LEAST * 10.0, f64::max);
    let width = |bytes: f64| {
        let part = (bytes / LEAST).max(1.0).log10() / (most / LEAST).log10();
        part * (WIDTH - LEFT - RIGHT)
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{total}\" viewBox=\"0 0 {WIDTH} {total}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut y = 0.0;
    for ladder in all {
        text(&mut svg, 10.0, y + 26.0, "start", 14, &ladder.title);
        y += TITLE;
        for step in &ladder.steps {
            let colour = if step.is_measured { MEASURED } else { RECKONED };
            let long = width(step.bytes as f64);
            let middle = y + BAR - 5.0;
            text(&mut svg, LEFT - 8.0, middle, "end", 12, step.name);
            rectangle(&mut svg, (LEFT, y), (long, BAR), colour);
            let beside = format!(
                "{:.1} MB, {:.1} min",
                step.bytes as f64 / 1e6,
                step.seconds / 60.0
            );
            text(&mut svg, LEFT + long + 6.0, middle, "start", 12, &beside);
            y += BAR + GAP;
        }
    }
    let legend = "dark: measured in a real run; light: reckoned from real content at the link's rate; logarithmic from 1 MB";
    text(&mut svg, 10.0, y + 26.0, "start", 11, legend);
    svg + "</svg>\n"
}

fn rectangle(svg: &mut String, at: (f64, f64), size: (f64, f64), colour: &str) {
    let ((x, y), (width, height)) = (at, size);
    let _written = writeln!(
        svg,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, size: u32, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _written = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{words}</text>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::found::Step;

    #[test]
    fn bars_are_as_long_as_their_bytes_have_digits() {
        let step = |name, bytes, is_measured| Step {
            name,
            bytes,
            seconds: 60.0,
            is_measured,
            how: String::new(),
        };
        let ladder = Ladder {
            title: "a < b".to_owned(),
            steps: vec![
                step("raw", 1_000_000_000, false),
                step("all", 1_000_000, true),
            ],
        };
        let svg = ladders(&[ladder]);
        assert!(svg.contains("a &lt; b") && svg.contains("1000.0 MB, 1.0 min"));
        let whole = format!("width=\"{:.1}\"", WIDTH - LEFT - RIGHT);
        assert!(svg.contains(&whole) && svg.contains("width=\"0.0\""));
    }
}
