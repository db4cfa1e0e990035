//! Publishing into a store alone: what is made is kept, found and checked, and lies are refused.

use std::fs;
use std::path::{Path, PathBuf};

use capsule_chunker::layer::encode::Effort;
use capsule_proto::manifest::Manifest;

use super::*;
use crate::held::TreeWay;
use crate::store::StoreOptions;
use crate::transfer::check::check;
use crate::work::Work;

fn request(path: PathBuf) -> Publish {
    Publish {
        effort: Effort::Fast,
        ..Publish::of(path, "lab:1".parse().unwrap())
    }
}

fn store(temp: &Path, name: &str) -> Store {
    Store::open(&temp.join(name), StoreOptions::default()).unwrap()
}

fn draft(store: &Store, path: &Path) -> Result<Draft, Failure> {
    draft_against(store, path, None)
}

/// `parent`: an older version, and since when its files may have been changed.
fn draft_against(
    store: &Store,
    path: &Path,
    parent: Option<(&Manifest, u64)>,
) -> Result<Draft, Failure> {
    let parent = parent.map(|(manifest, since)| Parent {
        name: "lab:0".to_owned(),
        capsule: manifest.id(),
        manifest: manifest.clone(),
        since,
    });
    make(&Making {
        store,
        // No home lies near: its own tests are the daemon's.
        home: Path::new("/proc/self"),
        request: &request(path.into()),
        parent: parent.as_ref(),
        work: &Work::default(),
        reporter: &Reporter::silent(),
        machine: false,
    })
}

/// Publishes into a store alone, without records.
pub(crate) fn published(store: &Store, path: &Path) -> Manifest {
    kept(store, draft(store, path).unwrap())
}

fn kept(store: &Store, mut draft: Draft) -> Manifest {
    keep(store, &mut draft, 1).unwrap();
    let root = draft.manifest.components[0].root;
    note(store, &draft.notes, root);
    draft.manifest
}

fn tree(temp: &Path) -> PathBuf {
    let dir = temp.join("tree");
    fs::create_dir_all(dir.join("sub")).unwrap();
    fs::write(dir.join("empty"), "").unwrap();
    fs::write(
        dir.join("sub/text"),
        "some text, some text, some text".repeat(500),
    )
    .unwrap();
    fs::write(dir.join("zeros"), vec![0; 300_000]).unwrap();
    dir
}

#[test]
fn a_tree_is_kept_found_and_checked() {
    let temp = tempfile::tempdir().unwrap();
    let (store, dir) = (store(temp.path(), "store"), tree(temp.path()));
    let manifest = published(&store, &dir);
    let holdings = Holdings::new(store.clone());
    let component = &manifest.components[0];
    let Some(way @ HeldWay::Tree(_)) = holdings.way_to(component).unwrap() else {
        panic!("a tree")
    };
    check(&store, component, &way, None, &Work::default()).unwrap();
    assert_eq!(holdings.manifest(&manifest.id()), Some(manifest.clone()));
    assert_eq!(
        holdings.listing(component).unwrap().content_size(),
        component.content_size
    );
    // The same content, from another place at another time, is the same capsule.
    let again = draft(&store, &dir).unwrap().manifest;
    assert_eq!(again.id(), manifest.id());
}

/// Files that are as long and as old as in the parent, which nobody touched since, are not read; but only against the version that this
/// directory was last published as, not against an earlier one or another's.
#[test]
fn what_is_not_read_is_what_this_directory_had() {
    let temp = tempfile::tempdir().unwrap();
    let (store, dir) = (store(temp.path(), "store"), tree(temp.path()));
    let write = |dir: &Path, name: &str, content: String| {
        let path = dir.join(name);
        fs::write(&path, content).unwrap();
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH)
            .unwrap();
    };
    let x_of = |manifest: &Manifest| {
        let listing = Holdings::new(store.clone()).listing(&manifest.components[0]);
        let listing = listing.unwrap();
        let entry = |at: usize| listing.entries()[at].path.to_string();
        let mut files = listing.files();
        files.find(|(at, ..)| entry(*at).ends_with('x')).unwrap().2
    };
    // Enough in common for each version to be put upon the one before, whatever is read of it.
    let mut noise = vec![0; 100_000];
    crate::home::system_entropy(&mut noise);
    fs::write(dir.join("noise"), noise).unwrap();
    write(&dir, "x", "before".to_owned());
    let count = |version: u64| fs::write(dir.join("counter"), format!("{version:02}")).unwrap();
    count(1);
    let mut last = published(&store, &dir);
    let mut chains = Vec::new();
    for version in 2..=66 {
        count(version);
        if version == 40 {
            write(&dir, "x", "after!".to_owned());
        }
        // What was written just now is looked at, as its time tells; nothing else.
        let since = if version == 40 { 0 } else { u64::MAX };
        let draft = draft_against(&store, &dir, Some((&last, since))).unwrap();
        let HeldWay::Tree(way) = &draft.parts[0].way else {
            panic!("a tree")
        };
        let way = way.clone();
        chains.push(way.contents.len());
        last = kept(&store, draft);
        if version == 64 {
            // The same again is the same, though the next would be put upon an earlier version.
            let same = draft_against(&store, &dir, Some((&last, u64::MAX))).unwrap();
            assert_eq!(
                (&same.parts[0].way, same.parts[0].layers.len()),
                (&HeldWay::Tree(way), 0)
            );
        }
        if version != 40 {
            continue;
        }
        assert_eq!(x_of(&last), RootHash::of(b"after!"));
    }
    assert_eq!(x_of(&last), RootHash::of(b"after!"));
    assert_eq!((chains[62], chains[63], chains[64]), (64, 33, 34));
    // Another directory, as old as this one, with other content of the same length.
    let other = temp.path().join("other");
    fs::create_dir(&other).unwrap();
    write(&other, "x", "other!".to_owned());
    let draft = draft_against(&store, &other, Some((&last, u64::MAX))).unwrap();
    assert_eq!(draft.parts[0].unread, 0);
    assert_eq!(x_of(&kept(&store, draft)), RootHash::of(b"other!"));
}

/// A version that is the same as an older one needs no layer, whether it is the parent or the one that the next is put upon.
#[test]
fn what_is_gone_back_to_needs_no_layer() {
    let temp = tempfile::tempdir().unwrap();
    let (store, path) = (store(temp.path(), "store"), temp.path().join("file"));
    let mut noise = vec![0; 100_000];
    crate::home::system_entropy(&mut noise);
    let write = |version: u8| fs::write(&path, [&noise[..], &[version]].concat()).unwrap();
    write(1);
    let mut last = published(&store, &path);
    for version in 2..=64 {
        write(version);
        last = kept(
            &store,
            draft_against(&store, &path, Some((&last, 0))).unwrap(),
        );
    }
    for (version, layers) in [(64, 64), (32, 32)] {
        write(version);
        let same = draft_against(&store, &path, Some((&last, 0))).unwrap();
        let HeldWay::Layers(way) = &same.parts[0].way else {
            panic!("a stream")
        };
        assert_eq!(
            (way.len(), same.parts[0].layers.len()),
            (layers, 0),
            "{version}"
        );
    }
    write(31);
    let other = draft_against(&store, &path, Some((&last, 0))).unwrap();
    assert_eq!(other.parts[0].layers.len(), 1);
}

#[test]
fn a_stream_is_served_under_its_own_hash_whether_it_compresses_or_not() {
    let temp = tempfile::tempdir().unwrap();
    let store = store(temp.path(), "store");
    let mut noise = vec![0; 400_000];
    crate::home::system_entropy(&mut noise);
    for (name, content) in [
        ("text", b"words and words ".repeat(30_000)),
        ("noise", noise),
        ("empty", Vec::new()),
    ] {
        let path = temp.path().join(name);
        fs::write(&path, &content).unwrap();
        let manifest = published(&store, &path);
        let component = &manifest.components[0];
        assert_eq!(component.root, RootHash::of(&content), "{name}");
        assert!(
            store
                .present(&component.root)
                .is_none_or(|here| here.complete),
            "{name}"
        );
        if let Some(way) = Holdings::new(store.clone()).way_to(component).unwrap() {
            check(&store, component, &way, None, &Work::default()).unwrap();
        }
    }
}

#[test]
fn what_is_not_kept_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let (store, dir) = (store(temp.path(), "store"), tree(temp.path()));
    drop(draft(&store, &dir).unwrap());
    assert_eq!((store.blobs().len(), store.usage().used), (0, 0));
    assert_eq!(
        fs::read_dir(temp.path().join("store/tmp")).unwrap().count(),
        0
    );
    let missing = draft(&store, &temp.path().join("missing"));
    assert_eq!(missing.err().unwrap().code, FailureCode::NotFound);
}

#[test]
fn what_cannot_be_kept_whole_leaves_nothing_either() {
    let temp = tempfile::tempdir().unwrap();
    let (store, dir) = (store(temp.path(), "store"), tree(temp.path()));
    let file = temp.path().join("file");
    fs::write(&file, b"words and words ".repeat(300_000)).unwrap();
    for path in [&dir, &file] {
        // As much room as the draft takes while it is made, and a little more: some of it can be stored, not all.
        let mut failed = 0;
        for more in (0..).step_by(200) {
            store.set_quota(None);
            let mut draft = draft(&store, path).unwrap();
            store.set_quota(Some(store.usage().used + more));
            let kept = keep(&store, &mut draft, 1);
            drop(draft);
            let Err(failure) = kept else { break };
            assert_eq!(failure.code, FailureCode::Full, "{}", failure.message);
            assert!(store.blobs().is_empty() && store.components().is_empty());
            assert_eq!(store.usage().used, 0);
            failed += 1;
        }
        assert!(failed > 2, "at several places");
        assert!(!store.blobs().is_empty());
        store.gc(&|_| false, GcMode::Collect).unwrap();
    }
}

#[test]
fn layers_that_make_something_else_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let store = store(temp.path(), "store");
    let file = |name: &str, content: &str| {
        let path = temp.path().join(name);
        fs::write(&path, content.repeat(20_000)).unwrap();
        published(&store, &path).components[0].clone()
    };
    let (one, other) = (file("one", "one one "), file("other", "two two "));
    let holdings = Holdings::new(store.clone());
    let way = holdings.way_to(&other).unwrap().unwrap();
    let refused = check(&store, &one, &way, None, &Work::default()).unwrap_err();
    assert_eq!(refused.code, FailureCode::Damaged);
    assert!(
        refused.message.contains("not what the manifest says"),
        "{}",
        refused.message
    );

    let dir = tree(temp.path());
    let tree = published(&store, &dir).components[0].clone();
    let Some(HeldWay::Tree(way)) = holdings.way_to(&tree).unwrap() else {
        panic!("a tree")
    };
    fs::write(
        dir.join("sub/text"),
        "Some text, some text, some text".repeat(500),
    )
    .unwrap();
    let changed = published(&store, &dir).components[0].clone();
    let Some(HeldWay::Tree(wrong)) = holdings.way_to(&changed).unwrap() else {
        panic!("a tree")
    };
    let mixed = HeldWay::Tree(TreeWay {
        contents: wrong.contents,
        ..way.clone()
    });
    assert_eq!(
        check(&store, &tree, &mixed, None, &Work::default())
            .unwrap_err()
            .code,
        FailureCode::Damaged
    );
    let mixed = HeldWay::Tree(TreeWay {
        listing: wrong.listing,
        ..way
    });
    assert_eq!(
        check(&store, &tree, &mixed, None, &Work::default())
            .unwrap_err()
            .code,
        FailureCode::Damaged
    );
}
