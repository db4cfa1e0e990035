//! `control.md` beside the control API's types.

use std::collections::BTreeSet;

use capsule_chunker::layer::encode::Effort;
use capsule_node::control::*;
use capsule_node::held::{kind_word, space_word};
use capsule_node::machine::api::*;
use capsule_node::store::BlobKind;
use capsule_proto::RootHash;
use capsule_proto::index::Space;
use capsule_proto::manifest::{ComponentKind, Machine};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::markdown::Document;
use crate::samples;
use crate::values::Comparison;

#[test]
fn requests_and_answers_have_the_keys_that_the_document_names() {
    let document = Document::read("control.md");
    let mut commands = Commands {
        document: &document,
        comparison: Comparison::with(&document),
        names: BTreeSet::new(),
    };
    let which = || CapsuleRef("lab".into());
    commands.add(
        |full| Publish {
            path: "/sample".into(),
            name: "lab:1".parse().unwrap(),
            read_as: PublishAs::Disk,
            effort: Effort::Max,
            frame_max: full.then_some(1),
            one_file_system: true,
            expires: full.then_some(1),
            parent: full.then(|| CapsuleRef("lab:0".into())),
            no_parent: true,
            checksum: true,
            bitmap: full.then(|| "since".into()),
            trim: true,
        },
        samples::published,
    );
    commands.add(
        |full| Rebase {
            capsule: which(),
            effort: Effort::Max,
            frame_max: full.then_some(1),
        },
        samples::rebased,
    );
    commands.add(
        |full| Ls {
            channel: full.then(|| "lab".parse().unwrap()),
            held: true,
        },
        samples::listed,
    );
    commands.add(|_| Show { capsule: which() }, samples::shown);
    commands.add(
        |full| Plan {
            capsule: which(),
            wait: full.then_some(1),
            like_path: full.then(|| "/sample".into()),
            like_capsule: full.then(which),
        },
        samples::planned,
    );
    commands.add(
        |full| Pull {
            capsule: which(),
            wait: full.then_some(1),
            like_path: full.then(|| "/sample".into()),
            like_capsule: full.then(which),
        },
        samples::pulled,
    );
    let channel = || "lab".parse().unwrap();
    commands.add(|_| Follow { channel: channel() }, samples::followed);
    commands.add(|_| Unfollow { channel: channel() }, samples::unfollowed);
    commands.add(
        |full| Export {
            capsule: which(),
            to: "/sample".into(),
            component: full.then(|| "disk".into()),
            force: true,
        },
        samples::exported,
    );
    commands.add(
        |full| Nbd {
            capsule: which(),
            socket: full.then(|| "/sample".into()),
            listen: full.then(|| "127.0.0.1:10809".parse().unwrap()),
            component: full.then(|| "disk".into()),
            wait: full.then_some(1),
            whole: true,
        },
        samples::serving,
    );
    commands.add(
        |full| Mount {
            capsule: which(),
            at: "/sample".into(),
            component: full.then(|| "disk".into()),
            wait: full.then_some(1),
        },
        samples::mounted,
    );
    commands.add(
        |full| Verify {
            capsule: full.then(which),
            repair: true,
        },
        samples::verified,
    );
    commands.add(|_| Status {}, samples::status);
    commands.add(
        |full| Peers {
            have: full.then(|| RootHash::of(b"sample")),
        },
        samples::peer_list,
    );
    commands.add(|_| Hashes {}, samples::hash_list);
    commands.add(
        |full| Pin {
            capsule: which(),
            machine: full.then(|| "me".to_owned()),
        },
        samples::pinned,
    );
    commands.add(
        |full| Unpin {
            capsule: which(),
            machine: full.then(|| "me".to_owned()),
        },
        samples::pinned,
    );
    commands.add(|_| Gc { dry_run: true }, samples::collected);
    commands.add(
        |_| Rm {
            capsule: which(),
            force: true,
        },
        samples::removed,
    );
    commands.add(|_| Layers { capsule: which() }, samples::layer_list);
    let schedule = || "5 Mbit/s, 22:00-06:00 unlimited".parse().unwrap();
    commands.add(
        |full| Rates {
            upload: full.then(schedule),
            download: full.then(schedule),
            peers: full.then_some(PeersWhere::Beyond),
        },
        samples::rate_list,
    );

    commands.add(
        |full| Capture {
            name: "me:1".parse().unwrap(),
            effort: Effort::Max,
            expires: full.then_some(1),
            against_disks: true,
            machine: Box::new(Machine {
                machine_type: "pc-q35-7.2".to_owned(),
                cpus: 1,
                ..Machine::default()
            }),
            components: vec![
                samples::captured(true),
                samples::captured(false),
                Captured {
                    base: None,
                    ..samples::captured(true)
                },
            ],
        },
        samples::published,
    );
    commands.add(
        |full| CheckName {
            name: "me:1".parse().unwrap(),
            expires: full.then_some(1),
        },
        samples::name_free,
    );
    commands.add(
        |full| Describe {
            capsule: which(),
            wait: full.then_some(1),
        },
        samples::described,
    );
    commands.add(
        |full| Prefetch {
            component: RootHash::of(b"sample"),
            ranges: vec![samples::range()],
            renews: full,
        },
        samples::prefetched,
    );
    machines(&mut commands.comparison);

    let Commands {
        mut comparison,
        names,
        ..
    } = commands;
    // All of them were compared.
    assert_eq!(names, words_of::<Request>().into_iter().collect());
    comparison.enumeration("Phase", &words_of::<Phase>());
    comparison.enumeration("FailureCode", &words_of::<FailureCode>());
    comparison.enumeration("Holding", &words_of::<Holding>());
    comparison.enumeration("PublishAs", &words_of::<PublishAs>());
    comparison.enumeration("PeersWhere", &words_of::<PeersWhere>());
    comparison.enumeration("Effort", &efforts());
    comparison.enumeration("ComponentKind", &component_kinds());
    comparison.enumeration("BlobKind", &blob_kinds());
    comparison.enumeration("Space", &spaces());
    replies(&mut comparison);
    comparison.unseen();
    comparison.conclude();
}

/// What machines' processes are asked, and answer.
fn machines(comparison: &mut Comparison<'_>) {
    let captures = [true, false].map(|full| CaptureMachine {
        name: "me:1".parse().unwrap(),
        effort: Effort::Max,
        expires: full.then_some(1),
        against_disks: true,
        no_balloon: true,
        stop: true,
    });
    let captures = captures.map(|request| inner(request).1);
    comparison.samples("capture-machine", &captures.each_ref());
    let stops = [true, false].map(|full| StopMachine {
        force: true,
        wait: full.then_some(1),
    });
    let stops = stops.map(|request| inner(request).1);
    comparison.samples("stop-machine", &stops.each_ref());
    let both = |title: &str, of: &dyn Fn(bool) -> Value, comparison: &mut Comparison<'_>| {
        comparison.samples(title, &[&of(true), &of(false)]);
    };
    let infos: Vec<Value> = samples::machine_infos().iter().map(value).collect();
    comparison.samples("MachineInfo", &infos.iter().collect::<Vec<_>>());
    let list = |_| {
        value(MachineList {
            machines: samples::machine_infos(),
        })
    };
    both("MachineList", &list, comparison);
    both(
        "CapturedMachine",
        &|full| value(samples::captured_machine(full)),
        comparison,
    );
    both("Origin", &|full| value(samples::origin(full)), comparison);
    both(
        "StoppedMachine",
        &|full| value(samples::stopped_machine(full)),
        comparison,
    );
    let removed = RemovedMachine {
        machine: "me".to_owned(),
    };
    comparison.samples("RemovedMachine", &[&value(removed)]);
    comparison.enumeration("MachineState", &words_of::<MachineState>());
    let asked = [
        "machine-status",
        "await-running",
        "capture-machine",
        "stop-machine",
    ];
    assert_eq!(words_of::<MachineRequest>(), asked);
}

struct Commands<'a> {
    document: &'a Document,
    comparison: Comparison<'a>,
    names: BTreeSet<String>,
}

impl Commands<'_> {
    /// Compares a command's request and answer.
    fn add<C: Command>(&mut self, request: impl Fn(bool) -> C, answer: impl Fn(bool) -> C::Answer) {
        let (name, full) = inner(request(true));
        let (_, spare) = inner(request(false));
        self.comparison.samples(&name, &[&full, &spare]);
        self.comparison.required(&name, &required(&name, &full));

        let path = std::any::type_name::<C::Answer>();
        let title = path.rsplit("::").next().unwrap();
        let link = format!("[`{title}`](#{})", title.to_lowercase());
        let section = self.document.section(&format!("`{name}`"));
        if !section.text.contains(&link) {
            self.comparison
                .problem(&name, format!("does not say that the answer is {link}"));
        }
        self.comparison
            .samples(title, &[&value(answer(true)), &value(answer(false))]);
        self.names.insert(name);
    }
}

/// What a connection sends, line by line.
fn replies(comparison: &mut Comparison<'_>) {
    let all: [Reply<u8>; 5] = [
        Reply::Progress(samples::progress(true)),
        Reply::Notice("sample".into()),
        Reply::Ready(1),
        Reply::Done(1),
        Reply::Failed(samples::failure(true)),
    ];
    let keys: Vec<String> = all.into_iter().map(|reply| only(value(reply)).0).collect();
    comparison.enumeration("Reply", &keys);
    assert_eq!(
        keys.into_iter().collect::<BTreeSet<_>>(),
        words_of::<Reply<u8>>().into_iter().collect()
    );
    let progress = [true, false].map(|full| value(samples::progress(full)));
    comparison.samples("Progress", &progress.each_ref());
    let failures = [true, false].map(|full| value(samples::failure(full)));
    comparison.samples("Failure", &failures.each_ref());
}

fn value(it: impl Serialize) -> Value {
    serde_json::to_value(it).unwrap()
}

/// A command's name and its keys.
fn inner(request: impl Command) -> (String, Value) {
    only(value(request.into_request()))
}

/// An object's only key, and its value.
fn only(object: Value) -> (String, Value) {
    let Value::Object(object) = object else {
        panic!("{object} is no object")
    };
    assert_eq!(object.len(), 1);
    object.into_iter().next().unwrap()
}

/// Keys without which a request is refused.
fn required(name: &str, full: &Value) -> BTreeSet<String> {
    let keys = full.as_object().unwrap().keys();
    keys.filter(|key| {
        let mut spare = full.clone();
        spare.as_object_mut().unwrap().remove(*key);
        serde_json::from_value::<Request>(json!({ name: spare })).is_err()
    })
    .cloned()
    .collect()
}

/// All values of an enumeration, out of what it says to one that it lacks.
fn words_of<T: DeserializeOwned>() -> Vec<String> {
    let Err(error) = serde_json::from_value::<T>(json!("no such word")) else {
        panic!("any word is taken")
    };
    let text = error.to_string();
    let words = crate::markdown::codes(&text);
    words
        .filter(|&word| word != "no such word")
        .map(str::to_owned)
        .collect()
}

// Enumerations that travel as text. A new value must be added to the match, or this does not compile.

fn efforts() -> Vec<String> {
    let of = |effort| match effort {
        Effort::Fast | Effort::Default | Effort::Max => {
            let publish = Publish {
                effort,
                ..Publish::of("/", "lab:1".parse().unwrap())
            };
            inner(publish).1["effort"].as_str().unwrap().to_owned()
        }
    };
    [Effort::Fast, Effort::Default, Effort::Max].map(of).into()
}

fn component_kinds() -> Vec<String> {
    use ComponentKind::{DeviceState, Disk, File, Ram, Tree};
    let of = |kind: ComponentKind| match kind {
        Disk | Ram | DeviceState | File | Tree => kind.word().to_owned(),
    };
    [Disk, Ram, DeviceState, File, Tree].map(of).into()
}

fn blob_kinds() -> Vec<String> {
    use BlobKind::{Index, Listing, Manifest, Other, Pack};
    let of = |kind: BlobKind| match kind {
        Manifest | Listing | Index | Pack | Other => kind_word(kind).to_owned(),
    };
    let mut words: Vec<String> = [Manifest, Listing, Index, Pack, Other].map(of).into();
    // Not a blob, but listed with them.
    words.push("component".to_owned());
    words
}

fn spaces() -> Vec<String> {
    let of = |space: Space| match space {
        Space::Stream | Space::Contents => space_word(space).to_owned(),
    };
    [Space::Stream, Space::Contents].map(of).into()
}
