//! Exporting from a store that has no room left.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::publish::tests::published;
use crate::store::{Disk, DiskFile, FileEntry, OpenMode, RealDisk, StoreOptions};

/// A disk that takes nothing more once it is full.
struct Filling {
    disk: RealDisk,
    full: Arc<AtomicBool>,
}

#[derive(Debug)]
struct FillingFile {
    file: Arc<dyn DiskFile>,
    full: Arc<AtomicBool>,
}

fn room(full: &AtomicBool) -> io::Result<()> {
    if full.load(Ordering::Relaxed) {
        Err(io::ErrorKind::StorageFull.into())
    } else {
        Ok(())
    }
}

impl Disk for Filling {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        if mode != OpenMode::Existing {
            room(&self.full)?;
        }
        let (file, full) = (self.disk.open(path, mode)?, self.full.clone());
        Ok(Arc::new(FillingFile { file, full }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        room(&self.full)?;
        self.disk.create_dir(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<FileEntry>> {
        self.disk.list(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk.sync_dir(dir)
    }
}

impl DiskFile for FillingFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, slices: &[&[u8]]) -> io::Result<()> {
        room(&self.full)?;
        self.file.write_at(offset, slices)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        room(&self.full)?;
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.file.punch(offset, len)
    }
}

#[test]
fn a_full_store_can_be_exported() {
    let temp = tempfile::tempdir().unwrap();
    let full = Arc::new(AtomicBool::new(false));
    fs::create_dir(temp.path().join("store")).unwrap();
    let disk = Filling {
        disk: RealDisk::new(temp.path().join("store")),
        full: full.clone(),
    };
    let store = Store::open_with(Arc::new(disk), StoreOptions::default()).unwrap();
    let path = |name: &str| temp.path().join(name);
    let mut noise = vec![0; 400_000];
    crate::home::system_entropy(&mut noise);
    // Behind layers, with zeros in it; as its own pack; as a tree.
    let text = [b"words and words ".repeat(40_000), vec![0; 40 << 20]].concat();
    fs::write(path("text"), &text).unwrap();
    fs::write(path("noise"), &noise).unwrap();
    fs::create_dir(path("tree")).unwrap();
    fs::write(path("tree/text"), &text[..1 << 20]).unwrap();
    let published: Vec<_> = ["text", "noise", "tree"]
        .map(|name| published(&store, &path(name)))
        .into();
    full.store(true, Ordering::Relaxed);
    store.set_quota(Some(store.usage().used));
    let holdings = Holdings::new(store.clone());
    for (manifest, name) in published.iter().zip(["text", "noise", "tree"]) {
        let (component, to) = (&manifest.components[0], path(&format!("{name} again")));
        let way = holdings.way_to(component).unwrap().unwrap();
        match &way {
            HeldWay::Tree(way) => {
                write_tree(&store, component, way, &to, false, &Work::default()).unwrap();
                assert!(fs::read(to.join("text")).unwrap() == text[..1 << 20]);
            }
            stream => {
                write_stream(&store, component, stream, &to, false, &Work::default()).unwrap();
                assert_eq!(RootHash::of(&fs::read(to).unwrap()), component.root);
            }
        }
    }
}
