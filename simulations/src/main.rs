//! Runs plans, and writes reports with plots.

use std::io::{IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use capsule_simulations::plot::Chart;
use capsule_simulations::report::{Cost, Report, Sample, markdown};
use capsule_simulations::{Plan, World, file};
use clap::Parser;

/// How often progress is shown.
const SHOW_EVERY: Duration = Duration::from_millis(500);
/// Events between two looks at the clock.
const LOOK_EVERY: u64 = 1 << 14;

/// Runs a plan: simulated nodes with the daemon's own scheduler, in virtual time.
#[derive(Parser)]
struct Args {
    /// The plan, a TOML file; as given, or in the directory of this crate.
    plan: PathBuf,
    /// Seed of the first run, instead of the plan's.
    #[arg(long)]
    seed: Option<u64>,
    /// How many runs, with one seed after the other.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000))]
    runs: u64,
    /// Where the report and its plots go; `target/simulations/NAME` of this repository by default.
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = if args.plan.exists() {
        args.plan
    } else {
        here.join(&args.plan)
    };
    let len = std::fs::metadata(&path)
        .with_context(|| format!("no plan {}", path.display()))?
        .len();
    ensure!(
        len <= file::MAX_LEN as u64,
        "{} is longer than a plan may be",
        path.display()
    );
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let name = path
        .file_stem()
        .map_or("plan".into(), |name| name.to_string_lossy().into_owned());
    let plans = file::parse(&name, &text).with_context(|| path.display().to_string())?;
    let out = args
        .out
        .unwrap_or_else(|| here.join("../target/simulations").join(&name));
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let mut runs = Vec::new();
    for plan in plans {
        let first = args.seed.unwrap_or(plan.seed);
        for more in 0..args.runs {
            let seed = first.wrapping_add(more);
            let run = run(Plan {
                seed,
                ..plan.clone()
            })?;
            println!("{}: {} {:.1} s", run.0.plan, run.0, run.1.wall);
            runs.push(run);
        }
    }
    let report = markdown(&name, &runs) + &plots(&out, &runs)?;
    let file = out.join("report.md");
    std::fs::write(&file, report).with_context(|| file.display().to_string())?;
    println!("{}", file.display());
    Ok(())
}

/// Runs one plan, and shows on a terminal how far it is.
fn run(plan: Plan) -> Result<(Report, Cost)> {
    let (began, terminal) = (Instant::now(), std::io::stderr().is_terminal());
    let (name, seed) = (plan.name.clone(), plan.seed);
    let mut world = World::new(plan);
    let (mut shown, mut steps) = (began, 0u64);
    while world.step()? {
        steps += 1;
        if terminal && steps.is_multiple_of(LOOK_EVERY) && shown.elapsed() >= SHOW_EVERY {
            shown = Instant::now();
            let (at, done) = (world.now().since_start(), 100.0 * world.progress());
            eprint!(
                "\r{name}, seed {seed}: {done:.0} % at {:.1} s ",
                at.as_secs_f64()
            );
            std::io::stderr().flush()?;
        }
    }
    if terminal {
        eprint!("\r\x1b[K");
    }
    let report = world.run()?;
    let cost = Cost {
        wall: began.elapsed().as_secs_f64(),
        memory: peak_memory(),
    };
    Ok((report, cost))
}

/// Writes the plots of all runs; returns the lines of the report that show them.
fn plots(out: &Path, runs: &[(Report, Cost)]) -> Result<String> {
    let mut shown = String::from("\n");
    let curve = |value: fn(&Sample) -> f64| {
        let points = |report: &Report| report.samples.iter().map(|s| (s.at, value(s))).collect();
        let named = |(report, _): &(Report, Cost)| {
            (format!("{}, {}", report.plan, report.seed), points(report))
        };
        runs.iter()
            .map(named)
            .collect::<Vec<(String, Vec<(f64, f64)>)>>()
    };
    let part = |value: fn(&Report, &Sample) -> f64, what: &str| {
        let points = |r: &Report| r.samples.iter().map(|s| (s.at, value(r, s))).collect();
        let named = |(r, _): &(Report, Cost)| (format!("{what}, seed {}", r.seed), points(r));
        runs.iter().map(named).collect::<Vec<_>>()
    };
    let bound = (runs.len() == 1 || runs.iter().all(|(r, _)| r.bound == runs[0].0.bound))
        .then(|| (runs[0].0.bound, "least time"));
    let complete = |r: &Report, s: &Sample| {
        100.0 * s.complete as f64 / (r.finished.len() + r.unfinished).max(1) as f64
    };
    let mut completion = part(complete, "complete");
    completion.extend(part(|_, s| 100.0 * s.held, "held"));
    let mut charts = vec![
        (
            "completion",
            "Nodes that are complete, content that is held",
            "%",
            completion,
            bound,
        ),
        (
            "copies",
            "Copies sent by the publisher",
            "copies",
            curve(|s| s.copies),
            None,
        ),
        (
            "duplicates",
            "Content received more than once",
            "%",
            curve(|s| 100.0 * s.duplicates),
            None,
        ),
    ];
    if runs.iter().any(|(report, _)| !report.sites.is_empty()) {
        let crossed = curve(|s| s.crossed as f64 / f64::from(1 << 20));
        charts.push((
            "sites",
            "Bytes into sites from others",
            "MiB",
            crossed,
            bound,
        ));
    }
    for (name, title, unit, curves, mark) in charts {
        let chart = Chart {
            title,
            unit,
            curves,
            mark,
        };
        let file = out.join(format!("{name}.svg"));
        std::fs::write(&file, chart.svg()).with_context(|| file.display().to_string())?;
        shown += &format!("![{title}]({name}.svg)\n");
    }
    Ok(shown)
}

/// Largest memory of this process so far, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
