//! What takes bytes out again, and what rests on other blobs: quota, collection, dead ranges, components.

mod store_sim;

use std::sync::Arc;

use capsule_node::store::{
    BlobKind, ComponentProvider, ComponentRecipe, Full, GcMode, GcReport, LayerBlobs, ReadError,
    RemoveError, Store, StoreOptions, WriteError,
};
use capsule_proto::ranges::Height;
use capsule_proto::{GROUP_LEN, GroupRanges, RootHash};
use positioned_io::ReadAt;
use store_sim::content::{Sample, Samples};
use store_sim::short::{file_of, open, read, simulated, write};

#[test]
fn the_quota_holds_and_says_the_way_out() {
    let (_, store) = simulated();
    let sample = Sample::groups(1, 20);
    write(&store, &sample, 0..10);
    store.set_quota(Some(store.usage().used + 2 * GROUP_LEN));
    let refused = store
        .write_encoded(
            &sample.root(),
            10..14,
            Height::ROOT,
            &sample.encoded(10..14),
        )
        .unwrap_err();
    assert!(
        matches!(refused, WriteError::Full(Full::Quota { .. })),
        "{refused:?}"
    );
    assert!(refused.to_string().contains("capsule gc"), "{refused}");
    let refused = store
        .put_small(&Sample::groups(2, 3).bytes, BlobKind::Index)
        .unwrap_err();
    assert!(
        matches!(refused, WriteError::Full(Full::Quota { .. })),
        "{refused:?}"
    );
    // What is there stays, what fits fits, and room makes the same bytes welcome.
    assert_eq!(
        store.present(&sample.root()).unwrap().ranges,
        GroupRanges::from(0..10)
    );
    write(&store, &sample, 10..11);
    store.set_quota(None);
    write(&store, &sample, 10..20);
    assert_eq!(store.usage().used, sample.size() + 64 * 20);
}

#[test]
fn collection_spares_what_is_live_or_in_use() {
    let (disk, store) = simulated();
    let samples: Vec<_> = (0..5).map(|seed| Sample::groups(seed, 4)).collect();
    samples
        .iter()
        .for_each(|sample| write(&store, sample, 0..4));
    let root = |i: usize| samples[i].root();
    let live = |hash: &RootHash| *hash == root(0);
    let reader = store.open_blob(&root(1)).unwrap();
    let guard = store.guard([root(2), RootHash::of(b"not here yet")]);
    let plan = store.gc(&live, GcMode::DryRun).unwrap();
    let report = store.gc(&live, GcMode::Collect).unwrap();
    assert_eq!(plan, report);
    assert_eq!(report.blobs.len(), 2);
    assert_eq!(report.in_use.len(), 2);
    assert_eq!(report.freed, 2 * (samples[0].size() + 64 * 4));
    assert!(matches!(store.remove(&root(2)), Err(RemoveError::Busy(_))));
    assert!(matches!(
        store.punch(&root(2), &GroupRanges::from(0..1)),
        Err(RemoveError::Busy(_))
    ));
    let mut bytes = [0; 100];
    reader.read_exact_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, samples[1].bytes[..100]);
    drop((reader, guard));
    assert_eq!(store.gc(&live, GcMode::Collect).unwrap().blobs.len(), 2);
    assert_eq!(store.usage().used, samples[0].size() + 64 * 4);
    assert_eq!(
        disk.paths()
            .iter()
            .filter(|path| path.starts_with("blobs"))
            .count(),
        2
    );
    write(&store, &samples[3], 0..4);
    assert_eq!(read(&store, &root(3), 0..4), samples[3].encoded(0..4));
}

#[test]
fn collection_and_fetching_at_once_keep_what_is_guarded() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let samples: Vec<_> = (0..8).map(|seed| Sample::groups(seed, 3)).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| (0..40).for_each(|_| drop(store.gc(&|_| false, GcMode::Collect).unwrap())));
        for sample in &samples {
            scope.spawn(|| {
                for _ in 0..10 {
                    let _guard = store.guard([sample.root()]);
                    write(&store, sample, 0..2);
                    write(&store, sample, 2..3);
                    assert_eq!(read(&store, &sample.root(), 0..3), sample.encoded(0..3));
                }
            });
        }
    });
    store.gc(&|_| false, GcMode::Collect).unwrap();
    assert_eq!((store.usage().used, store.blobs().len()), (0, 0));
}

#[test]
fn dead_ranges_are_freed_on_the_disk() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let sample = Sample::groups(1, 64);
    write(&store, &sample, 0..64);
    let file = dir.path().join(file_of(&sample.root(), "data"));
    let held = || std::fs::metadata(&file).unwrap().blocks() * 512;
    let before = held();
    let freed = store
        .punch(&sample.root(), &[0..20, 40..64].into_iter().collect())
        .unwrap();
    assert_eq!(freed, sample.size() - 20 * GROUP_LEN + 64 * 44);
    assert!(held() + 40 * GROUP_LEN <= before, "{before} -> {}", held());
    assert_eq!(
        store.present(&sample.root()).unwrap().ranges,
        GroupRanges::from(20..40)
    );
    assert_eq!(read(&store, &sample.root(), 20..40), sample.encoded(20..40));
    assert_eq!(
        store
            .punch(&sample.root(), &GroupRanges::from(0..20))
            .unwrap(),
        0
    );
    write(&store, &sample, 0..64);
    assert!(store.durable(&sample.root()).unwrap().complete);
}

#[test]
fn what_a_crash_left_of_punching_is_punched_by_the_next() {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let dir = tempfile::tempdir().unwrap();
    let sample = Sample::groups(1, 64);
    let file = dir.path().join(file_of(&sample.root(), "data"));
    let held = || std::fs::metadata(&file).unwrap().blocks() * 512;
    let dead = GroupRanges::from(10..64);
    let store = open(dir.path());
    write(&store, &sample, 0..64);
    store.punch(&sample.root(), &dead).unwrap();
    let punched = held();
    drop(store);
    // As if the row had been committed, and nothing punched.
    let bytes = &sample.bytes[10 * GROUP_LEN as usize..];
    let open_file = std::fs::File::options().write(true).open(&file).unwrap();
    open_file.write_all_at(bytes, 10 * GROUP_LEN).unwrap();
    open_file.sync_all().unwrap();
    assert!(held() > punched + 50 * GROUP_LEN);
    let store = open(dir.path());
    let mut report = GcReport::default();
    let (root, dead) = (sample.root(), &dead);
    store
        .punch_all([(&root, dead)], GcMode::DryRun, &mut report)
        .unwrap();
    store
        .punch_all([(&root, dead)], GcMode::Collect, &mut report)
        .unwrap();
    assert_eq!(report, GcReport::default(), "no row tells of these bytes");
    assert!(held() <= punched, "{punched} -> {}", held());
    assert_eq!(read(&store, &root, 0..10), sample.encoded(0..10));
}

// An index and a pack of which a component takes a part.
#[test]
fn a_component_needs_no_more_of_a_pack_than_its_way_reaches() {
    let (disk, store) = simulated();
    let (index, pack) = (Sample::groups(1, 2), Sample::groups(2, 9));
    let (image, top) = (Sample::groups(3, 12), Sample::groups(4, 3));
    let layers = vec![
        LayerBlobs {
            index: index.root(),
            pack: Some(pack.root()),
        },
        LayerBlobs {
            index: index.root(),
            pack: Some(top.root()),
        },
    ];
    write(&store, &index, 0..2);
    write(&store, &pack, 0..9);
    write(&store, &top, 0..3);
    let dead = GroupRanges::from(5..9);
    let recipe = ComponentRecipe {
        layers: layers.clone(),
    };
    let register =
        || store.register_component(&image.root(), image.size(), recipe.clone(), &image.outboard);
    register().unwrap();
    store.flush_all().unwrap();
    let reopened = || Store::open_with(Arc::new(disk.crash(7)), StoreOptions::default()).unwrap();
    let is_here = |store: &Store| store.component(&image.root()).is_some();

    // Punched without a word, the component is not whole.
    assert!(store.is_readable(&layers).unwrap());
    let reached = [(pack.root(), GroupRanges::from(0..5))];
    store.put_reached(&layers, reached.into()).unwrap();
    let mut report = GcReport::default();
    let root = pack.root();
    store
        .punch_all([(&root, &dead)], GcMode::DryRun, &mut report)
        .unwrap();
    let mut done = GcReport::default();
    store
        .punch_all([(&root, &dead)], GcMode::Collect, &mut done)
        .unwrap();
    assert_eq!(report, done);
    assert_eq!(done.freed, pack.size() - 5 * GROUP_LEN + 64 * 4);
    assert!(store.is_readable(&layers).unwrap());
    assert!(is_here(&reopened()));
    register().unwrap();
    assert!(!store.is_readable(&layers[..1]).unwrap(), "another way");
    let partial = store.open_partial(&root).unwrap();
    let mut bytes = [0; 100];
    partial.read_exact_at(4 * GROUP_LEN, &mut bytes).unwrap();
    assert!(partial.read_exact_at(5 * GROUP_LEN, &mut bytes).is_err());
    // In use it is spared.
    let guarded = GroupRanges::from(4..9);
    let mut spared = GcReport::default();
    store
        .punch_all([(&root, &guarded)], GcMode::Collect, &mut spared)
        .unwrap();
    assert_eq!((spared.in_use, spared.freed), (vec![root], 0));
    drop(partial);

    // Less than is reached is too little.
    store.punch(&root, &guarded).unwrap();
    assert!(!store.is_readable(&layers).unwrap());
    assert!(matches!(register(), Err(WriteError::Unknown(missing)) if missing == root));
    assert!(!is_here(&reopened()));
    // Who forgets what a way reaches needs all of it.
    write(&store, &pack, 4..5);
    store.flush_all().unwrap();
    assert!(store.is_readable(&layers).unwrap());
    store.keep_reached(&[layers.clone()].into()).unwrap();
    assert!(store.is_readable(&layers).unwrap());
    store.keep_reached(&Default::default()).unwrap();
    assert!(!store.is_readable(&layers).unwrap());
}

#[test]
fn a_component_is_served_through_its_provider() {
    let (disk, store) = simulated();
    let (index, pack, disk_image) = (
        Sample::groups(1, 2),
        Sample::groups(2, 6),
        Sample::groups(3, 30),
    );
    let root = disk_image.root();
    let recipe = ComponentRecipe {
        layers: vec![LayerBlobs {
            index: index.root(),
            pack: Some(pack.root()),
        }],
    };
    let register = || {
        store.register_component(
            &root,
            disk_image.size(),
            recipe.clone(),
            &disk_image.outboard,
        )
    };
    write(&store, &index, 0..2);
    assert!(matches!(register(), Err(WriteError::Unknown(missing)) if missing == pack.root()));
    write(&store, &pack, 0..6);
    register().unwrap();
    let unprovided = store.read_encoded(&root, 0..3, Height::ROOT, &mut Vec::new());
    assert!(
        matches!(unprovided, Err(ReadError::Component { .. })),
        "{unprovided:?}"
    );
    let provider: Arc<dyn ComponentProvider> = Arc::new(Samples(vec![disk_image.clone()]));
    store.set_component_provider(&provider);
    assert!(store.present(&root).unwrap().complete);
    assert!(store.durable(&root).is_none());
    assert_eq!(read(&store, &root, 7..30), disk_image.encoded(7..30));
    assert!(store.verify(&root).unwrap().is_empty());

    // The layers come to decode to something else.
    let mut drifted = disk_image.clone();
    drifted.bytes[11 * GROUP_LEN as usize] ^= 1;
    let provider: Arc<dyn ComponentProvider> = Arc::new(Samples(vec![drifted]));
    store.set_component_provider(&provider);
    let found = store.read_encoded(&root, 8..20, Height::ROOT, &mut Vec::new());
    assert!(
        matches!(&found, Err(ReadError::Damaged { groups, .. }) if *groups == GroupRanges::from(11..12)),
        "{found:?}"
    );
    let after = Store::open_with(Arc::new(disk.crash(1)), StoreOptions::default()).unwrap();
    assert_eq!(after.present(&root).unwrap().ranges.count(), 29);
    assert_eq!(after.component(&root).unwrap().recipe, recipe);

    // Without its layers it is not served.
    let removed = store
        .gc(
            &|hash| *hash == root || *hash == index.root(),
            GcMode::Collect,
        )
        .unwrap();
    assert_eq!(removed.components, [root]);
    assert!(store.present(&root).is_none() && store.components().is_empty());
    assert!(!disk.paths().contains(&file_of(&root, "component")));
}
