//! `node/docs/cli.md` beside the definition of the command line: every command has a section with its usage, its
//! arguments and their help, word for word. What is missing is printed as it should stand there.

#[path = "../../tests/documents/markdown.rs"]
mod markdown;

use std::collections::BTreeSet;

use capsule_node::control::Request;
use clap::{Arg, ArgAction, Command, CommandFactory};

use self::markdown::{Document, Section, code, links};
use super::Cli;

/// Commands that print no JSON.
const WITHOUT_JSON: [&str; 3] = ["node", "machine console", "completions"];

#[test]
fn every_command_and_option_is_described_and_nothing_else() {
    let document = Document::read("cli.md");
    let commands = commands();
    let mut problems = Vec::new();
    for (name, command) in &commands {
        let section = document
            .sections
            .iter()
            .find(|section| code(&section.title) == Some(name));
        let wanted = described(name, command);
        if section.map(as_described) != Some(wanted.clone()) {
            problems.push(format!("### `{name}`\n\n{wanted}"));
        }
    }
    assert!(
        problems.is_empty(),
        "cli.md should say:\n\n{}",
        problems.join("\n")
    );
    // What has a usage is a command.
    let documented: BTreeSet<&str> = document
        .sections
        .iter()
        .filter(|section| {
            section
                .code
                .iter()
                .any(|block| block.starts_with("capsule "))
        })
        .filter_map(|section| code(&section.title))
        .collect();
    let known: BTreeSet<&str> = commands.iter().map(|(name, _)| &**name).collect();
    assert_eq!(documented, known);
}

#[test]
fn the_list_of_commands_says_what_each_does_and_whether_it_needs_a_node() {
    let document = Document::read("cli.md");
    let requests = requests();
    let wanted: Vec<[String; 3]> = commands()
        .iter()
        .map(|(name, command)| {
            let needs = match &**name {
                "node" => "is it",
                "demo" => "starts its own",
                "machine create" => "for capsules",
                "machine run" | "machine capture" => "yes",
                name if requests.contains(name) => "yes",
                _ => "no",
            };
            let link = format!("[`{name}`](#{})", name.replace(' ', "-"));
            [link, about(command), needs.to_owned()]
        })
        .collect();
    let table = &document.section("Commands").tables[0];
    let lines = |rows: &mut dyn Iterator<Item = Vec<String>>| {
        rows.map(|row| format!("| {} |", row.join(" | ")))
            .collect::<Vec<_>>()
            .join("\n")
    };
    let real = lines(&mut table.rows.iter().cloned());
    let wanted = lines(&mut wanted.into_iter().map(Vec::from));
    assert!(real == wanted, "cli.md should say:\n\n{wanted}");
}

#[test]
fn answers_are_linked_to_their_keys() {
    let (document, control) = (Document::read("cli.md"), Document::read("control.md"));
    for (name, command) in commands() {
        let section = document.section(&format!("`{name}`"));
        let prints_json = command
            .get_arguments()
            .any(|arg| arg.get_long() == Some("json"));
        assert_ne!(prints_json, WITHOUT_JSON.contains(&&*name), "{name}");
        if !prints_json {
            continue;
        }
        // Those of the socket stand in the other document, where the request names them too.
        let answer = section.text.lines().find_map(|line| {
            let rest = line.strip_prefix("JSON: ")?;
            links(rest).next()
        });
        let answer = answer.unwrap_or_else(|| panic!("{name} does not say `JSON: [...](...)`"));
        if requests().contains(&*name) {
            let request = control.section(&format!("`{name}`"));
            let named = links(&request.text).last().unwrap();
            assert_eq!(answer, format!("control.md{named}"), "{name}");
        } else {
            // Of machines, in the other document too, as their processes answer.
            let (of, anchor) = match answer.strip_prefix("control.md#") {
                Some(anchor) => (&control, anchor),
                None => (&document, answer.strip_prefix('#').unwrap()),
            };
            assert!(of.has_anchor(anchor), "{name}: {answer}");
        }
    }
}

#[test]
fn links_between_the_documents_lead_somewhere() {
    let names = ["cli.md", "control.md", "home.md", "store.md"];
    let documents = names.map(Document::read);
    for document in &documents {
        let cells = |section: &Section| {
            let rows = section.tables.iter().flat_map(|table| table.rows.concat());
            rows.collect::<Vec<_>>().join("\n")
        };
        for section in &document.sections {
            let text = format!("{}\n{}", section.text, cells(section));
            for link in links(&text).filter(|link| !link.contains("://")) {
                let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
                let target = match documents.iter().find(|other| other.name == file) {
                    None if file.is_empty() => document,
                    Some(other) => other,
                    None => {
                        let docs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
                        assert!(docs.join(file).exists(), "{}: {link}", document.name);
                        continue;
                    }
                };
                assert!(
                    anchor.is_empty() || target.has_anchor(anchor),
                    "{}: {link}",
                    document.name
                );
            }
        }
    }
}

/// Commands that do something, by their whole names, in the order of the help.
fn commands() -> Vec<(String, Command)> {
    let mut cli = Cli::command();
    cli.build();
    let mut found = Vec::new();
    for command in cli.get_subcommands() {
        let inner: Vec<&Command> = command
            .get_subcommands()
            .filter(|inner| inner.get_name() != "help" && !inner.is_hide_set())
            .collect();
        if command.get_name() == "help" {
            continue;
        }
        if inner.is_empty() {
            found.push((command.get_name().to_owned(), command.clone()));
        }
        for inner in inner {
            let name = format!("{} {}", command.get_name(), inner.get_name());
            found.push((name, inner.clone()));
        }
    }
    found
}

/// Names of the requests that a node answers.
fn requests() -> BTreeSet<String> {
    let unknown = serde_json::from_str::<Request>(r#"{"?":{}}"#).unwrap_err();
    let text = unknown.to_string();
    let names = markdown::codes(&text).filter(|&name| name != "?");
    names.map(str::to_owned).collect()
}

/// What a section should hold: the usage, and a table of arguments.
fn described(name: &str, command: &Command) -> String {
    let arguments: Vec<&Arg> = command.get_arguments().filter(|arg| is_own(arg)).collect();
    let mut usage = format!("capsule {name}");
    let mut rows = Vec::new();
    for positional in [true, false] {
        for arg in arguments.iter().filter(|a| a.is_positional() == positional) {
            let spelled = spelled(arg);
            let dots = if arg.get_action().takes_values()
                && matches!(arg.get_action(), ArgAction::Append)
            {
                "..."
            } else {
                ""
            };
            usage += &if arg.is_required_set() {
                format!(" {spelled}{dots}")
            } else {
                format!(" [{spelled}]{dots}")
            };
            rows.push(format!(
                "| `{}` | {} |",
                spelled.replace('|', "\\|"),
                meaning(arg).replace('|', "\\|")
            ));
        }
    }
    let table = if rows.is_empty() {
        String::new()
    } else {
        format!("\n| argument | meaning |\n|---|---|\n{}\n", rows.join("\n"))
    };
    format!("```sh\n{usage}\n```\n{table}")
}

/// What a section holds of that.
fn as_described(section: &Section) -> String {
    let usage = section.code.first().cloned().unwrap_or_default();
    let table = section
        .tables
        .first()
        .filter(|table| table.headings[0] == "argument");
    let table = table.map(|table| {
        let rows = table.rows.iter().map(|row| {
            format!(
                "| {} |\n",
                row.iter()
                    .map(|cell| cell.replace('|', "\\|"))
                    .collect::<Vec<_>>()
                    .join(" | ")
            )
        });
        format!(
            "\n| argument | meaning |\n|---|---|\n{}",
            rows.collect::<String>()
        )
    });
    format!("```sh\n{usage}```\n{}", table.unwrap_or_default())
}

/// Not one that every command has.
fn is_own(arg: &Arg) -> bool {
    !matches!(arg.get_id().as_str(), "help" | "version" | "home" | "json")
}

/// `--option VALUE`, with the values in place of their name where they are few words.
fn spelled(arg: &Arg) -> String {
    let value = if arg.get_action().takes_values() {
        let possible: Vec<String> = arg
            .get_possible_values()
            .iter()
            .map(|value| value.get_name().to_owned())
            .collect();
        let names = arg.get_value_names().unwrap_or_default();
        if possible.is_empty() {
            names.join(" ")
        } else {
            possible.join("|")
        }
    } else {
        String::new()
    };
    match arg.get_long() {
        None => value,
        Some(long) => format!("--{long} {value}").trim_end().to_owned(),
    }
}

/// An argument's help, with its default.
fn meaning(arg: &Arg) -> String {
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let takes_values = arg.get_action().takes_values();
    match arg.get_default_values().first().filter(|_| takes_values) {
        Some(default) => format!("{help} [default: {}]", default.display()),
        None => help,
    }
}

fn about(command: &Command) -> String {
    command
        .get_about()
        .map(ToString::to_string)
        .unwrap_or_default()
}
