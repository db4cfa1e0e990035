use capsule_chunker::content::ReadError;
use capsule_proto::RootHash;
use capsule_proto::listing::{EntryPath, Metadata};
use futures::future::BoxFuture;

use super::*;

struct Bytes(u64);

impl Disk for Bytes {
    fn len(&self) -> u64 {
        self.0
    }

    fn is_zero(&self, _: std::ops::Range<u64>) -> bool {
        false
    }

    fn read(
        self: Arc<Self>,
        _: std::ops::Range<u64>,
        into: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, ReadError>> {
        Box::pin(async move { Ok(into) })
    }
}

fn listing() -> Listing {
    let entry = |path: &str, kind| Entry {
        path: match path {
            "" => EntryPath::root(),
            path => EntryPath::new(path).unwrap(),
        },
        meta: Metadata {
            mode: 0o755,
            uid: 7,
            mtime: (-5, 250_000_000),
            ..Metadata::default()
        },
        kind,
    };
    let file = |size| EntryKind::File {
        size,
        root: RootHash::of(b"x"),
    };
    let target = b"dir/b".to_vec();
    Listing::new(vec![
        entry("", EntryKind::Directory),
        entry("dir", EntryKind::Directory),
        entry("dir/a", file(10)),
        entry("dir/b", file(20)),
        entry("dir/sub", EntryKind::Directory),
        entry("dir/sub/c", EntryKind::HardLink { to: 2 }),
        entry("dir-2", file(30)),
        entry(
            "null",
            EntryKind::CharDevice {
                major: 1,
                minor: 0x12345,
            },
        ),
        entry("to", EntryKind::Symlink { target }),
    ])
    .unwrap()
}

fn path(names: &Names, path: &str) -> Option<u64> {
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    parts.try_fold(INodeNo::ROOT.0, |at, part| {
        names.lookup(at, OsStr::new(part))
    })
}

fn listed(names: &Names, at: u64) -> Vec<String> {
    let all = names.list(at, 0, 100).unwrap();
    let name = |(name, _): (&OsStr, u64)| name.to_str().unwrap().to_owned();
    all.into_iter().map(name).collect()
}

#[test]
fn a_lone_tree_is_the_root() {
    let tree = Shown::Tree(listing(), Some(Arc::new(Bytes(60))));
    let names = Names::new(vec![("tree".to_owned(), tree)], (1, 1));
    assert_eq!(listed(&names, 1), [".", "..", "dir", "dir-2", "null", "to"]);
    let dir = path(&names, "dir").unwrap();
    assert_eq!(listed(&names, dir), [".", "..", "a", "b", "sub"]);
    assert_eq!(names.list(dir, 3, 1).unwrap()[0].0, "b");
    assert!(names.list(dir, 9, 1).unwrap().is_empty());
    let sub = path(&names, "dir/sub").unwrap();
    assert_eq!(names.list(sub, 1, 1).unwrap()[0].1, dir);
    // Two names of one file are one inode, with two links.
    let (a, c) = (path(&names, "dir/a").unwrap(), path(&names, "dir/sub/c"));
    assert_eq!(Some(a), c);
    let found = names.find(a).unwrap();
    assert_eq!(
        (found.attr.nlink, found.attr.size, found.attr.uid),
        (2, 10, 7)
    );
    assert!(matches!(found.kind, Kind::File(Some(_), 0)));
    let before = UNIX_EPOCH - Duration::from_millis(4750);
    assert_eq!(found.attr.mtime, before);
    let starts = |at: &str| match names.find(path(&names, at).unwrap()).unwrap().kind {
        Kind::File(_, start) => start,
        _ => panic!("a file"),
    };
    assert_eq!((starts("dir/b"), starts("dir-2")), (10, 30));
    assert_eq!(names.find(1).unwrap().attr.nlink, 3);
    assert_eq!(names.find(dir).unwrap().attr.nlink, 3);
    let null = names.find(path(&names, "null").unwrap()).unwrap();
    assert_eq!(null.attr.rdev, 0x45 | 1 << 8 | 0x12300 << 12);
    for missing in ["x", "dir/a/x", "dir-2/x"] {
        assert_eq!(path(&names, missing), None, "{missing}");
    }
    assert!(names.find(0).is_none() && names.find(10).is_none() && names.find(6).is_none());
    assert!(names.list(a, 0, 9).is_none());
}

#[test]
fn several_components_lie_beside_each_other() {
    let disk = Shown::Stream(Arc::new(Bytes(100)));
    let tree = Shown::Tree(listing(), Some(Arc::new(Bytes(60))));
    let components = vec![("home".to_owned(), tree), ("disk".to_owned(), disk)];
    let names = Names::new(components, (1, 2));
    assert_eq!(listed(&names, 1), [".", "..", "disk", "home"]);
    let disk = names.find(path(&names, "disk").unwrap()).unwrap();
    assert_eq!((disk.attr.size, disk.attr.uid, disk.attr.gid), (100, 1, 2));
    let home = path(&names, "home").unwrap();
    assert_eq!(names.list(home, 1, 1).unwrap()[0].1, 1);
    assert!(path(&names, "home/dir/sub/c").is_some());
    assert_eq!(names.totals(), (10, 160));
    assert_eq!(path(&names, "disk/x"), None);
}
