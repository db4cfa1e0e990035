//! A benchmark's result: tables for people, the same as JSON for programs, where figures are numbers in plain units.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::series::Series;

/// Bytes of a MiB.
pub const MIB: f64 = (1 << 20) as f64;

/// What a benchmark found.
#[derive(Debug, Default)]
pub struct Report {
    machine: String,
    /// One table a data set.
    pub tables: Vec<Table>,
}

/// A figure that all rows of a table have.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    title: &'static str,
    /// Its key in the JSON, with its unit.
    pub key: &'static str,
    /// What people see is the figure divided by this.
    scale: f64,
    decimals: usize,
}

/// Figures of one data set.
#[derive(Debug)]
pub struct Table {
    title: String,
    columns: Vec<Column>,
    rows: Vec<Row>,
    targets: Vec<Target>,
    notes: Vec<String>,
}

/// A figure beside what it is to reach.
#[derive(Debug, Clone)]
pub struct Target {
    /// What it is.
    pub what: String,
    /// What was found; nothing where it could not be measured, which meets no target.
    pub found: Option<f64>,
    /// What is to be reached.
    pub limit: Limit,
    /// Of both.
    pub unit: &'static str,
}

/// What a figure is to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    /// So much or more.
    AtLeast(f64),
    /// So much or less.
    AtMost(f64),
    /// More than that.
    Above(f64),
    /// Less than that.
    Below(f64),
}

#[derive(Debug)]
struct Row {
    name: String,
    figures: Vec<Option<f64>>,
    runs: Vec<Value>,
    failed: Option<String>,
}

impl Column {
    /// A figure shown as it is.
    pub const fn plain(title: &'static str, key: &'static str, decimals: usize) -> Self {
        Self {
            title,
            key,
            scale: 1.0,
            decimals,
        }
    }

    /// Bytes, shown in MiB.
    pub const fn mib(title: &'static str, key: &'static str) -> Self {
        Self {
            title,
            key,
            scale: MIB,
            decimals: 0,
        }
    }

    /// Parts of one, shown in percent.
    pub const fn percent(title: &'static str, key: &'static str, decimals: usize) -> Self {
        Self {
            title,
            key,
            scale: 0.01,
            decimals,
        }
    }

    fn show(&self, figure: Option<f64>) -> String {
        figure.map_or("-".into(), |figure| {
            format!("{:.*}", self.decimals, figure / self.scale)
        })
    }
}

impl Report {
    /// A report of this machine.
    pub fn new() -> Self {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu
            .lines()
            .find_map(|line| line.strip_prefix("model name"))
            .unwrap_or("unknown CPU");
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            machine: format!(
                "{}, {cores} cores",
                model.trim_start_matches([' ', '\t', ':'])
            ),
            tables: vec![],
        }
    }

    /// Prints the tables.
    pub fn print(&self) {
        println!("{}", self.machine);
        self.tables
            .iter()
            .for_each(|table| print!("\n{}", table.text()));
    }

    /// Writes the JSON.
    pub fn write(&self, path: &Path) -> Result<()> {
        let tables: Vec<Value> = self.tables.iter().map(Table::json).collect();
        let value = json!({ "machine": self.machine, "tables": tables });
        let text = serde_json::to_string_pretty(&value)?;
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// Names of the legs that failed.
    pub fn failures(&self) -> Vec<&str> {
        let rows = self.tables.iter().flat_map(|table| &table.rows);
        rows.filter(|row| row.failed.is_some())
            .map(|row| row.name.as_str())
            .collect()
    }
}

impl Table {
    /// An empty table.
    pub fn new(title: impl Into<String>, columns: &[Column]) -> Self {
        Self {
            title: title.into(),
            columns: columns.to_vec(),
            rows: vec![],
            targets: vec![],
            notes: vec![],
        }
    }

    /// One of what could not be measured at all.
    pub fn failed(title: impl Into<String>, error: &anyhow::Error) -> Self {
        let mut table = Self::new(title, &[]);
        table.rows.push(Row {
            name: "all of it".into(),
            figures: vec![],
            runs: vec![],
            failed: Some(format!("{error:#}")),
        });
        table
    }

    /// Adds a row of a leg: its figures in the order of the columns, and what each run found.
    pub fn row<T: Serialize>(&mut self, series: &Series<T>, figures: Vec<Option<f64>>) {
        let runs = series.runs.iter().map(serde_json::to_value);
        self.rows.push(Row {
            name: series.name.clone(),
            figures,
            runs: runs.filter_map(Result::ok).collect(),
            failed: series.failed.clone(),
        });
    }

    /// Adds a row that goes with the one before it.
    pub fn part(&mut self, name: impl Into<String>, figures: Vec<Option<f64>>) {
        self.rows.push(Row {
            name: name.into(),
            figures,
            runs: vec![],
            failed: None,
        });
    }

    /// Adds a target.
    pub fn target(&mut self, target: Target) {
        self.targets.push(target);
    }

    /// Adds a note.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// As people see it.
    pub fn text(&self) -> String {
        let cells: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| {
                let figures = row.figures.iter().chain(std::iter::repeat(&None));
                let shown = self.columns.iter().zip(figures);
                shown.map(|(column, figure)| column.show(*figure)).collect()
            })
            .collect();
        let width = |i: usize| {
            let cells = cells.iter().map(|row| row[i].chars().count());
            cells
                .chain([self.columns[i].title.chars().count()])
                .max()
                .unwrap_or(0)
        };
        let names = self.rows.iter().map(|row| row.name.chars().count());
        let first = names.max().unwrap_or(0);
        let line = |name: &str, cells: &mut dyn Iterator<Item = &str>| {
            let cells: Vec<_> = cells
                .enumerate()
                .map(|(i, cell)| format!("{cell:>0$}", width(i)))
                .collect();
            format!("  {name:<first$}  {}", cells.join("  "))
        };
        let mut text = format!("{}\n", self.title);
        text += &line("", &mut self.columns.iter().map(|column| column.title));
        text.push('\n');
        for (row, cells) in self.rows.iter().zip(&cells) {
            if row.figures.iter().any(Option::is_some) {
                text += &line(&row.name, &mut cells.iter().map(String::as_str));
                text.push('\n');
            }
            if let Some(reason) = &row.failed {
                text += &format!("  {:<first$}  failed: {reason}\n", row.name);
            }
        }
        self.targets
            .iter()
            .for_each(|target| text += &format!("  {}\n", target.text()));
        self.notes
            .iter()
            .for_each(|note| text += &format!("  - {note}\n"));
        text
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let figures = self.columns.iter().zip(&row.figures);
            let figures: Map<String, Value> = figures
                .map(|(column, figure)| (column.key.to_owned(), json!(figure)))
                .collect();
            json!({ "name": row.name, "figures": figures, "runs": row.runs, "failed": row.failed })
        });
        let targets: Vec<Value> = self.targets.iter().map(Target::json).collect();
        json!({
            "title": self.title,
            "rows": rows.collect::<Vec<_>>(),
            "targets": targets,
            "notes": self.notes,
        })
    }
}

impl Target {
    /// Whether it was found and reaches what it is to.
    pub fn is_met(&self) -> bool {
        self.found.is_some_and(|found| self.limit.is_met(found))
    }

    fn text(&self) -> String {
        let found = self.found.map_or("not measured".into(), |found| {
            format!("{found:.3} {}", self.unit).trim_end().to_owned()
        });
        let (words, at) = self.limit.words();
        let met = if self.is_met() { "met    " } else { "NOT MET" };
        let limit = format!("{words} {at} {}", self.unit);
        format!("{met}  {}: {found} ({})", self.what, limit.trim_end())
    }

    fn json(&self) -> Value {
        let (words, at) = self.limit.words();
        json!({
            "what": self.what,
            "found": self.found,
            "limit": format!("{words} {at}"),
            "unit": self.unit,
            "met": self.is_met(),
        })
    }
}

impl Limit {
    fn is_met(self, found: f64) -> bool {
        match self {
            Self::AtLeast(at) => found >= at,
            Self::AtMost(at) => found <= at,
            Self::Above(at) => found > at,
            Self::Below(at) => found < at,
        }
    }

    /// The comparison in words, and the number.
    pub fn words(self) -> (&'static str, f64) {
        match self {
            Self::AtLeast(at) => ("at least", at),
            Self::AtMost(at) => ("at most", at),
            Self::Above(at) => ("above", at),
            Self::Below(at) => ("below", at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 2] = [
        Column::plain("wall s", "wall_seconds", 2),
        Column::mib("peak MiB", "peak_bytes"),
    ];

    fn table() -> Table {
        let mut table = Table::new("title", &COLUMNS);
        let mut good = Series::new("good");
        good.measure("test", || Ok(1.25));
        table.row(&good, vec![Some(1.25), Some(3.0 * MIB)]);
        let mut bad = Series::<f64>::new("bad one");
        bad.measure("test", || anyhow::bail!("it broke"));
        table.row(&bad, vec![None, None]);
        table.note("a note");
        table
    }

    #[test]
    fn people_see_units_and_failures() {
        let expected = "title\n           wall s  peak MiB\n  good       1.25         3\n  \
                        bad one  failed: it broke\n  - a note\n";
        assert_eq!(table().text(), expected);
    }

    #[test]
    fn targets_are_met_or_not() {
        let target = |found, limit| Target {
            what: "it".into(),
            found,
            limit,
            unit: "%",
        };
        let met = |found, limit| target(Some(found), limit).is_met();
        assert!(met(95.0, Limit::AtLeast(95.0)) && !met(94.9, Limit::AtLeast(95.0)));
        assert!(met(1.1, Limit::AtMost(1.1)) && !met(1.2, Limit::AtMost(1.1)));
        assert!(met(1.1, Limit::Above(1.0)) && !met(1.0, Limit::Above(1.0)));
        assert!(met(0.9, Limit::Below(1.0)) && !met(1.0, Limit::Below(1.0)));
        assert!(!met(f64::NAN, Limit::Below(1.0)) && !target(None, Limit::Below(1.0)).is_met());
        assert_eq!(
            target(Some(0.5), Limit::Below(1.0)).text(),
            "met      it: 0.500 % (below 1 %)"
        );
        let unknown = target(None, Limit::AtMost(2.0));
        assert_eq!(unknown.text(), "NOT MET  it: not measured (at most 2 %)");
        assert_eq!(unknown.json()["met"], false);
    }

    #[test]
    fn programs_see_numbers() {
        let json = table().json();
        assert_eq!(json["rows"][0]["figures"]["wall_seconds"], 1.25);
        assert_eq!(json["rows"][0]["figures"]["peak_bytes"], 3_145_728.0);
        assert_eq!(json["rows"][0]["runs"], json!([1.25]));
        assert_eq!(json["rows"][0]["failed"], Value::Null);
        assert_eq!(json["rows"][1]["figures"]["wall_seconds"], Value::Null);
        assert_eq!(json["rows"][1]["failed"], "it broke");
    }
}
