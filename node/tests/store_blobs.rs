//! Blobs through the store's front door: whole, in parts, served, damaged, collected; on a real disk and a
//! simulated one. Crashes are in `store_crash`.

mod store_sim;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use capsule_chunker::bao::TreeHasher;
use capsule_node::store::{
    BlobKind, Damage, OpenError, ReadError, Store, StoreOptions, WriteError,
};
use capsule_proto::ranges::Height;
use capsule_proto::{GROUP_LEN, GroupRanges, RootHash};
use positioned_io::ReadAt;
use proptest::prelude::*;
use store_sim::SimDisk;
use store_sim::content::Sample;
use store_sim::short::{file_of, open, read, simulated, write};

#[test]
fn imported_blobs_are_served_and_survive_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let samples = [
        0,
        1,
        500,
        GROUP_LEN,
        GROUP_LEN + 1,
        2 * GROUP_LEN,
        40 * GROUP_LEN + 17,
    ];
    let samples: Vec<_> = (0..)
        .zip(samples)
        .map(|(seed, len)| Sample::new(seed, len as usize))
        .collect();
    let store = open(dir.path());
    for sample in &samples {
        let mut import = store.begin_import().unwrap();
        sample
            .bytes
            .chunks(100_000)
            .for_each(|part| import.write_all(part).unwrap());
        import
            .commit(
                &sample.root(),
                sample.size(),
                &sample.outboard,
                BlobKind::Pack,
            )
            .unwrap();
    }
    drop(store);
    let store = open(dir.path());
    assert_eq!(*store.recovery(), capsule_node::store::Recovery::default());
    for sample in &samples {
        assert!(store.durable(&sample.root()).unwrap().complete);
        assert_eq!(
            read(&store, &sample.root(), 0..sample.count()),
            sample.encoded(0..sample.count())
        );
        assert_eq!(
            store.read_whole(&sample.root(), 1 << 20).unwrap(),
            sample.bytes
        );
        let reader = store.open_blob(&sample.root()).unwrap();
        let mut tail = vec![0; sample.bytes.len() / 2];
        reader
            .read_exact_at(sample.size() - tail.len() as u64, &mut tail)
            .unwrap();
        assert_eq!(tail, sample.bytes[sample.bytes.len() - tail.len()..]);
        assert_eq!(reader.read_at(sample.size(), &mut [0; 8]).unwrap(), 0);
    }
}

#[test]
fn an_outboard_may_grow_in_a_scratch_file() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let sample = Sample::groups(1, 30);
    let mut hasher = TreeHasher::with_storage(store.scratch().unwrap());
    let mut import = store.begin_import().unwrap();
    for part in sample.bytes.chunks(50_000) {
        hasher.push(part).unwrap();
        import.write_all(part).unwrap();
    }
    let (tree, scratch) = hasher.finish().unwrap();
    import
        .commit(&tree.root, tree.size, scratch, BlobKind::Pack)
        .unwrap();
    assert_eq!(read(&store, &sample.root(), 3..17), sample.encoded(3..17));
    assert_eq!(
        std::fs::read_dir(dir.path().join("tmp")).unwrap().count(),
        0
    );
}

#[test]
fn an_import_that_is_dropped_or_lied_about_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let sample = Sample::groups(1, 30);
    let begin = || {
        let mut import = store.begin_import().unwrap();
        import.write_all(&sample.bytes).unwrap();
        import
    };
    drop(begin());
    let short = begin().commit(
        &sample.root(),
        sample.size() - 1,
        &sample.outboard,
        BlobKind::Pack,
    );
    assert!(matches!(short, Err(WriteError::Size { .. })), "{short:?}");
    let outboard = begin().commit(
        &sample.root(),
        sample.size(),
        &sample.outboard[64..],
        BlobKind::Pack,
    );
    assert!(
        matches!(outboard, Err(WriteError::Size { .. })),
        "{outboard:?}"
    );
    assert_eq!(store.usage().used, 0);
    assert!(store.blobs().is_empty());
    assert_eq!(
        std::fs::read_dir(dir.path().join("tmp")).unwrap().count(),
        0
    );
}

#[test]
fn nothing_unverified_is_written() {
    let (disk, store) = simulated();
    for sample in [Sample::groups(1, 12), Sample::new(2, 700)] {
        let root = sample.root();
        let groups = 0..sample.count().min(4);
        let good = sample.encoded(groups.clone());
        let unknown = store.write_encoded(&root, groups.clone(), Height::ROOT, &good);
        assert!(
            matches!(unknown, Err(WriteError::Unknown(_))),
            "{unknown:?}"
        );
        store
            .create_partial(&root, sample.size(), BlobKind::Pack)
            .unwrap();
        let files = disk.paths();
        let mut bad: Vec<_> = [0, good.len() / 2, good.len() - 1]
            .map(|i| flipped(&good, i))
            .to_vec();
        bad.extend([
            good[..good.len() - 1].to_vec(),
            [&good[..], &[0]].concat(),
            Vec::new(),
            Sample::groups(9, 4).encoded(0..4),
        ]);
        for bytes in bad {
            let refused = store.write_encoded(&root, groups.clone(), Height::ROOT, &bytes);
            assert!(
                matches!(refused, Err(WriteError::Invalid { .. })),
                "{refused:?}"
            );
        }
        for beyond in [
            0..sample.count() + 1,
            2..2,
            sample.count()..sample.count() + 1,
        ] {
            let refused = store.write_encoded(&root, beyond, Height::ROOT, &good);
            assert!(
                matches!(refused, Err(WriteError::OutOfRange { .. })),
                "{refused:?}"
            );
        }
        assert!(store.present(&root).unwrap().ranges.is_empty());
        assert_eq!(
            disk.paths(),
            files,
            "a file was made for bytes that do not verify"
        );
        store
            .write_encoded(&root, groups, Height::ROOT, &good)
            .unwrap();
    }
}

fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 1;
    bytes
}

#[test]
fn a_known_hash_with_another_size_is_refused() {
    let (_, store) = simulated();
    let sample = Sample::groups(1, 5);
    write(&store, &sample, 0..2);
    let refused = store.create_partial(&sample.root(), sample.size() + 1, BlobKind::Pack);
    assert!(
        matches!(refused, Err(WriteError::Size { .. })),
        "{refused:?}"
    );
    assert_eq!(store.present(&sample.root()).unwrap().ranges.count(), 2);
}

#[test]
fn presence_is_at_once_and_durability_by_flush() {
    let (disk, store) = simulated();
    let sample = Sample::groups(1, 12);
    write(&store, &sample, 2..5);
    let ranges = |p: Option<capsule_node::store::Presence>| p.unwrap().ranges;
    assert_eq!(
        ranges(store.present(&sample.root())),
        GroupRanges::from(2..5)
    );
    assert!(ranges(store.durable(&sample.root())).is_empty());
    assert_eq!(read(&store, &sample.root(), 3..5), sample.encoded(3..5));
    let absent = store.read_encoded(&sample.root(), 3..6, Height::ROOT, &mut Vec::new());
    assert!(
        matches!(absent, Err(ReadError::Absent { .. })),
        "{absent:?}"
    );
    assert!(matches!(
        store.open_blob(&sample.root()),
        Err(ReadError::Absent { .. })
    ));
    store.flush(&sample.root()).unwrap();
    assert_eq!(
        ranges(store.durable(&sample.root())),
        GroupRanges::from(2..5)
    );
    let before = disk.operations();
    store.flush(&sample.root()).unwrap();
    assert_eq!(
        disk.operations(),
        before,
        "nothing to flush, and yet it did something"
    );
    write(&store, &sample, 0..12);
    assert!(store.durable(&sample.root()).unwrap().complete);
}

#[test]
fn bytes_written_flush_by_themselves() {
    let disk = SimDisk::default();
    disk.make_root();
    let options = StoreOptions {
        flush_bytes: 4 * GROUP_LEN,
        ..StoreOptions::default()
    };
    let store = Store::open_with(Arc::new(disk), options).unwrap();
    let sample = Sample::groups(1, 30);
    write(&store, &sample, 0..3);
    assert!(store.durable(&sample.root()).unwrap().ranges.is_empty());
    write(&store, &sample, 3..4);
    assert_eq!(
        store.durable(&sample.root()).unwrap().ranges,
        GroupRanges::from(0..4)
    );
}

#[test]
fn what_was_written_long_ago_is_flushed_by_the_next_write() {
    let disk = SimDisk::default();
    disk.make_root();
    let options = StoreOptions {
        flush_after: Duration::from_secs(1),
        ..StoreOptions::default()
    };
    let store = Store::open_with(Arc::new(disk), options).unwrap();
    let sample = Sample::groups(1, 30);
    let durable = || store.durable(&sample.root()).unwrap().ranges;
    write(&store, &sample, 0..3);
    assert!(durable().is_empty());
    std::thread::sleep(Duration::from_millis(1010));
    write(&store, &sample, 5..6);
    assert_eq!(durable(), GroupRanges::from_iter([0..3, 5..6]));
    // From then on it is counted anew.
    write(&store, &sample, 7..8);
    assert_eq!(durable().count(), 4);
}

#[test]
fn many_partial_blobs_at_once_stay_within_the_open_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let samples: Vec<_> = (0..200).map(|seed| Sample::groups(seed, 2)).collect();
    samples
        .iter()
        .for_each(|sample| write(&store, sample, 0..1));
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(open < 400, "{open} files are open");
    store.flush_all().unwrap();
    samples
        .iter()
        .for_each(|sample| assert_eq!(read(&store, &sample.root(), 0..1), sample.encoded(0..1)));
}

#[test]
fn many_threads_write_and_read_one_blob() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let sample = Sample::groups(1, 300);
    store
        .create_partial(&sample.root(), sample.size(), BlobKind::Pack)
        .unwrap();
    std::thread::scope(|scope| {
        for thread in 0..6u64 {
            let (store, sample) = (&store, &sample);
            scope.spawn(move || {
                // Each range comes twice, by different threads.
                for i in (0..50)
                    .map(|i| (i * 7 + thread * 25) % 50)
                    .filter(|i| (i + thread) % 3 != 0)
                {
                    let groups = i * 6..(i + 1) * 6;
                    store
                        .write_encoded(
                            &sample.root(),
                            groups.clone(),
                            Height::ROOT,
                            &sample.encoded(groups.clone()),
                        )
                        .unwrap();
                    assert_eq!(
                        read(store, &sample.root(), groups.clone()),
                        sample.encoded(groups)
                    );
                    if i % 10 == thread {
                        store.flush(&sample.root()).unwrap();
                    }
                }
            });
        }
    });
    assert!(store.durable(&sample.root()).unwrap().complete);
    assert_eq!(store.usage().used, sample.size() + 64 * sample.count());
    assert!(store.verify(&sample.root()).unwrap().is_empty());
}

#[test]
fn damage_is_found_reported_and_repaired() {
    // A leaf, and hash pairs at the top and further down.
    for (extension, offset, at_least) in [
        ("data", 5 * GROUP_LEN as usize + 9, 5..6),
        ("tree", 3, 0..8),
        ("tree", 130, 0..1),
    ] {
        let (disk, store) = simulated();
        let sample = Sample::groups(1, 8);
        write(&store, &sample, 0..8);
        let heard = Arc::new(Mutex::new(Vec::new()));
        let listener = Arc::clone(&heard);
        store.on_damage(Arc::new(move |damage: &Damage| {
            listener.lock().unwrap().push(damage.clone())
        }));
        disk.damage(&file_of(&sample.root(), extension), offset);
        let found = store.read_encoded(&sample.root(), 0..8, Height::ROOT, &mut Vec::new());
        let Err(ReadError::Damaged { groups, .. }) = found else {
            panic!("{found:?}")
        };
        assert!(groups.contains_run(&at_least), "{groups:?}");
        let damage = Damage {
            root: sample.root(),
            size: sample.size(),
            groups: groups.clone(),
        };
        assert_eq!(*heard.lock().unwrap(), [damage]);
        let left = store.durable(&sample.root()).unwrap().ranges;
        assert_eq!(left, GroupRanges::all(sample.size()).difference(&groups));
        // Groups beside it are served, and the same bytes again make it whole.
        left.runs().iter().for_each(|run| {
            assert_eq!(
                read(&store, &sample.root(), run.clone()),
                sample.encoded(run.clone())
            )
        });
        groups
            .runs()
            .iter()
            .for_each(|run| write(&store, &sample, run.clone()));
        assert_eq!(read(&store, &sample.root(), 0..8), sample.encoded(0..8));
        assert!(store.verify(&sample.root()).unwrap().is_empty());
        let after = Store::open_with(Arc::new(disk.crash(1)), StoreOptions::default()).unwrap();
        assert!(
            after.verify(&sample.root()).unwrap().is_empty()
                && after.durable(&sample.root()).unwrap().complete
        );
    }
}

#[test]
fn verify_names_the_damaged_groups() {
    let (disk, store) = simulated();
    let sample = Sample::groups(1, 40);
    write(&store, &sample, 0..40);
    for group in [3, 17, 39] {
        disk.damage(&file_of(&sample.root(), "data"), group * GROUP_LEN as usize);
    }
    let expected: GroupRanges = [3..4, 17..18, 39..40].into_iter().collect();
    assert_eq!(store.verify(&sample.root()).unwrap(), expected);
    assert_eq!(store.present(&sample.root()).unwrap().ranges.count(), 37);
    assert!(matches!(
        store.verify(&RootHash::of(b"none")),
        Err(ReadError::Unknown(_))
    ));
}

#[test]
fn files_that_vanish_or_shrink_are_noticed_when_opening() {
    let (disk, store) = simulated();
    let (gone, cut) = (Sample::groups(1, 8), Sample::groups(2, 8));
    write(&store, &gone, 0..8);
    write(&store, &cut, 0..8);
    drop(store);
    disk.lose(&file_of(&gone.root(), "data"));
    let path = file_of(&cut.root(), "data");
    capsule_node::store::Disk::open(&disk, &path, capsule_node::store::OpenMode::Existing)
        .unwrap()
        .set_len(5 * GROUP_LEN + 7)
        .unwrap();
    let store = Store::open_with(Arc::new(disk.clone()), StoreOptions::default()).unwrap();
    let lost = &store.recovery().lost;
    assert!(
        lost.contains(&(gone.root(), GroupRanges::from(0..8))),
        "{lost:?}"
    );
    assert!(
        lost.contains(&(cut.root(), GroupRanges::from(5..8))),
        "{lost:?}"
    );
    assert_eq!(read(&store, &cut.root(), 0..5), cut.encoded(0..5));
    write(&store, &gone, 0..8);
    write(&store, &cut, 5..8);
    for sample in [&gone, &cut] {
        assert_eq!(read(&store, &sample.root(), 0..8), sample.encoded(0..8));
    }
}

#[test]
fn a_second_daemon_on_the_same_home_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    let second = Store::open(dir.path(), StoreOptions::default());
    assert!(matches!(second, Err(OpenError::InUse { .. })), "{second:?}");
    drop(first);
    open(dir.path());
}

#[test]
fn whole_blobs_are_bounded_by_the_caller() {
    let (_, store) = simulated();
    let root = store.put_small(&[7; 40_000], BlobKind::Listing).unwrap();
    assert!(matches!(
        store.read_whole(&root, 39_999),
        Err(ReadError::TooLong { size: 40_000, .. })
    ));
    assert_eq!(store.read_whole(&root, 40_000).unwrap(), [7; 40_000]);
    assert_eq!(
        store.put_small(&[7; 40_000], BlobKind::Listing).unwrap(),
        root
    );
    assert!(matches!(
        store.read_whole(&RootHash::of(b"none"), 9),
        Err(ReadError::Unknown(_))
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    // The oracle is a plain set of groups; every so often the power goes.
    #[test]
    fn any_life_of_a_blob_agrees_with_a_plain_set(
        acts in prop::collection::vec((0u8..6, 0u64..40, 1u64..12, any::<u64>()), 1..30),
    ) {
        let sample = Sample::groups(1, 40);
        let (mut disk, mut store) = simulated();
        let (mut present, mut durable) = (GroupRanges::new(), GroupRanges::new());
        for (act, start, len, seed) in acts {
            let groups = start..(start + len).min(40);
            match act {
                0..=2 => {
                    write(&store, &sample, groups.clone());
                    present.insert(groups);
                    if present.count() == 40 {
                        durable = present.clone();
                    }
                }
                3 if !present.is_empty() => {
                    store.flush(&sample.root()).unwrap();
                    durable = present.clone();
                }
                4 if !present.is_empty() => {
                    store.punch(&sample.root(), &GroupRanges::from(groups.clone())).unwrap();
                    present.remove(groups.clone());
                    durable.remove(groups);
                }
                5 => {
                    // The store must not flush as it is dropped: its machine is off.
                    disk = disk.crash(seed);
                    store = Store::open_with(Arc::new(disk.clone()), StoreOptions::default()).unwrap();
                    present = durable.clone();
                }
                _ => {}
            }
            let found = |p: Option<capsule_node::store::Presence>| p.map(|p| p.ranges).unwrap_or_default();
            prop_assert_eq!(&found(store.present(&sample.root())), &present);
            prop_assert_eq!(&found(store.durable(&sample.root())), &durable);
        }
        for run in present.runs() {
            prop_assert_eq!(read(&store, &sample.root(), run.clone()), sample.encoded(run.clone()));
        }
    }
}
