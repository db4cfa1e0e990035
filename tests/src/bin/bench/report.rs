//! A benchmark's result: tables for people, the same as JSON for programs.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// What a benchmark found.
#[derive(Serialize, Default)]
pub struct Report {
    /// What was measured on.
    pub machine: String,
    /// One table a data set.
    pub tables: Vec<Table>,
}

/// Figures of one data set.
#[derive(Serialize)]
pub struct Table {
    /// What was measured.
    pub title: String,
    /// Names of the figures.
    pub columns: Vec<String>,
    /// A row a tool: its name, and its figures as text.
    pub rows: Vec<(String, Vec<String>)>,
    /// What is to be reached, and what was.
    pub notes: Vec<String>,
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
        for table in &self.tables {
            table.print();
        }
    }

    /// Writes the JSON.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }
}

impl Table {
    /// An empty table.
    pub fn new(title: impl Into<String>, columns: &[&str]) -> Self {
        let columns = columns.iter().map(|&column| column.to_owned()).collect();
        Self {
            title: title.into(),
            columns,
            rows: vec![],
            notes: vec![],
        }
    }

    /// Adds a row.
    pub fn row(&mut self, name: impl Into<String>, figures: Vec<String>) {
        self.rows.push((name.into(), figures));
    }

    /// Adds a note.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    fn print(&self) {
        println!("\n{}", self.title);
        let width = |i: usize| {
            let cells = self
                .rows
                .iter()
                .filter_map(|(_, figures)| figures.get(i))
                .map(|figure| figure.chars().count());
            cells
                .chain([self.columns[i].chars().count()])
                .max()
                .unwrap_or(0)
        };
        let first = self
            .rows
            .iter()
            .map(|(name, _)| name.chars().count())
            .max()
            .unwrap_or(0);
        let line = |name: &str, cells: &[String]| {
            let cells: Vec<_> = cells
                .iter()
                .enumerate()
                .map(|(i, cell)| format!("{cell:>0$}", width(i)))
                .collect();
            println!("  {name:<first$}  {}", cells.join("  "));
        };
        line("", &self.columns);
        self.rows
            .iter()
            .for_each(|(name, figures)| line(name, figures));
        self.notes.iter().for_each(|note| println!("  - {note}"));
    }
}
