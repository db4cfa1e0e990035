//! Tables of keys beside what programs see: every key is in its table and nothing else, with the kind of its value.
//!
//! A table `key | value | meaning` describes an object, a table `value | meaning` the texts of an enumeration. A value
//! is `number`, `text`, `boolean`, `hash`, `path`, the title of another section, or a `list of` these; `or null` may
//! follow, and in requests `, required`. A row without a key takes in all keys of the section that it names.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::markdown::{Document, code, codes};

/// Compares a document with samples, and collects what differs.
#[derive(Debug)]
pub struct Comparison<'a> {
    document: &'a Document,
    /// Sections that described something.
    pub seen: BTreeSet<String>,
    pub problems: Vec<String>,
}

/// What a table says of a key.
#[derive(Debug, Clone)]
struct Key {
    form: String,
    nullable: bool,
    required: bool,
}

impl<'a> Comparison<'a> {
    pub fn with(document: &'a Document) -> Self {
        Self {
            document,
            seen: BTreeSet::new(),
            problems: Vec::new(),
        }
    }

    /// Compares a section with samples of what it describes. Together they must hold a value and, where there may be
    /// none, null for each key.
    pub fn samples(&mut self, title: &str, samples: &[&Value]) {
        self.seen.insert(title.to_owned());
        let section = self.document.section(&format!("`{title}`"));
        match section.tables.first() {
            Some(table) if table.headings[0] == "value" => {
                let words = self.words(title);
                for sample in samples {
                    if !sample
                        .as_str()
                        .is_some_and(|word| words.contains(&word.to_owned()))
                    {
                        self.problem(title, format!("does not tell of the value {sample}"));
                    }
                }
            }
            _ => self.object(title, samples),
        }
    }

    /// Compares an enumeration's table with all its values.
    pub fn enumeration(&mut self, title: &str, values: &[String]) {
        self.seen.insert(title.to_owned());
        let words = self.words(title);
        let (documented, real): (BTreeSet<_>, BTreeSet<_>) =
            (words.iter().collect(), values.iter().collect());
        self.differences(title, &documented, &real);
    }

    /// Compares which keys must be given.
    pub fn required(&mut self, title: &str, required: &BTreeSet<String>) {
        let keys = self.keys(title);
        let documented: BTreeSet<&String> = keys
            .iter()
            .filter(|(_, key)| key.required)
            .map(|(name, _)| name)
            .collect();
        if documented != required.iter().collect() {
            let problem = format!("says that {documented:?} are required, and {required:?} are");
            self.problem(title, problem);
        }
    }

    /// Sections of the document with a table of keys or values that nothing was compared with.
    pub fn unseen(&mut self) {
        let described = self
            .document
            .sections
            .iter()
            .filter(|section| {
                section
                    .tables
                    .iter()
                    .any(|table| matches!(&*table.headings[0], "key" | "value"))
            })
            .map(|section| section.title.trim_matches('`').to_owned());
        let unseen: Vec<String> = described
            .filter(|title| !self.seen.contains(title))
            .collect();
        for title in unseen {
            self.problem(&title, "describes what does not exist".to_owned());
        }
    }

    /// Fails with all problems.
    pub fn conclude(self) {
        assert!(self.problems.is_empty(), "\n{}", self.problems.join("\n"));
    }

    fn object(&mut self, title: &str, samples: &[&Value]) {
        let keys = self.keys(title);
        let mut values: BTreeMap<&String, Vec<&Value>> = BTreeMap::new();
        for sample in samples {
            let Some(object) = sample.as_object() else {
                return self.problem(title, format!("describes an object, not {sample}"));
            };
            for (key, value) in object {
                values.entry(key).or_default().push(value);
            }
        }
        self.differences(
            title,
            &keys.keys().collect(),
            &values.keys().copied().collect(),
        );
        for (name, values) in values {
            let Some(key) = keys.get(name) else { continue };
            if values.len() < samples.len() {
                self.problem(title, format!("`{name}` is sometimes left out"));
            }
            let (nulls, values): (Vec<&Value>, Vec<&Value>) =
                values.into_iter().partition(|value| value.is_null());
            if nulls.is_empty() == key.nullable {
                let is = if key.nullable { "never" } else { "sometimes" };
                self.problem(title, format!("`{name}` is {is} null"));
            }
            self.form(&format!("{title}.{name}"), &key.form, &values);
        }
    }

    fn form(&mut self, place: &str, form: &str, values: &[&Value]) {
        if values.is_empty() {
            return self.problem(place, "no sample has a value".to_owned());
        }
        if let Some(items) = form.strip_prefix("list of ") {
            let lists: Vec<&Vec<Value>> = values.iter().filter_map(|v| v.as_array()).collect();
            if lists.len() < values.len() {
                return self.problem(place, format!("is no {form}: {values:?}"));
            }
            let all: Vec<&Value> = lists.into_iter().flatten().collect();
            return self.form(place, items, &all);
        }
        if let Some(title) = code(form) {
            return self.samples(title, values);
        }
        let fits = |value: &Value| match form {
            "number" => value.is_number(),
            "text" => value.is_string(),
            "boolean" => value.is_boolean(),
            "hash" => value.as_str().is_some_and(is_hash),
            "path" => value.is_string(),
            _ => false,
        };
        if !values.iter().all(|value| fits(value)) {
            self.problem(place, format!("is no {form}: {values:?}"));
        }
    }

    fn keys(&mut self, title: &str) -> BTreeMap<String, Key> {
        let document = self.document;
        let section = document.section(&format!("`{title}`"));
        let mut keys = BTreeMap::new();
        let Some(table) = section.tables.first() else {
            return keys;
        };
        for row in &table.rows {
            let Some(name) = code(&row[0]) else {
                for other in codes(&row[2]) {
                    self.seen.insert(other.to_owned());
                    keys.extend(self.keys(other));
                }
                continue;
            };
            let (form, required) = match row[1].strip_suffix(", required") {
                Some(form) => (form, true),
                None => (&*row[1], false),
            };
            let (form, nullable) = match form.strip_suffix(" or null") {
                Some(form) => (form, true),
                None => (form, false),
            };
            let key = Key {
                form: form.to_owned(),
                nullable,
                required,
            };
            if keys.insert(name.to_owned(), key).is_some() {
                self.problem(title, format!("tells of `{name}` twice"));
            }
            if row.last().is_none_or(String::is_empty) {
                self.problem(title, format!("does not tell what `{name}` means"));
            }
        }
        keys
    }

    fn words(&self, title: &str) -> Vec<String> {
        let section = self.document.section(&format!("`{title}`"));
        let rows = section.tables.iter().flat_map(|table| &table.rows);
        rows.map(|row| row[0].trim_matches('`').to_owned())
            .collect()
    }

    fn differences(
        &mut self,
        title: &str,
        documented: &BTreeSet<&String>,
        real: &BTreeSet<&String>,
    ) {
        for missing in real.difference(documented) {
            self.problem(title, format!("does not tell of `{missing}`"));
        }
        for extra in documented.difference(real) {
            self.problem(title, format!("tells of `{extra}`, which does not exist"));
        }
    }

    pub fn problem(&mut self, title: &str, problem: String) {
        self.problems
            .push(format!("{}: {title}: {problem}", self.document.name));
    }
}

fn is_hash(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}
