//! Curves as SVG: one chart with axes, ticks, curves and a mark; no more than the reports need.

use std::fmt::Write;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
/// Ticks of an axis, about.
const TICKS: f64 = 6.0;
const COLOURS: [&str; 6] = [
    "#1f5fa8", "#c1440e", "#3b8132", "#7a3f9d", "#8a6d00", "#00808a",
];

/// A curve, or several.
pub struct Chart<'a> {
    /// What it shows.
    pub title: &'a str,
    /// What the vertical axis measures; the horizontal one measures seconds.
    pub unit: &'a str,
    /// Names and points.
    pub curves: Vec<(String, Vec<(f64, f64)>)>,
    /// A moment to be marked, and what it is.
    pub mark: Option<(f64, &'a str)>,
}

impl Chart<'_> {
    /// The chart as a document.
    pub fn svg(&self) -> String {
        let points = || self.curves.iter().flat_map(|(_, points)| points);
        let largest = |values: &mut dyn Iterator<Item = f64>| {
            let most = values.filter(|v| v.is_finite()).fold(0.0, f64::max);
            if most > 0.0 { most } else { 1.0 }
        };
        let x_most = largest(&mut points().map(|p| p.0).chain(self.mark.map(|m| m.0)));
        let y_most = largest(&mut points().map(|p| p.1)) * 1.05;
        let x = |value: f64| LEFT + value / x_most * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| HEIGHT - BOTTOM - value / y_most * (HEIGHT - TOP - BOTTOM);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        );
        text(&mut svg, (LEFT, 20.0), "start", 15, self.title);
        text(
            &mut svg,
            (WIDTH - RIGHT, HEIGHT - 10.0),
            "end",
            12,
            "seconds",
        );
        text(&mut svg, (LEFT, TOP - 6.0), "end", 12, self.unit);
        for value in ticks(x_most) {
            line(&mut svg, (x(value), y(0.0)), (x(value), TOP), "#e4e4e4", "");
            text(
                &mut svg,
                (x(value), HEIGHT - BOTTOM + 16.0),
                "middle",
                12,
                &label(value),
            );
        }
        for value in ticks(y_most) {
            line(
                &mut svg,
                (LEFT, y(value)),
                (WIDTH - RIGHT, y(value)),
                "#e4e4e4",
                "",
            );
            text(
                &mut svg,
                (LEFT - 6.0, y(value) + 4.0),
                "end",
                12,
                &label(value),
            );
        }
        if let Some((at, what)) = self.mark.filter(|(at, _)| at.is_finite()) {
            line(
                &mut svg,
                (x(at), y(0.0)),
                (x(at), TOP),
                "black",
                " stroke-dasharray=\"5 4\"",
            );
            text(&mut svg, (x(at) - 4.0, TOP + 12.0), "end", 12, what);
        }
        for (index, (name, points)) in self.curves.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let shown: String = points
                .iter()
                .filter(|(_, value)| value.is_finite())
                .map(|&(at, value)| format!("{:.1},{:.1} ", x(at), y(value)))
                .collect();
            let _infallible = writeln!(
                svg,
                "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\" points=\"{}\"/>",
                shown.trim_end()
            );
            let at = LEFT + 10.0 + 150.0 * (index % 4) as f64;
            let below = HEIGHT - 10.0 - 14.0 * (index / 4) as f64;
            line(
                &mut svg,
                (at, below - 4.0),
                (at + 18.0, below - 4.0),
                colour,
                "",
            );
            text(&mut svg, (at + 22.0, below), "start", 12, name);
        }
        svg + "</svg>\n"
    }
}

/// Round values up to a largest one.
fn ticks(most: f64) -> impl Iterator<Item = f64> {
    let rough = most / TICKS;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|step| *step >= rough)
        .unwrap_or(most);
    (0..)
        .map(move |index| f64::from(index) * step)
        .take_while(move |value| *value <= most)
}

fn label(value: f64) -> String {
    // Without the dust of binary fractions.
    let short = format!("{value:.4}");
    let short = short.trim_end_matches('0').trim_end_matches('.');
    if short.is_empty() { "0" } else { short }.into()
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, size: u32, what: &str) {
    let what = what.replace('&', "&amp;").replace('<', "&lt;");
    let _infallible = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{what}</text>"
    );
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), colour: &str, more: &str) {
    let _infallible = writeln!(
        svg,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\"{more}/>",
        from.0, from.1, to.0, to.1
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        let round = |most| ticks(most).map(label).collect::<Vec<_>>();
        assert_eq!(round(42.0), ["0", "10", "20", "30", "40"]);
        assert_eq!(round(0.29), ["0", "0.05", "0.1", "0.15", "0.2", "0.25"]);
    }

    #[test]
    fn a_chart_has_its_curves_and_names_are_escaped() {
        let chart = Chart {
            title: "a < b & c",
            unit: "MiB",
            curves: vec![("x".into(), vec![(0.0, 0.0), (1.0, 2.0)])],
            mark: Some((0.5, "bound")),
        };
        let svg = chart.svg();
        assert!(
            svg.contains("a &lt; b &amp; c") && svg.contains(">bound<"),
            "{svg}"
        );
        assert_eq!(svg.matches("<polyline").count(), 1);
    }
}
