//! Crash safety: a scripted life of a store, cut off at every operation of its disk.
//!
//! For every operation k and several seeds: the machine loses power at k; of what was not durable, the
//! seed chooses what survives; the store is opened again (and, now and then, loses power while it opens).
//! Then: everything acknowledged is there and verifies, nothing counts as held that does not verify or was
//! durably removed, and the store works.

mod store_sim;

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use capsule_node::store::{
    Ban, BlobKind, ComponentProvider, ComponentRecipe, Follow, GcMode, HeldCapsule, LayerBlobs, PinOrigin, ReadError,
    Store, StoreOptions,
};
use capsule_proto::{CapsuleId, GROUP_LEN, GroupRanges, RootHash};
use store_sim::content::{Sample, Samples};
use store_sim::{EIO, ENOSPC, Fault, SimDisk, choose};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// What must and must not be found after a crash.
#[derive(Debug, Clone, Default)]
struct Expected {
    blobs: BTreeMap<RootHash, Blob>,
    components: Vec<RootHash>,
    values: BTreeMap<String, Vec<u8>>,
    pins: Vec<CapsuleId>,
}

#[derive(Debug, Clone, Default)]
struct Blob {
    /// Acknowledged as durable.
    must: GroupRanges,
    /// Acknowledged as removed, and not written since.
    not: GroupRanges,
    /// Damaged by the test behind the store's back, and not yet acknowledged as found.
    damaged: GroupRanges,
}

/// The contents that the script plays with.
struct Cast {
    pack: Sample,
    index: Sample,
    manifest: Sample,
    fetched: Sample,
    taken_over: Sample,
    small: Sample,
    disk: Sample,
    late: Sample,
}

impl Cast {
    fn new() -> Self {
        Self {
            pack: Sample::groups(1, 12),
            index: Sample::groups(2, 3),
            manifest: Sample::new(3, 500),
            fetched: Sample::groups(4, 20),
            taken_over: Sample::groups(5, 6),
            small: Sample::new(6, GROUP_LEN as usize),
            disk: Sample::groups(7, 9),
            late: Sample::groups(8, 5),
        }
    }

    fn all(&self) -> [&Sample; 8] {
        [
            &self.pack,
            &self.index,
            &self.manifest,
            &self.fetched,
            &self.taken_over,
            &self.small,
            &self.disk,
            &self.late,
        ]
    }

    fn recipe(&self) -> ComponentRecipe {
        ComponentRecipe { layers: vec![LayerBlobs { index: self.index.root(), pack: Some(self.fetched.root()) }] }
    }

    fn capsule(&self) -> CapsuleId {
        CapsuleId(self.manifest.root())
    }

    fn data_path(&self, sample: &Sample) -> PathBuf {
        let hex = sample.root().to_string();
        ["blobs", &hex[..2], &format!("{hex}.data")].iter().collect()
    }
}

impl Expected {
    fn blob(&mut self, sample: &Sample) -> &mut Blob {
        self.blobs.entry(sample.root()).or_default()
    }

    /// Before groups are written: from now on they may be found.
    fn writing(&mut self, sample: &Sample, groups: GroupRanges) {
        let blob = self.blob(sample);
        blob.not = blob.not.difference(&groups);
    }

    /// After a flush: from now on they must be.
    fn durable(&mut self, sample: &Sample, groups: GroupRanges) {
        self.blob(sample).must.union_with(&groups);
    }

    /// Before a removal: from now on they need not be found.
    fn removing(&mut self, sample: &Sample, groups: &GroupRanges) {
        let blob = self.blob(sample);
        blob.must = blob.must.difference(groups);
    }

    /// After it: from now on they must not be.
    fn removed(&mut self, sample: &Sample, groups: &GroupRanges) {
        let blob = self.blob(sample);
        blob.not.union_with(groups);
        blob.damaged = blob.damaged.difference(groups);
    }
}

fn runs(runs: &[Range<u64>]) -> GroupRanges {
    runs.iter().cloned().collect()
}

fn options() -> StoreOptions {
    StoreOptions { flush_bytes: 64 * GROUP_LEN, ..StoreOptions::default() }
}

fn open(disk: &SimDisk) -> Result<Store, capsule_node::store::OpenError> {
    Store::open_with(Arc::new(disk.clone()), options())
}

fn import(store: &Store, sample: &Sample, kind: BlobKind) -> Outcome {
    let mut import = store.begin_import()?;
    for part in sample.bytes.chunks(70_000) {
        import.write_all(part)?;
    }
    Ok(import.commit(&sample.root(), sample.size(), &sample.outboard, kind)?)
}

fn write(store: &Store, sample: &Sample, groups: Range<u64>) -> Outcome {
    store.create_partial(&sample.root(), sample.size(), BlobKind::Pack)?;
    Ok(store.write_encoded(&sample.root(), groups.clone(), &sample.encoded(groups))?)
}

/// One step of the script. A step may be run again after it failed.
type Step = fn(&Cast, &Store, &SimDisk, &mut Expected) -> Outcome;

const SCRIPT: &[(&str, Step)] = &[
    ("import a pack", |cast, store, _, expected| {
        expected.writing(&cast.pack, GroupRanges::all(cast.pack.size()));
        import(store, &cast.pack, BlobKind::Pack)?;
        expected.durable(&cast.pack, GroupRanges::all(cast.pack.size()));
        Ok(())
    }),
    ("store bytes at hand", |cast, store, _, expected| {
        for sample in [&cast.manifest, &cast.index] {
            expected.writing(sample, GroupRanges::all(sample.size()));
            assert_eq!(store.put_small(&sample.bytes, BlobKind::Manifest)?, sample.root());
            expected.durable(sample, GroupRanges::all(sample.size()));
        }
        Ok(())
    }),
    ("fetch a part and flush", |cast, store, _, expected| {
        expected.writing(&cast.fetched, runs(&[0..4, 8..12]));
        write(store, &cast.fetched, 8..12)?;
        write(store, &cast.fetched, 0..4)?;
        store.flush(&cast.fetched.root())?;
        expected.durable(&cast.fetched, runs(&[0..4, 8..12]));
        Ok(())
    }),
    ("fetch a small blob", |cast, store, _, expected| {
        write(store, &cast.small, 0..1)?;
        expected.durable(&cast.small, GroupRanges::from(0..1));
        Ok(())
    }),
    ("fetch the rest", |cast, store, _, expected| {
        write(store, &cast.fetched, 4..8)?;
        write(store, &cast.fetched, 11..20)?;
        expected.durable(&cast.fetched, GroupRanges::from(0..20));
        Ok(())
    }),
    ("note things", |cast, store, _, expected| {
        store.put_capsule(&cast.capsule(), &HeldCapsule { complete: true, added: 1 })?;
        store.pin(&cast.capsule(), &PinOrigin::User)?;
        expected.pins.push(cast.capsule());
        store.follow(&"lab".parse()?, &Follow { keep: 2, since: 1 })?;
        store.ban(b"peer", &Ban { reason: "lied".into(), until: None })?;
        for (key, value) in [("a", b"one".to_vec()), ("b", vec![7; 3000])] {
            store.set_value(key, &value)?;
            expected.values.insert(key.into(), value);
        }
        Ok(())
    }),
    ("free dead ranges", |cast, store, _, expected| {
        let dead = runs(&[3..7, 11..12]);
        expected.removing(&cast.pack, &dead);
        store.punch(&cast.pack.root(), &dead)?;
        expected.removed(&cast.pack, &dead);
        Ok(())
    }),
    ("serve a component", |cast, store, _, expected| {
        store.register_component(&cast.disk.root(), cast.disk.size(), cast.recipe(), &cast.disk.outboard)?;
        expected.components.push(cast.disk.root());
        Ok(())
    }),
    ("fetch what was freed again", |cast, store, _, expected| {
        expected.writing(&cast.pack, GroupRanges::from(4..6));
        write(store, &cast.pack, 4..6)?;
        store.flush(&cast.pack.root())?;
        expected.durable(&cast.pack, GroupRanges::from(4..6));
        Ok(())
    }),
    ("import what is being fetched", |cast, store, _, expected| {
        write(store, &cast.taken_over, 1..3)?;
        store.flush(&cast.taken_over.root())?;
        expected.durable(&cast.taken_over, GroupRanges::from(1..3));
        write(store, &cast.taken_over, 4..5)?;
        import(store, &cast.taken_over, BlobKind::Pack)?;
        expected.durable(&cast.taken_over, GroupRanges::from(0..6));
        Ok(())
    }),
    ("find damage", |cast, store, disk, expected| {
        let bad = GroupRanges::from(0..1);
        expected.removing(&cast.pack, &bad);
        if store.durable(&cast.pack.root()).is_some_and(|p| p.ranges.contains(0)) && expected.blob(&cast.pack).damaged.is_empty() {
            disk.damage(&cast.data_path(&cast.pack), 77);
            expected.blob(&cast.pack).damaged = bad.clone();
        }
        match store.read_encoded(&cast.pack.root(), 0..2, &mut Vec::new()) {
            Err(ReadError::Damaged { groups, .. }) => assert_eq!(groups, bad),
            // Found before, by a try that failed to commit it.
            Err(ReadError::Absent { .. }) => drop(store.verify(&cast.pack.root())?),
            Err(error) => return Err(error.into()),
            Ok(()) => return Err("damage was served".into()),
        }
        Ok(())
    }),
    ("commit what was found", |cast, store, _, expected| {
        // Whatever commits the blob's row next, takes the damaged groups out.
        expected.writing(&cast.pack, GroupRanges::from(6..7));
        write(store, &cast.pack, 6..7)?;
        store.flush(&cast.pack.root())?;
        expected.durable(&cast.pack, GroupRanges::from(6..7));
        expected.removed(&cast.pack, &GroupRanges::from(0..1));
        Ok(())
    }),
    ("collect", |cast, store, _, expected| {
        let dead = [&cast.small, &cast.taken_over, &cast.pack];
        dead.iter().for_each(|sample| expected.removing(sample, &GroupRanges::all(sample.size())));
        let guard = store.guard([cast.pack.root()]);
        let live = |root: &RootHash| {
            [&cast.manifest, &cast.index, &cast.fetched, &cast.disk].iter().any(|sample| sample.root() == *root)
        };
        store.gc(&live, GcMode::Collect)?;
        drop(guard);
        let report = store.gc(&live, GcMode::DryRun)?;
        assert!(report.blobs.iter().all(|(root, _, _)| *root == cast.pack.root()), "{report:?}");
        dead[..2].iter().for_each(|sample| expected.removed(sample, &GroupRanges::all(sample.size())));
        Ok(())
    }),
    ("fetch what was collected", |cast, store, _, expected| {
        expected.writing(&cast.taken_over, GroupRanges::from(2..6));
        write(store, &cast.taken_over, 2..6)?;
        store.flush_all()?;
        expected.durable(&cast.taken_over, GroupRanges::from(2..6));
        Ok(())
    }),
    ("remove", |cast, store, _, expected| {
        expected.components.clear();
        expected.removing(&cast.fetched, &GroupRanges::from(0..20));
        if store.present(&cast.fetched.root()).is_some() {
            store.remove(&cast.fetched.root())?;
        }
        expected.removed(&cast.fetched, &GroupRanges::from(0..20));
        Ok(())
    }),
];

fn play(cast: &Cast, disk: &SimDisk, expected: &mut Expected) -> Result<(), (&'static str, Box<dyn std::error::Error>)> {
    let store = open(disk).map_err(|e| ("open", e.into()))?;
    for (name, step) in SCRIPT {
        step(cast, &store, disk, expected).map_err(|e| (*name, e))?;
    }
    Ok(())
}

/// A store that was made and closed, and nothing in it.
fn fresh() -> SimDisk {
    let disk = SimDisk::default();
    disk.make_root();
    drop(open(&disk).unwrap());
    disk.crash(1)
}

fn check(cast: &Cast, store: &Store, expected: &Expected) {
    for sample in cast.all() {
        check_blob(store, sample, expected.blobs.get(&sample.root()).cloned().unwrap_or_default());
    }
    for info in store.blobs() {
        assert!(cast.all().iter().any(|sample| sample.root() == info.root), "an unknown blob");
    }
    for root in &expected.components {
        assert_eq!(store.component(root).map(|c| c.recipe), Some(cast.recipe()));
    }
    check_component(cast, store);
    for (key, value) in &expected.values {
        assert_eq!(store.value(key).unwrap().as_ref(), Some(value));
    }
    let pins = store.pins().unwrap();
    expected.pins.iter().for_each(|pin| assert!(pins.contains(&(*pin, PinOrigin::User))));
    assert!(store.recovery().lost.is_empty(), "{:?}", store.recovery());
}

fn check_blob(store: &Store, sample: &Sample, expected: Blob) {
    let root = sample.root();
    let durable = store.durable(&root).map(|p| p.ranges).unwrap_or_default();
    assert!(expected.must.difference(&durable).is_empty(), "lost: {expected:?}, found {durable:?}");
    assert!(expected.not.intersection(&durable).is_empty(), "came back: {expected:?}, found {durable:?}");
    for run in durable.difference(&expected.damaged).runs() {
        let mut out = Vec::new();
        store.read_encoded(&root, run.clone(), &mut out).unwrap();
        assert_eq!(out, sample.encoded(run.clone()), "unverified bytes count as held");
    }
    if store.durable(&root).is_some() {
        assert!(store.verify(&root).unwrap().difference(&expected.damaged).is_empty());
    }
}

fn check_component(cast: &Cast, store: &Store) {
    let provider: Arc<dyn ComponentProvider> = Arc::new(Samples(vec![cast.disk.clone()]));
    store.set_component_provider(&provider);
    if store.component(&cast.disk.root()).is_some() {
        let mut out = Vec::new();
        store.read_encoded(&cast.disk.root(), 1..9, &mut out).unwrap();
        assert_eq!(out, cast.disk.encoded(1..9));
    }
}

/// The store works: takes a blob, keeps it, gives it, collects it with everything else.
fn check_usable(cast: &Cast, store: &Store, disk: &SimDisk) {
    write(store, &cast.late, 0..3).unwrap();
    write(store, &cast.late, 3..5).unwrap();
    assert!(store.durable(&cast.late.root()).unwrap().complete);
    store.set_value("late", b"yes").unwrap();
    store.gc(&|root| *root == cast.late.root(), GcMode::Collect).unwrap();
    assert_eq!(store.read_whole(&cast.late.root(), 1 << 20).unwrap(), cast.late.bytes);
    let left: Vec<_> = disk.paths().into_iter().filter(|path| path.starts_with("blobs") || path.starts_with("tmp")).collect();
    assert_eq!(left.len(), 2, "files of nothing: {left:?}");
    assert_eq!(store.usage().used, cast.late.size() + 64 * 5, "the books are wrong");
}

/// Plays the script up to an operation, and looks at what each seed makes of the crash.
fn crash_at(cast: &Cast, base: &SimDisk, at: u64, seeds: Range<u64>) {
    let disk = base.fork(Some(Fault::Crash(at)));
    let mut expected = Expected::default();
    let end = play(cast, &disk, &mut expected);
    for seed in seeds {
        let mut found = disk.crash(seed.wrapping_mul(0x9e37_79b9).wrapping_add(at));
        if (at + seed).is_multiple_of(3) {
            // Once more, while it opens.
            found.plan(Fault::Crash((at / 3) % 9));
            drop(open(&found));
            found = found.crash(seed + at);
        }
        let told = format!("crash at operation {at}, seed {seed}, in {:?}", end.as_ref().err().map(|(step, _)| step));
        telling(&told, || {
            let store = open(&found).unwrap();
            check(cast, &store, &expected);
            check_usable(cast, &store, &found);
        });
    }
}

/// Runs a check; a failure is told with what led to it.
fn telling(context: &str, check: impl FnOnce()) {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check));
    assert!(result.is_ok(), "{context}");
}

/// Runs a check for many values on all cores.
fn on_all_cores(values: Vec<u64>, check: impl Fn(u64) + Sync) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let work = || {
        while let Some(value) = values.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
            check(*value);
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..std::thread::available_parallelism().map_or(1, usize::from)).map(|_| scope.spawn(work)).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn a_crash_at_any_operation_loses_nothing_acknowledged() {
    let (cast, base) = (Cast::new(), fresh());
    let whole = base.fork(None);
    let mut expected = Expected::default();
    play(&cast, &whole, &mut expected).unwrap();
    let operations = whole.operations();
    check(&cast, &open(&whole.crash(0)).unwrap(), &expected);
    on_all_cores((0..=operations).collect(), |at| crash_at(&cast, &base, at, 0..5));
}

#[test]
fn a_crash_while_the_store_is_made_leaves_none_or_a_whole_one() {
    let empty = SimDisk::default();
    empty.make_root();
    let whole = empty.fork(None);
    drop(open(&whole).unwrap());
    let cast = Cast::new();
    on_all_cores((0..=whole.operations()).collect(), |at| {
        for seed in 0..3 {
            let disk = empty.fork(Some(Fault::Crash(at)));
            drop(open(&disk));
            let disk = disk.crash(seed + at);
            check_usable(&cast, &open(&disk).unwrap(), &disk);
        }
    });
}

/// An error at any operation is told, and nothing is lost by it: the step that failed succeeds when it is
/// tried again, on the same open store, and a crash afterwards finds everything.
fn error_at(cast: &Cast, base: &SimDisk, fault: Fault, seed: u64) {
    let disk = base.fork(Some(fault));
    let mut expected = Expected::default();
    let store = loop {
        match open(&disk) {
            Ok(store) => break store,
            Err(error) => {
                check_told(fault, "open", &error.to_string());
                disk.heal();
            }
        }
    };
    for (name, step) in SCRIPT {
        let mut tries = 0;
        while let Err(error) = step(cast, &store, &disk, &mut expected) {
            check_told(fault, name, &error.to_string());
            assert!(tries < 3, "{fault:?}: {name} fails for good: {error}");
            tries += 1;
            disk.heal();
        }
    }
    telling(&format!("{fault:?}, seed {seed}"), || {
        check(cast, &store, &expected);
        let after = disk.crash(seed);
        drop(store);
        let store = open(&after).unwrap();
        check(cast, &store, &expected);
        check_usable(cast, &store, &after);
    });
}

fn check_told(fault: Fault, step: &str, message: &str) {
    let told = match fault {
        Fault::Error(_, EIO) => message.contains("Input/output error") || message.contains("damaged"),
        _ => message.contains("no space left on the file system") || message.contains("No space left"),
    };
    assert!(told, "{fault:?} in {step} is told as: {message}");
}

#[test]
fn an_error_at_any_operation_is_told_and_loses_nothing() {
    let (cast, base) = (Cast::new(), fresh());
    let whole = base.fork(None);
    play(&cast, &whole, &mut Expected::default()).unwrap();
    let operations = choose(whole.operations(), 400);
    on_all_cores(operations.into_iter().collect(), |at| {
        error_at(&cast, &base, Fault::Error(at, EIO), at);
        error_at(&cast, &base, Fault::Error(at, ENOSPC), at + 1);
    });
}

#[test]
fn a_full_disk_is_told_and_the_same_step_resumes_when_there_is_room() {
    let (cast, base) = (Cast::new(), fresh());
    let whole = base.fork(None);
    play(&cast, &whole, &mut Expected::default()).unwrap();
    let operations = choose(whole.operations(), 150);
    on_all_cores(operations.into_iter().collect(), |at| error_at(&cast, &base, Fault::Full(at), at));
}
