//! Aligned columns for people. What programs read is `--json`.

use super::style::{Style, printable};

/// On which side a column's cells stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

use Align::{Left, Right};

/// Space between columns.
const GAP: &str = "  ";

/// Rows of cells under headings.
#[derive(Debug)]
pub struct Table {
    headings: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns. A heading that begins with `>` stands, like its cells, to the right.
    pub fn new(columns: &[&'static str]) -> Self {
        let heading = |column: &&'static str| match column.strip_prefix('>') {
            Some(rest) => (rest, Right),
            None => (*column, Left),
        };
        Self {
            headings: columns.iter().map(heading).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row: one cell a column.
    ///
    /// # Panics
    /// With another number of cells than columns.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        assert_eq!(N, self.headings.len(), "one cell a column");
        self.rows
            .push(cells.iter().map(|cell| printable(cell)).collect());
    }

    /// The lines, headings first, each ending with a newline and without space before it. Columns that are empty in
    /// every row are left out.
    pub fn render(&self, style: Style) -> String {
        let width = |text: &str| text.chars().count();
        let columns: Vec<(usize, usize)> = (0..self.headings.len())
            .filter(|&column| {
                self.rows.is_empty() || self.rows.iter().any(|row| !row[column].is_empty())
            })
            .map(|column| {
                let cells = self.rows.iter().map(|row| width(&row[column]));
                (
                    column,
                    cells
                        .chain([width(self.headings[column].0)])
                        .max()
                        .unwrap_or(0),
                )
            })
            .collect();
        let line = |cell: &dyn Fn(usize) -> String| {
            let mut line = String::new();
            for (at, &(column, wide)) in columns.iter().enumerate() {
                let text = cell(column);
                let pad = " ".repeat(wide - width(&text));
                line += if at == 0 { "" } else { GAP };
                line += &match self.headings[column].1 {
                    Left => text + &pad,
                    Right => pad + &text,
                };
            }
            line.truncate(line.trim_end().len());
            line
        };
        let mut out = style.bold(&line(&|column| self.headings[column].0.to_owned())) + "\n";
        for row in &self.rows {
            out += &line(&|column| row[column].clone());
            out.push('\n');
        }
        out
    }
}

/// Lines of `label  value`, the values aligned; rows with an empty value are left out.
pub fn fields(style: Style, rows: &[(&str, String)]) -> String {
    let shown = || rows.iter().filter(|(_, value)| !value.is_empty());
    let wide = shown()
        .map(|(label, _)| label.chars().count())
        .max()
        .unwrap_or(0);
    shown()
        .map(|(label, value)| {
            let pad = " ".repeat(wide - label.chars().count());
            format!("{}{pad}{GAP}{}\n", style.bold(label), printable(value))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_empty_ones_vanish() {
        let mut table = Table::new(&["NAME", ">SIZE", "NOTE", "STATE"]);
        table.row([
            "lab:1".into(),
            "3 B".into(),
            String::new(),
            "complete".into(),
        ]);
        table.row([
            "laboratory:2".into(),
            "100 MiB".into(),
            String::new(),
            String::new(),
        ]);
        let text = table.render(Style::PLAIN);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].ends_with("STATE"), "{text}");
        assert!(!text.contains("NOTE"));
        assert_eq!(lines[0].find("STATE"), lines[1].find("complete"));
        assert_eq!(lines[2].trim_end(), lines[2]);
        let end = |line: &str, cell: &str| line.find(cell).map(|at| at + cell.len());
        assert_eq!(end(lines[1], "3 B"), end(lines[2], "100 MiB"));
    }

    #[test]
    fn fields_align() {
        let text = fields(
            Style::PLAIN,
            &[
                ("id", "1".into()),
                ("gone", String::new()),
                ("longer", "2".into()),
            ],
        );
        assert!(text.ends_with("longer  2\n"), "{text}");
        assert!(!text.contains("gone"));
    }
}
