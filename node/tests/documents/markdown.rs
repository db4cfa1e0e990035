//! Our documents as far as tests read them: sections by their headings, with tables and blocks of code.
#![allow(dead_code, reason = "each test program uses a part")]

use std::path::Path;

/// A document of `node/docs`.
#[derive(Debug)]
pub struct Document {
    pub name: &'static str,
    pub sections: Vec<Section>,
}

/// What stands between a heading and the next.
#[derive(Debug, Default)]
pub struct Section {
    /// The heading's text, code marks included.
    pub title: String,
    /// 1 for the document's title.
    pub level: usize,
    /// Lines that are neither tables nor code.
    pub text: String,
    pub tables: Vec<Table>,
    /// Blocks between fences.
    pub code: Vec<String>,
}

#[derive(Debug, Default)]
pub struct Table {
    pub headings: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Document {
    pub fn read(name: &'static str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("docs")
            .join(name);
        let text = std::fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut sections = vec![Section::default()];
        let (mut fenced, mut in_table) = (false, false);
        for line in text.lines() {
            let section = sections.last_mut().expect("there is always one");
            if line.starts_with("```") {
                fenced = !fenced;
                if fenced {
                    section.code.push(String::new());
                }
            } else if fenced {
                let block = section.code.last_mut().expect("a fence began it");
                *block += line;
                block.push('\n');
            } else if let Some((level, title)) = heading(line) {
                sections.push(Section {
                    title: title.to_owned(),
                    level,
                    ..Section::default()
                });
            } else if line.starts_with('|') {
                section.add_row(cells(line), !in_table);
            } else {
                section.text += line;
                section.text.push('\n');
            }
            in_table = !fenced && line.starts_with('|');
        }
        assert!(!fenced, "{name} ends within a block of code");
        Self { name, sections }
    }

    /// The only section with a title.
    pub fn section(&self, title: &str) -> &Section {
        let mut found = self
            .sections
            .iter()
            .filter(|section| section.title == title);
        let section = found
            .next()
            .unwrap_or_else(|| panic!("{} has no section {title}", self.name));
        assert!(
            found.next().is_none(),
            "{} has two sections {title}",
            self.name
        );
        section
    }

    /// Titles that are code and nothing else, such as a type's, without the marks.
    pub fn code_titles(&self) -> impl Iterator<Item = &str> {
        self.sections
            .iter()
            .filter_map(|section| code(&section.title))
    }

    /// Whether a link's fragment leads to a heading.
    pub fn has_anchor(&self, anchor: &str) -> bool {
        self.sections
            .iter()
            .any(|section| anchor_of(&section.title) == anchor)
    }
}

impl Section {
    fn add_row(&mut self, cells: Vec<String>, first: bool) {
        if first {
            self.tables.push(Table {
                headings: cells,
                rows: Vec::new(),
            });
            return;
        }
        let is_rule = cells
            .iter()
            .all(|cell| cell.chars().all(|c| c == '-' || c == ':') && !cell.is_empty());
        if !is_rule {
            let table = self.tables.last_mut().expect("its headings came first");
            assert_eq!(
                cells.len(),
                table.headings.len(),
                "{}: {cells:?}",
                self.title
            );
            table.rows.push(cells);
        }
    }
}

/// A cell that is code and nothing else, without the marks.
pub fn code(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?
        .strip_suffix('`')
        .filter(|text| !text.contains('`'))
}

/// Everything between code marks.
pub fn codes(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The targets of links, as written.
pub fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| Some(rest.split_once(')')?.0))
}

/// A heading's fragment, as code hosts make it.
fn anchor_of(title: &str) -> String {
    title
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

fn heading(line: &str) -> Option<(usize, &str)> {
    let level = line.bytes().take_while(|&b| b == b'#').count();
    let title = line.get(level..)?.strip_prefix(' ')?;
    (level > 0).then_some((level, title.trim()))
}

/// A row's cells; a bar within a cell is written `\|`.
fn cells(line: &str) -> Vec<String> {
    let inner = line.trim().trim_start_matches('|');
    let inner = inner.strip_suffix('|').unwrap_or(inner);
    let (mut cells, mut cell) = (Vec::new(), String::new());
    let mut chars = inner.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' if chars.peek() == Some(&'|') => cell.extend(chars.next()),
            '|' => cells.push(std::mem::take(&mut cell).trim().to_owned()),
            c => cell.push(c),
        }
    }
    cells.push(cell.trim().to_owned());
    cells
}
