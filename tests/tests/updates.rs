//! Updates: who has the older version fetches what differs, who has nothing gets it all, and both get out what went in.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use capsule_tests::short::{number, text};
use capsule_tests::{Fleet, Node, data};
use serde_json::Value;

/// Pulls as planned, to the byte, and exports; what was fetched.
fn pull(node: &Node, name: &str, to: &Path) -> u64 {
    let planned = node.json(&["plan", name]);
    let pulled = node.json(&["pull", name]);
    assert_eq!(
        number(&pulled, "fetched_bytes"),
        number(&planned, "fetch_bytes"),
        "{planned:#} {pulled:#}"
    );
    node.ok(&["export", name, "--to", text(to)]);
    number(&planned, "planning_bytes") + number(&pulled, "fetched_bytes")
}

#[test]
fn an_update_of_a_disk_costs_what_changed() {
    let mut fleet = Fleet::of(2);
    let disk = fleet.path("disk.raw");
    let file = fs::File::create_new(&disk).unwrap();
    file.set_len(64 << 20).unwrap();
    file.write_all_at(&data::noise(1, 8 << 20), 4 << 20)
        .unwrap();
    file.write_all_at(&data::prose(2, 8 << 20), 40 << 20)
        .unwrap();
    let args = ["publish", text(&disk), "--as", "disk", "--name"];
    let publish = |fleet: &Fleet, name: &str| fleet[0].json(&[&args[..], &[name]].concat());
    let first = publish(&fleet, "lab:1");
    let all = pull(&fleet[1], "lab:1", &fleet.path("copy1"));
    assert!(all > 8 << 20);

    // Some pages change in place, some content moves, some is new.
    file.write_all_at(&data::noise(3, 20_000), 5 << 20).unwrap();
    file.write_all_at(&data::noise(1, 1 << 20), 20 << 20)
        .unwrap();
    file.write_all_at(&data::prose(4, 10_000), 41 << 20)
        .unwrap();
    let second = publish(&fleet, "lab:2");
    assert_eq!(second["parent"], "lab:1");
    assert!(number(&second, "inherited_bytes") > 60 << 20, "{second:#}");
    assert!(number(&second, "copied_bytes") >= 1 << 20, "{second:#}");
    // The plan tells why: as it was, copied, compressed against old content, new; to the byte.
    let planned = fleet[1].json(&["plan", "lab:2"]);
    let disk_plan = &planned["components"][0];
    for key in ["inherited", "copied"] {
        assert_eq!(
            number(disk_plan, key),
            number(&second, &format!("{key}_bytes"))
        );
    }
    let packs = number(disk_plan, "referring") + number(disk_plan, "new");
    assert_eq!(packs, number(&second, "pack_bytes"));
    assert_eq!(packs, number(&planned, "fetch_bytes"));
    let update = pull(&fleet[1], "lab:2", &fleet.path("copy2"));
    assert!(update < 60_000, "{update}");
    assert!(fs::read(fleet.path("copy2")).unwrap() == fs::read(&disk).unwrap());

    // The third version, from the second; then whoever has nothing, and whoever has the first.
    file.set_len(70 << 20).unwrap();
    file.write_all_at(&data::noise(5, 30_000), 66 << 20)
        .unwrap();
    let third = publish(&fleet, "lab:3");
    let root = blake3::hash(&fs::read(&disk).unwrap()).to_hex();
    assert_eq!(third["components"][0]["root"], root.as_str());
    let update = pull(&fleet[1], "lab:3", &fleet.path("copy3"));
    assert!(update < 60_000, "{update}");
    let token = fleet.invite(&[]);
    let newcomer = fleet.join(&token);
    fleet[newcomer].wait_for_peers(2);
    let whole = pull(&fleet[newcomer], "lab:3", &fleet.path("copy4"));
    assert!(whole < all + 120_000, "{whole}");
    for copy in ["copy3", "copy4"] {
        assert!(fs::read(fleet.path(copy)).unwrap() == fs::read(&disk).unwrap());
    }

    // What is dropped takes nothing away from what stands on it.
    fleet[1].ok(&["pin", "lab:3"]);
    fleet[1].ok(&["rm", "lab:1"]);
    fleet[1].ok(&["rm", "lab:2"]);
    fleet[1].ok(&["gc"]);
    assert_eq!(fleet[1].json(&["verify"])["damaged"], Value::Array(vec![]));
    fleet[1].ok(&["export", "lab:3", "--to", text(&fleet.path("copy5"))]);
    assert!(fs::read(fleet.path("copy5")).unwrap() == fs::read(&disk).unwrap());

    // Against nothing: the same capsule, so nothing new.
    let again = fleet[0].json(&[&args[..], &["lab:3", "--no-parent"]].concat());
    assert_eq!(
        (again["unchanged"].as_bool(), &again["capsule"]),
        (Some(true), &third["capsule"])
    );
    assert_ne!(first["capsule"], third["capsule"]);
}

#[test]
fn a_rebase_spares_newcomers_the_history() {
    let mut fleet = Fleet::of(2);
    let path = fleet.path("file");
    let args = |name| ["publish", text(&path), "--as", "file", "--name", name];
    fs::write(&path, data::noise(1, 3 << 20)).unwrap();
    fleet[0].ok(&args("lab:1"));
    fleet[1].ok(&["pull", "lab:1"]);
    // Most of the first version is of no use for the second, but nobody can have this without that.
    let new = [
        data::noise(2, 1 << 20),
        data::noise(1, 3 << 20)[..500_000].to_vec(),
    ]
    .concat();
    fs::write(&path, &new).unwrap();
    fleet[0].ok(&args("lab:2"));
    let before = fleet[1].json(&["plan", "lab:2"]);
    let rebased = fleet[0].json(&["publish", "--rebase", "lab:2"]);
    assert_eq!(rebased["unchanged"], false);
    let size = number(&rebased, "pack_bytes");
    assert!((1_500_000..1_600_000).contains(&size), "{rebased:#}");
    let again = fleet[0].json(&["publish", "--rebase", "lab:2"]);
    assert_eq!(again["unchanged"], true);
    // It stays when garbage is collected.
    fleet[0].ok(&["gc"]);
    let token = fleet.invite(&[]);
    let newcomer = fleet.join(&token);
    fleet[newcomer].wait_for_peers(2);
    let fetched = pull(&fleet[newcomer], "lab:2", &fleet.path("copy"));
    assert!(fetched < size + 20_000, "{fetched} of {size}");
    assert!(fs::read(fleet.path("copy")).unwrap() == new);
    let after = fleet[1].json(&["plan", "lab:2"]);
    assert_eq!(
        number(&after, "fetch_bytes"),
        number(&before, "fetch_bytes")
    );
    // Only who may publish may rebase, and only what is here.
    fleet[newcomer].fails(1, &["publish", "--rebase", "lab:2"]);
    fleet[0].fails(2, &["publish", "--rebase", "lab:2", "--trim"]);
}

fn same(a: &Path, b: &Path) {
    let output = Command::new("diff")
        .args(["-r", "--no-dereference"])
        .args([a, b])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

#[test]
fn an_update_of_a_tree_costs_what_changed() {
    let mut fleet = Fleet::of(2);
    let tree = fleet.path("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    for number in 0..40 {
        fs::write(
            tree.join(format!("file{number:02}")),
            data::noise(number, 100_000),
        )
        .unwrap();
    }
    fs::write(tree.join("sub/prose"), data::prose(100, 2_000_000)).unwrap();
    fleet[0].publish(&tree, "lab:1");
    let all = pull(&fleet[1], "lab:1", &fleet.path("copy1"));
    assert!(all > 4_000_000);

    // A file before all others moves the contents of every one; one moves, one goes, one changes in the middle.
    fs::write(tree.join("a-first"), data::noise(200, 5_000)).unwrap();
    fs::rename(tree.join("file10"), tree.join("sub/renamed")).unwrap();
    fs::remove_file(tree.join("file11")).unwrap();
    let mut prose = fs::read(tree.join("sub/prose")).unwrap();
    prose.splice(1_000_000..1_000_000, data::prose(300, 3_000));
    fs::write(tree.join("sub/prose"), prose).unwrap();
    let second = fleet[0].publish(&tree, "lab:2");
    assert_eq!(second["parent"], "lab:1");
    let update = pull(&fleet[1], "lab:2", &fleet.path("copy2"));
    assert!(update < 25_000, "{update} {second:#}");
    same(&tree, &fleet.path("copy2"));

    // Only metadata changes.
    fs::set_permissions(
        tree.join("file20"),
        std::os::unix::fs::PermissionsExt::from_mode(0o600),
    )
    .unwrap();
    fleet[0].publish(&tree, "lab:3");
    let update = pull(&fleet[1], "lab:3", &fleet.path("copy3"));
    assert!(update < 3_000, "{update}");

    // A change that length and time do not tell is found where all is read.
    let changed = tree.join("file30");
    let time = fs::metadata(&changed).unwrap().modified().unwrap();
    fs::write(&changed, data::noise(400, 100_000)).unwrap();
    fs::File::options()
        .write(true)
        .open(&changed)
        .unwrap()
        .set_modified(time)
        .unwrap();
    let path = text(&tree);
    let checked = fleet[0].json(&["publish", path, "--name", "lab:4", "--checksum"]);
    assert!(number(&checked, "pack_bytes") > 90_000, "{checked:#}");
    let token = fleet.invite(&[]);
    let newcomer = fleet.join(&token);
    fleet[newcomer].wait_for_peers(2);
    for node in [1, newcomer] {
        let copy = fleet.path(&format!("copy4-{node}"));
        pull(&fleet[node], "lab:4", &copy);
        same(&tree, &copy);
    }
}

#[test]
fn a_parent_that_is_not_here_is_told() {
    let mut fleet = Fleet::of(1);
    let token = fleet.invite(&["--role", "publisher"]);
    let other = fleet.join(&token);
    let file = fleet.path("file");
    fs::write(&file, data::prose(1, 500_000)).unwrap();
    fleet[0].publish(&file, "lab:1");
    fleet[other].wait_until("the name has come", |node| {
        node.run(&["show", "lab:1"]).code == Some(0)
    });
    fs::write(&file, data::prose(2, 500_000)).unwrap();
    let path = text(&file);
    let said = fleet[other].fails(
        1,
        &["publish", path, "--name", "lab:2", "--parent", "lab:1"],
    );
    assert!(
        said.contains("lab:1 is not here") && said.contains("capsule pull lab:1"),
        "{said}"
    );
    // The newest is not here: then against nothing.
    let published = fleet[other].publish(&file, "lab:2");
    assert_eq!(published["parent"], Value::Null);
}

#[test]
fn layers_tell_the_ways_to_a_version() {
    let fleet = Fleet::of(1);
    let file = fleet.path("file");
    let mut roots = vec![Value::Null];
    for version in 1..=3 {
        let content = [data::noise(1, 200_000), data::prose(version, 20_000)].concat();
        fs::write(&file, content).unwrap();
        let published = fleet[0].publish(&file, &format!("lab:{version}"));
        roots.push(published["components"][0]["root"].clone());
    }
    let listed = fleet[0].json(&["layers", "lab"]);
    let layers = listed["layers"].as_array().unwrap();
    let ways: Vec<_> = layers
        .iter()
        .map(|layer| (layer["parent"].clone(), layer["target"].clone()))
        .collect();
    let expected: Vec<_> = (1..=3)
        .rev()
        .map(|n| (roots[n - 1].clone(), roots[n].clone()))
        .collect();
    assert_eq!(ways, expected);
    let told = fleet[0].ok(&["layers", "lab"]);
    assert!(
        told.contains("nothing") && told.lines().count() == 5,
        "{told}"
    );
    assert!(
        told.ends_with("file (stream) is read here through 3 layers\n"),
        "{told}"
    );
}

/// A file that changes a little with every version.
fn change(file: &Path, version: u64) {
    let content = [data::noise(1, 20_000), data::prose(version, 2_000)].concat();
    fs::write(file, content).unwrap();
}

#[test]
fn of_a_long_chain_half_is_gone_back() {
    let fleet = Fleet::of(2);
    let file = fleet.path("file");
    let mut sizes = Vec::new();
    for version in 1..=66 {
        change(&file, version);
        let published = fleet[0].publish(&file, &format!("lab:{version}"));
        assert_eq!(published["parent"].is_null(), version == 1, "{published:#}");
        sizes.push(number(&published, "pack_bytes") + number(&published, "index_bytes"));
    }
    // No layer from nothing ever again.
    assert!(
        sizes[1..].iter().all(|size| *size < sizes[0] / 5),
        "{sizes:?}"
    );
    for (name, layers) in [("lab:64", 64), ("lab:66", 34)] {
        let listed = fleet[0].json(&["layers", name]);
        assert_eq!(listed["layers"].as_array().unwrap().len(), layers, "{name}");
    }
    let copy = fleet.path("copy");
    for name in ["lab:64", "lab:66"] {
        pull(&fleet[1], name, &copy);
        change(&file, name[4..].parse().unwrap());
        assert!(
            fs::read(&copy).unwrap() == fs::read(&file).unwrap(),
            "{name}"
        );
        fs::remove_file(&copy).unwrap();
    }
    let planned = fleet[1].json(&["plan", "lab:66"]);
    assert_eq!(number(&planned, "fetch_bytes"), 0, "{planned:#}");
}

#[test]
fn who_shares_nothing_needs_nothing_of_the_other() {
    let fleet = Fleet::of(2);
    let file = fleet.path("file");
    let publish = |content: Vec<u8>, name: &str| {
        fs::write(&file, content).unwrap();
        fleet[0].publish(&file, name)
    };
    publish(data::noise(1, 1_000_000), "lab:1");
    let second = publish(data::noise(2, 1_000_000), "lab:2");
    assert_eq!(second["parent"], Value::Null);
    let fetched = pull(&fleet[1], "lab:2", &fleet.path("copy"));
    assert!(fetched < 1_010_000, "{fetched}");
}

// What does not compress is its own pack: its layers are needed by what stands upon it all the same.
#[test]
fn a_component_that_is_its_own_pack_carries_updates() {
    let fleet = Fleet::of(2);
    let file = fleet.path("file");
    let mut content = data::noise(1, 1_000_000);
    fs::write(&file, &content).unwrap();
    fleet[0].publish(&file, "lab:1");
    fleet[1].ok(&["pull", "lab:1"]);
    for node in fleet.nodes() {
        node.ok(&["pin", "lab:1"]);
        node.ok(&["gc"]);
    }
    content[500_000] ^= 1;
    fs::write(&file, &content).unwrap();
    let second = fleet[0].publish(&file, "lab:2");
    assert_eq!(second["parent"], "lab:1");
    let fetched = pull(&fleet[1], "lab:2", &fleet.path("copy"));
    assert!(fetched < 10_000, "{fetched}");
    assert!(fs::read(fleet.path("copy")).unwrap() == content);
}

#[test]
fn a_file_whose_length_and_time_are_kept_is_published_as_it_is_now() {
    let fleet = Fleet::of(1);
    let tree = fleet.path("tree");
    fs::create_dir(&tree).unwrap();
    let conf = tree.join("conf");
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    for version in 1..=2 {
        fs::write(&conf, format!("version={version}")).unwrap();
        fs::File::options()
            .write(true)
            .open(&conf)
            .unwrap()
            .set_modified(time)
            .unwrap();
        fleet[0].publish(&tree, &format!("lab:{version}"));
    }
    let copy = fleet.path("copy");
    fleet[0].ok(&["export", "lab:2", "--to", text(&copy)]);
    assert_eq!(fs::read(copy.join("conf")).unwrap(), b"version=2");
}
