//! What takes bytes out again, and what rests on other blobs: quota, collection, dead ranges, components.

mod store_sim;

use std::sync::Arc;

use capsule_node::store::{
    BlobKind, ComponentProvider, ComponentRecipe, Full, GcMode, LayerBlobs, ReadError, RemoveError,
    Store, StoreOptions, WriteError,
};
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
        .write_encoded(&sample.root(), 10..14, &sample.encoded(10..14))
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
    let unprovided = store.read_encoded(&root, 0..3, &mut Vec::new());
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
    let found = store.read_encoded(&root, 8..20, &mut Vec::new());
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
