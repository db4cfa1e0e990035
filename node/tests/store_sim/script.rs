//! A scripted life of a store, and what must be found of it after each step.
//!
//! A step announces to [`Expected`] what may happen before it acts, and what must have happened after it was
//! acknowledged; so the expectation holds at whatever operation the step is cut off. How it is cut off
//! is the business of `store_crash`.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use capsule_node::store::{
    Ban, BlobKind, ComponentRecipe, Follow, GcMode, HeldCapsule, LayerBlobs, OpenError, PinOrigin,
    ReadError, Store, StoreOptions,
};
use capsule_proto::ranges::Height;
use capsule_proto::{CapsuleId, GROUP_LEN, GroupRanges, RootHash};

use super::SimDisk;
use super::content::Sample;

pub type Outcome = Result<(), Box<dyn std::error::Error>>;

/// What must and must not be found after a crash.
#[derive(Debug, Clone, Default)]
pub struct Expected {
    pub blobs: BTreeMap<RootHash, Blob>,
    pub components: Vec<RootHash>,
    pub values: BTreeMap<String, Vec<u8>>,
    pub pins: Vec<CapsuleId>,
}

#[derive(Debug, Clone, Default)]
pub struct Blob {
    /// Acknowledged as durable.
    pub must: GroupRanges,
    /// Acknowledged as removed, and not written since.
    pub not: GroupRanges,
    /// Damaged by the test behind the store's back, and not yet acknowledged as found.
    pub damaged: GroupRanges,
}

/// The contents that the script plays with.
pub struct Cast {
    pub pack: Sample,
    pub index: Sample,
    pub manifest: Sample,
    pub fetched: Sample,
    pub taken_over: Sample,
    pub small: Sample,
    pub disk: Sample,
    pub late: Sample,
}

impl Cast {
    pub fn new() -> Self {
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

    pub fn all(&self) -> [&Sample; 8] {
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

    pub fn recipe(&self) -> ComponentRecipe {
        ComponentRecipe {
            layers: vec![LayerBlobs {
                index: self.index.root(),
                pack: Some(self.fetched.root()),
            }],
        }
    }

    pub fn capsule(&self) -> CapsuleId {
        CapsuleId(self.manifest.root())
    }

    pub fn data_path(&self, sample: &Sample) -> PathBuf {
        let hex = sample.root().to_string();
        ["blobs", &hex[..2], &format!("{hex}.data")]
            .iter()
            .collect()
    }
}

impl Expected {
    pub fn blob(&mut self, sample: &Sample) -> &mut Blob {
        self.blobs.entry(sample.root()).or_default()
    }

    /// Before groups are written: from now on they may be found.
    pub fn writing(&mut self, sample: &Sample, groups: GroupRanges) {
        let blob = self.blob(sample);
        blob.not = blob.not.difference(&groups);
    }

    /// After a flush: from now on they must be.
    pub fn durable(&mut self, sample: &Sample, groups: GroupRanges) {
        self.blob(sample).must.union_with(&groups);
    }

    /// Before a removal: from now on they need not be found.
    pub fn removing(&mut self, sample: &Sample, groups: &GroupRanges) {
        let blob = self.blob(sample);
        blob.must = blob.must.difference(groups);
    }

    /// After it: from now on they must not be.
    pub fn removed(&mut self, sample: &Sample, groups: &GroupRanges) {
        let blob = self.blob(sample);
        blob.not.union_with(groups);
        blob.damaged = blob.damaged.difference(groups);
    }
}

pub fn runs(runs: &[Range<u64>]) -> GroupRanges {
    runs.iter().cloned().collect()
}

pub fn options() -> StoreOptions {
    StoreOptions {
        flush_bytes: 64 * GROUP_LEN,
        // What happens is up to the script, however long it takes.
        flush_after: Duration::MAX,
        ..StoreOptions::default()
    }
}

pub fn open(disk: &SimDisk) -> Result<Store, OpenError> {
    Store::open_with(Arc::new(disk.clone()), options())
}

pub fn import(store: &Store, sample: &Sample, kind: BlobKind) -> Outcome {
    let mut import = store.begin_import()?;
    for part in sample.bytes.chunks(70_000) {
        import.write_all(part)?;
    }
    Ok(import.commit(&sample.root(), sample.size(), &sample.outboard, kind)?)
}

pub fn write(store: &Store, sample: &Sample, groups: Range<u64>) -> Outcome {
    store.create_partial(&sample.root(), sample.size(), BlobKind::Pack)?;
    Ok(store.write_encoded(
        &sample.root(),
        groups.clone(),
        Height::ROOT,
        &sample.encoded(groups),
    )?)
}

/// One step of the script. A step may be run again after it failed.
pub type Step = fn(&Cast, &Store, &SimDisk, &mut Expected) -> Outcome;

pub const SCRIPT: &[(&str, Step)] = &[
    ("import a pack", |cast, store, _, expected| {
        expected.writing(&cast.pack, GroupRanges::all(cast.pack.size()));
        import(store, &cast.pack, BlobKind::Pack)?;
        expected.durable(&cast.pack, GroupRanges::all(cast.pack.size()));
        Ok(())
    }),
    ("store bytes at hand", |cast, store, _, expected| {
        for sample in [&cast.manifest, &cast.index] {
            expected.writing(sample, GroupRanges::all(sample.size()));
            assert_eq!(
                store.put_small(&sample.bytes, BlobKind::Manifest)?,
                sample.root()
            );
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
        store.put_capsule(
            &cast.capsule(),
            &HeldCapsule {
                complete: true,
                added: 1,
            },
        )?;
        store.pin(&cast.capsule(), &PinOrigin::User)?;
        expected.pins.push(cast.capsule());
        store.follow(&"lab".parse()?, &Follow { keep: 2, since: 1 })?;
        store.ban(
            b"peer",
            &Ban {
                reason: "lied".into(),
                until: None,
            },
        )?;
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
        store.register_component(
            &cast.disk.root(),
            cast.disk.size(),
            cast.recipe(),
            &cast.disk.outboard,
        )?;
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
    (
        "import what is being fetched",
        |cast, store, _, expected| {
            write(store, &cast.taken_over, 1..3)?;
            store.flush(&cast.taken_over.root())?;
            expected.durable(&cast.taken_over, GroupRanges::from(1..3));
            write(store, &cast.taken_over, 4..5)?;
            import(store, &cast.taken_over, BlobKind::Pack)?;
            expected.durable(&cast.taken_over, GroupRanges::from(0..6));
            Ok(())
        },
    ),
    ("find damage", |cast, store, disk, expected| {
        let bad = GroupRanges::from(0..1);
        expected.removing(&cast.pack, &bad);
        if store
            .durable(&cast.pack.root())
            .is_some_and(|p| p.ranges.contains(0))
            && expected.blob(&cast.pack).damaged.is_empty()
        {
            disk.damage(&cast.data_path(&cast.pack), 77);
            expected.blob(&cast.pack).damaged = bad.clone();
        }
        match store.read_encoded(&cast.pack.root(), 0..2, Height::ROOT, &mut Vec::new()) {
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
        dead.iter()
            .for_each(|sample| expected.removing(sample, &GroupRanges::all(sample.size())));
        let guard = store.guard([cast.pack.root()]);
        let live = |root: &RootHash| {
            [&cast.manifest, &cast.index, &cast.fetched, &cast.disk]
                .iter()
                .any(|sample| sample.root() == *root)
        };
        store.gc(&live, GcMode::Collect)?;
        drop(guard);
        let report = store.gc(&live, GcMode::DryRun)?;
        assert!(
            report
                .blobs
                .iter()
                .all(|(root, _, _)| *root == cast.pack.root()),
            "{report:?}"
        );
        dead[..2]
            .iter()
            .for_each(|sample| expected.removed(sample, &GroupRanges::all(sample.size())));
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
