//! What was found beside what is to be reached, and beside what the paper claims: tables for people and programs, and a document in Markdown.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, anyhow};

use super::found::{Arrival, Found, Ladder, Pause};
use super::{Row, plot};
use crate::report::{Column, Limit, Report, Table, Target};
use crate::series::median;

/// The rate that figures are set for, in kbit/s.
const KBIT: u32 = 384;
/// Memory of the guest, in bytes.
const MEMORY: f64 = (512_u64 << 20) as f64;
/// Bytes of an MB, as links and the paper count them.
const MB: f64 = 1e6;

const MOVES: [Column; 6] = [
    Column::plain("runs s", "runs_seconds", 1),
    Column::plain("answers s", "first_seconds", 1),
    Column::plain("received", "first_bytes", 0),
    Column::plain("sent", "first_sent_bytes", 0),
    Column::plain("guest read", "read_bytes", 0),
    Column::plain("python3 s", "large_seconds", 1),
];
const STEPS: [Column; 3] = [
    Column::plain("bytes", "bytes", 0),
    Column::plain("minutes", "minutes", 1),
    Column::plain("measured", "is_measured", 0),
];
const LOCAL: [Column; 1] = [Column::plain("median", "median", 3)];

/// A figure, what it is to reach, and what the paper says of it.
struct Figure {
    row: Row,
    target: Target,
    paper: &'static str,
}

const PAPER_START: &str = "a machine starts an application within 20 minutes where neither it nor the operating system is installed: 57.6 MB at line rate";
const PAPER_UPDATE: &str = "updates cost traffic commensurate with their package";
const PAPER_COMMUTE: &str = "a user's machine moves between home and work in less than that";
const PAPER_BALLOON: &str = "unused memory is given back, and costs nothing";
const PAPER_NOTHING: &str = "-";

/// The figures of the rows that were asked for.
fn figures(found: &Found, only: &[Row]) -> Vec<Figure> {
    let mut all = Vec::new();
    let mut add = |row, what: &str, found: Option<f64>, limit, unit, paper| {
        let what = what.to_owned();
        let target = Target {
            what,
            found,
            limit,
            unit,
        };
        all.push(Figure { row, target, paper });
    };
    let first = found.first.as_ref();
    let update = found.update.as_ref();
    let minutes = |seconds: f64| seconds / 60.0;
    add(
        Row::First,
        "thin link, nothing at the receiver: to the first command's answer",
        first.map(|first| minutes(first.first_seconds)),
        Limit::AtMost(10.0),
        "minutes",
        PAPER_START,
    );
    add(
        Row::First,
        "the same: bytes received by then",
        first.map(|first| first.first_bytes as f64 / MB),
        Limit::AtMost(27.0),
        "MB",
        PAPER_START,
    );
    add(
        Row::First,
        "the same: to the answer of python3 with json and ssl",
        first.and_then(|first| first.large_seconds).map(minutes),
        Limit::AtMost(15.0),
        "minutes",
        PAPER_START,
    );
    add(
        Row::Update,
        "the capture from before an upgrade at the receiver: bytes / the first row's",
        update
            .zip(first)
            .map(|(update, first)| update.arrival.first_bytes as f64 / first.first_bytes as f64),
        Limit::AtMost(1.0 / 3.0),
        "",
        PAPER_UPDATE,
    );
    add(
        Row::Update,
        "disk traffic of the upgrade / bytes of its .deb files",
        update.map(|update| update.disk_bytes as f64 / update.deb_bytes as f64),
        Limit::AtMost(0.8),
        "",
        PAPER_UPDATE,
    );
    for to in ["work", "home"] {
        let mut hops = found.hops.iter();
        let hop = hops.find(|hop| hop.to == to);
        let whole = hop.and_then(|hop| hop.whole_seconds);
        let whole = whole.map(|seconds| {
            format!(
                " ({:.0} minutes after it had come; all of it was there by then)",
                seconds / 60.0
            )
        });
        add(
            Row::Commute,
            &format!(
                "after work, to {to}: from the order to capture to the first answer there{}",
                whole.unwrap_or_default()
            ),
            hop.map(|hop| minutes(hop.seconds)),
            Limit::AtMost(5.0),
            "minutes",
            PAPER_COMMUTE,
        );
    }
    add(
        Row::Pause,
        "pause of a capture after 64 MiB of memory were dirtied",
        median(found.pauses.iter().map(|pause| pause.seconds).collect()),
        Limit::AtMost(0.5),
        "s",
        PAPER_NOTHING,
    );
    add(
        Row::Memory,
        "memory of the idle guest, index and pack of the whole of it / its size",
        found
            .whole("ram")
            .map(|bytes| bytes as f64 / MEMORY * 100.0),
        Limit::AtMost(10.0),
        "%",
        PAPER_BALLOON,
    );
    let lan = found
        .lan
        .as_ref()
        .and_then(|lan| Some(median(lan.lan.clone())? / median(lan.here.clone())?));
    add(
        Row::Lan,
        "1 Gbit/s: first command / the same from a capsule that is here",
        lan,
        Limit::AtMost(3.0),
        "",
        PAPER_NOTHING,
    );
    let nbd = found.nbd.as_ref();
    let part = |ours: &[f64], theirs: &[f64]| {
        Some(median(ours.to_vec())? / median(theirs.to_vec())? * 100.0)
    };
    add(
        Row::Nbd,
        "network block device, written out before (`--whole`), sequential, against qemu-nbd on the raw file",
        nbd.and_then(|nbd| part(&nbd.whole_sequential, &nbd.qemu_sequential)),
        Limit::AtLeast(50.0),
        "%",
        PAPER_NOTHING,
    );
    add(
        Row::Nbd,
        "the same, random 4 KiB",
        nbd.and_then(|nbd| part(&nbd.whole_random, &nbd.qemu_random)),
        Limit::AtLeast(40.0),
        "%",
        PAPER_NOTHING,
    );
    all.retain(|figure| only.contains(&figure.row));
    all
}

/// The tables.
pub fn report(found: &Found, only: &[Row]) -> Report {
    let mut report = Report::new();
    let moves = moves(found);
    if !moves.is_empty() {
        let mut table = Table::new(format!("moves over {} kbit/s", found.kbit), &MOVES);
        for (name, arrival) in moves {
            let figure = |bytes: u64| Some(bytes as f64);
            table.part(
                name,
                vec![
                    Some(arrival.runs_seconds),
                    Some(arrival.first_seconds),
                    figure(arrival.first_bytes),
                    figure(arrival.first_sent_bytes),
                    figure(arrival.read_bytes),
                    arrival.large_seconds,
                ],
            );
        }
        report.tables.push(table);
    }
    for ladder in &found.ablation {
        let mut table = Table::new(&ladder.title, &STEPS);
        for step in &ladder.steps {
            let measured = f64::from(u8::from(step.is_measured));
            let figures = [step.bytes as f64, step.seconds / 60.0, measured];
            table.part(step.name, figures.map(Some).into());
            table.note(format!("{}: {}", step.name, step.how));
        }
        report.tables.push(table);
    }
    report.tables.extend(local(found));
    let mut table = Table::new("what is to be reached", &[]);
    for figure in figures(found, only) {
        table.target(figure.target);
    }
    if let Some(note) = other_rate(found) {
        table.note(note);
    }
    report.tables.push(table);
    for (row, reason) in &found.failed {
        let error = anyhow!("{reason}");
        report
            .tables
            .push(Table::failed(format!("{row:?}"), &error));
    }
    report
}

/// Says so where the thin link was not the one that figures are set for.
fn other_rate(found: &Found) -> Option<String> {
    (found.kbit != KBIT).then(|| {
        format!(
            "the thin link carried {} kbit/s here: what is to be reached over it is set for {KBIT}",
            found.kbit
        )
    })
}

/// What was measured on one computer, or beside it.
fn local(found: &Found) -> Option<Table> {
    let mut rows: Vec<(&str, Vec<f64>)> = Vec::new();
    if let Some(lan) = &found.lan {
        rows.push(("1 Gbit/s, with a record: s", lan.lan.clone()));
        rows.push(("1 Gbit/s, without one: s", lan.without_record.clone()));
        rows.push(("from a capsule that is here: s", lan.here.clone()));
        rows.push(("QEMU alone, on files: s", lan.files.clone()));
    }
    if let Some(nbd) = &found.nbd {
        let mb = |all: &[f64]| all.iter().map(|bytes| bytes / MB).collect();
        rows.push(("nbd, sequential: MB/s", mb(&nbd.sequential)));
        rows.push(("nbd --whole, sequential: MB/s", mb(&nbd.whole_sequential)));
        rows.push(("qemu-nbd, sequential: MB/s", mb(&nbd.qemu_sequential)));
        rows.push(("nbd, random 4 KiB: MB/s", mb(&nbd.random)));
        rows.push(("nbd --whole, random 4 KiB: MB/s", mb(&nbd.whole_random)));
        rows.push(("nbd --whole, written out: MB", mb(&[nbd.whole_bytes])));
        rows.push(("nbd --whole, written out in: s", vec![nbd.whole_seconds]));
        rows.push(("qemu-nbd, random 4 KiB: MB/s", mb(&nbd.qemu_random)));
    }
    let pauses = |figure: fn(&Pause) -> f64| found.pauses.iter().map(figure).collect();
    rows.push(("pause of a capture: s", pauses(|pause| pause.seconds)));
    rows.push((
        "memory written before it: MB",
        pauses(|pause| pause.ram_written as f64 / MB),
    ));
    rows.retain(|(_, all)| !all.is_empty());
    let mut table = Table::new("on one computer, and on a LAN", &LOCAL);
    let has_any = !rows.is_empty();
    for (name, all) in rows {
        table.part(name, vec![median(all)]);
    }
    has_any.then_some(table)
}

fn moves(found: &Found) -> Vec<(&str, &Arrival)> {
    let first = found.first.iter();
    let first = first.map(|arrival| ("the receiver has nothing", arrival));
    let update = found.update.iter();
    let update = update.map(|update| ("it has the capture from before", &update.arrival));
    let hops = found.hops.iter().map(|hop| (hop.to, &hop.arrival));
    first.chain(update).chain(hops).collect()
}

/// Writes the document, and its plot beside it.
pub fn write_markdown(found: &Found, only: &[Row], to: &Path) -> Result<()> {
    let writing = || format!("writing {}", to.display());
    let plot = to.with_extension("svg");
    std::fs::write(to, document(found, only, &plot)).with_context(writing)?;
    if !found.ablation.is_empty() {
        std::fs::write(&plot, plot::ladders(&found.ablation)).with_context(writing)?;
    }
    Ok(())
}

fn document(found: &Found, only: &[Row], plot: &Path) -> String {
    let mut text = format!("# Machines that move over {} kbit/s\n\n", found.kbit);
    let system = &found.system;
    let mut say = |line: String| {
        text += &line;
        text += "\n";
    };
    say(format!(
        "A Debian guest with 512 MiB of memory and a disk of 2 GiB, emulated, in network namespaces whose links `tc tbf` shapes. It boots to a shell in {:.0} s; its upgrade are {} packages, {:.1} MB of .deb files. The paper is Sapuntzakis et al., *Optimizing the Migration of Virtual Computers*, OSDI 2002.\n",
        found.boot_seconds,
        system.packages.len(),
        system.deb_bytes as f64 / MB,
    ));
    say("| figure | found | to reach | | the paper |\n|---|---|---|---|---|".to_owned());
    for Figure { target, paper, .. } in figures(found, only) {
        let unit = target.unit;
        let found = target.found;
        let found = found.map_or("not measured".to_owned(), |found| {
            format!("{found:.2} {unit}")
        });
        let (words, at) = target.limit.words();
        let met = if target.is_met() {
            "reached"
        } else {
            "**not reached**"
        };
        let what = &target.what;
        say(format!(
            "| {what} | {found} | {words} {at:.2} {unit} | {met} | {paper} |"
        ));
    }
    if let Some(note) = other_rate(found) {
        say(format!("\n{note}."));
    }
    for Ladder { title, steps } in &found.ablation {
        say(format!("\n## What each technique saves: {title}\n"));
        say("| | bytes | minutes | |\n|---|---|---|---|".to_owned());
        for step in steps {
            let how = if step.is_measured {
                "measured"
            } else {
                "reckoned"
            };
            say(format!(
                "| {} | {} | {:.1} | {how}: {} |",
                step.name,
                step.bytes,
                step.seconds / 60.0,
                step.how
            ));
        }
    }
    if !found.ablation.is_empty() {
        let name = plot.file_name().unwrap_or_default().to_string_lossy();
        say(format!(
            "\nMinutes that were not measured are those of the bytes at {} kbit/s.\n\n![bytes with each technique]({name})",
            found.kbit
        ));
    }
    for (row, reason) in &found.failed {
        let _written = write!(text, "\n`{row:?}` could not be measured: {reason}\n");
    }
    text
}
