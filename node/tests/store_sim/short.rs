//! Short ways to do to a store what nearly every test does.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use capsule_node::store::{BlobKind, Store, StoreOptions};
use capsule_proto::RootHash;
use capsule_proto::ranges::Height;

use super::SimDisk;
use super::content::Sample;

pub fn open(dir: &Path) -> Store {
    Store::open(dir, StoreOptions::default()).unwrap()
}

pub fn simulated() -> (SimDisk, Store) {
    let disk = SimDisk::default();
    disk.make_root();
    let store = Store::open_with(Arc::new(disk.clone()), StoreOptions::default()).unwrap();
    (disk, store)
}

pub fn write(store: &Store, sample: &Sample, groups: Range<u64>) {
    store
        .create_partial(&sample.root(), sample.size(), BlobKind::Pack)
        .unwrap();
    store
        .write_encoded(
            &sample.root(),
            groups.clone(),
            Height::ROOT,
            &sample.encoded(groups),
        )
        .unwrap();
}

pub fn read(store: &Store, root: &RootHash, groups: Range<u64>) -> Vec<u8> {
    // What is there stays.
    let mut out = b"before".to_vec();
    store
        .read_encoded(root, groups, Height::ROOT, &mut out)
        .unwrap();
    assert_eq!(&out[..6], b"before");
    out.split_off(6)
}

pub fn file_of(root: &RootHash, extension: &str) -> PathBuf {
    let hex = root.to_string();
    ["blobs", &hex[..2], &format!("{hex}.{extension}")]
        .iter()
        .collect()
}
