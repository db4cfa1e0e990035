//! `home.md` beside a real home: which files there are, their modes, keys, bounds and defaults.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use capsule_node::home::{
    Home, InviteOptions, JoinOptions, Rates, Settings, socket, system_entropy,
};
use capsule_node::machine::config::Directory;
use capsule_node::store::{Store, StoreOptions};
use capsule_proto::credential::Roles;
use serde_json::Value;

use crate::markdown::{Document, code};
use crate::values::Comparison;

/// Has everything in it: a fleet founded, left by force for another, and a node listening.
fn home(temp: &Path) -> (Home, tokio::net::UnixListener) {
    let (home, other) = (Home::new(temp.join("home")), Home::new(temp.join("other")));
    let now = 1_000_000;
    let force = JoinOptions {
        force: true,
        ..JoinOptions::default()
    };
    for home in [&home, &other] {
        let options = JoinOptions::default();
        home.init_fleet(&options, now, &mut system_entropy).unwrap();
    }
    let options = InviteOptions {
        roles: Roles::default(),
        channels: Vec::new(),
        expires: now + 1,
        addresses: vec!["lab.example:4277".into()],
    };
    let token = other
        .invite(&options, now, &mut system_entropy)
        .unwrap()
        .token;
    home.join(&token, &force, now, &mut system_entropy).unwrap();
    home.save_listening(&["10.0.0.1:4277".into()]).unwrap();
    home.save_rates(&Rates::default()).unwrap();
    drop(Store::open(&home.store_dir(), StoreOptions::default()).unwrap());
    let socket = socket::prepare(home.dir()).unwrap();
    let listener = capsule_node::control::listen(&socket).unwrap();
    (home, listener)
}

#[tokio::test]
async fn files_and_modes_are_those_that_the_document_names() {
    let temp = tempfile::tempdir().unwrap();
    let (joined, _listener) = home(temp.path());
    // Only a founder has it.
    let founder = temp.path().join("other/fleet.key");
    fs::rename(founder, joined.dir().join("fleet.key")).unwrap();
    // Made with the first machine.
    Directory::of(&joined, "me").unwrap().make().unwrap();

    let mode = |path: &Path| {
        let mode = fs::symlink_metadata(path).unwrap().permissions().mode();
        format!("{:04o}", mode & 0o7777)
    };
    let mut real = BTreeMap::from([(".".to_owned(), mode(joined.dir()))]);
    for entry in fs::read_dir(joined.dir()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let old_root = name
            .strip_prefix("fleet-")
            .and_then(|rest| rest.strip_suffix(".key"))
            .filter(|id| id.len() == 16);
        let name = old_root.map_or_else(|| name.to_owned(), |_| "fleet-ID.key".to_owned());
        real.insert(name, mode(&path));
    }
    let document = Document::read("home.md");
    let files = &document.section("Files").tables[0];
    let documented: BTreeMap<String, String> = files
        .rows
        .iter()
        .map(|row| (code(&row[0]).unwrap().to_owned(), row[1].clone()))
        .collect();
    assert_eq!(documented, real);
}

#[tokio::test]
async fn json_files_have_the_keys_that_the_document_names() {
    let temp = tempfile::tempdir().unwrap();
    let (home, _listener) = home(temp.path());
    let document = Document::read("home.md");
    let mut comparison = Comparison::with(&document);
    for name in ["membership.json", "listening.json", "rates.json"] {
        let bytes = fs::read(home.dir().join(name)).unwrap();
        comparison.samples(name, &[&serde_json::from_slice(&bytes).unwrap()]);
    }
    comparison.seen.insert("home.json".into());
    comparison.unseen();
    comparison.conclude();
}

#[test]
fn settings_have_the_keys_bounds_and_defaults_that_the_document_names() {
    let document = Document::read("home.md");
    let table = &document.section("`home.json`").tables[0];
    let Value::Object(defaults) = serde_json::to_value(Settings::default()).unwrap() else {
        panic!("settings are an object")
    };
    let keys: BTreeSet<&str> = table
        .rows
        .iter()
        .map(|row| code(&row[0]).unwrap())
        .collect();
    assert_eq!(keys, defaults.keys().map(String::as_str).collect());
    for row in &table.rows {
        let key = code(&row[0]).unwrap();
        assert_eq!(code(&row[2]).unwrap(), defaults[key].to_string(), "{key}");
        // What is said to whoever wrote something that no key takes.
        let wrong = serde_json::json!({ key: { "no": "such" } });
        let refused = serde_json::from_value::<Settings>(wrong).unwrap_err();
        let refused = refused.to_string();
        let must_be = refused
            .strip_prefix(&format!("`{key}` must be "))
            .and_then(|rest| rest.strip_suffix(", not {\"no\":\"such\"}"));
        assert_eq!(must_be, Some(&*row[1]), "{refused}");
    }
    let example = &document.section("`home.json`").code[0];
    let example: Settings = serde_json::from_str(example).unwrap();
    assert_eq!(example.quota, Some(50 << 30));
}
