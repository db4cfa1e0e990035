//! Crash safety: a scripted life of a store, cut off at every operation of its disk.
//!
//! For every operation k and several seeds: the machine loses power at k; of what was not durable, the
//! seed chooses what survives; the store is opened again (and, now and then, loses power while it opens).
//! Then: everything acknowledged is there and verifies, nothing counts as held that does not verify or was
//! durably removed, and the store works.

mod store_sim;

use std::ops::Range;
use std::sync::Arc;

use capsule_node::store::{ComponentProvider, GcMode, PinOrigin, Store};
use capsule_proto::ranges::Height;
use store_sim::content::{Sample, Samples};
use store_sim::script::{Blob, Cast, Expected, SCRIPT, open, write};
use store_sim::{EIO, ENOSPC, Fault, SimDisk, choose};

fn play(
    cast: &Cast,
    disk: &SimDisk,
    expected: &mut Expected,
) -> Result<(), (&'static str, Box<dyn std::error::Error>)> {
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
        check_blob(
            store,
            sample,
            expected
                .blobs
                .get(&sample.root())
                .cloned()
                .unwrap_or_default(),
        );
    }
    for info in store.blobs() {
        assert!(
            cast.all().iter().any(|sample| sample.root() == info.root),
            "an unknown blob"
        );
    }
    for root in &expected.components {
        assert_eq!(store.component(root).map(|c| c.recipe), Some(cast.recipe()));
    }
    check_component(cast, store);
    for (key, value) in &expected.values {
        assert_eq!(store.value(key).unwrap().as_ref(), Some(value));
    }
    let pins = store.pins().unwrap();
    expected
        .pins
        .iter()
        .for_each(|pin| assert!(pins.contains(&(*pin, PinOrigin::User))));
    assert!(store.recovery().lost.is_empty(), "{:?}", store.recovery());
}

fn check_blob(store: &Store, sample: &Sample, expected: Blob) {
    let root = sample.root();
    let durable = store.durable(&root).map(|p| p.ranges).unwrap_or_default();
    assert!(
        expected.must.difference(&durable).is_empty(),
        "lost: {expected:?}, found {durable:?}"
    );
    assert!(
        expected.not.intersection(&durable).is_empty(),
        "came back: {expected:?}, found {durable:?}"
    );
    for run in durable.difference(&expected.damaged).runs() {
        let mut out = Vec::new();
        store
            .read_encoded(&root, run.clone(), Height::ROOT, &mut out)
            .unwrap();
        assert_eq!(
            out,
            sample.encoded(run.clone()),
            "unverified bytes count as held"
        );
    }
    if store.durable(&root).is_some() {
        assert!(
            store
                .verify(&root)
                .unwrap()
                .difference(&expected.damaged)
                .is_empty()
        );
    }
}

fn check_component(cast: &Cast, store: &Store) {
    let provider: Arc<dyn ComponentProvider> = Arc::new(Samples(vec![cast.disk.clone()]));
    store.set_component_provider(&provider);
    if store.component(&cast.disk.root()).is_some() {
        let mut out = Vec::new();
        store
            .read_encoded(&cast.disk.root(), 1..9, Height::ROOT, &mut out)
            .unwrap();
        assert_eq!(out, cast.disk.encoded(1..9));
    }
}

/// The store works: takes a blob, keeps it, gives it, collects it with everything else.
fn check_usable(cast: &Cast, store: &Store, disk: &SimDisk) {
    write(store, &cast.late, 0..3).unwrap();
    write(store, &cast.late, 3..5).unwrap();
    assert!(store.durable(&cast.late.root()).unwrap().complete);
    store.set_value("late", b"yes").unwrap();
    store
        .gc(&|root| *root == cast.late.root(), GcMode::Collect)
        .unwrap();
    assert_eq!(
        store.read_whole(&cast.late.root(), 1 << 20).unwrap(),
        cast.late.bytes
    );
    let left: Vec<_> = disk
        .paths()
        .into_iter()
        .filter(|path| path.starts_with("blobs") || path.starts_with("tmp"))
        .collect();
    assert_eq!(left.len(), 2, "files of nothing: {left:?}");
    assert_eq!(
        store.usage().used,
        cast.late.size() + 64 * 5,
        "the books are wrong"
    );
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
        let told = format!(
            "crash at operation {at}, seed {seed}, in {:?}",
            end.as_ref().err().map(|(step, _)| step)
        );
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
        while let Some(value) = values.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
        {
            check(*value);
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..std::thread::available_parallelism().map_or(1, usize::from))
            .map(|_| scope.spawn(work))
            .collect();
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
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
    on_all_cores((0..=operations).collect(), |at| {
        crash_at(&cast, &base, at, 0..5)
    });
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
        Fault::Error(_, EIO) => {
            message.contains("Input/output error") || message.contains("damaged")
        }
        _ => {
            message.contains("no space left on the file system")
                || message.contains("No space left")
        }
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
    on_all_cores(operations.into_iter().collect(), |at| {
        error_at(&cast, &base, Fault::Full(at), at)
    });
}
