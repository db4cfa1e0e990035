//! A component written out to a file that only this node sees, and served from there: nothing is decoded for a read any more.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use capsule_chunker::content::ReadError;
use futures::FutureExt;
use futures::future::BoxFuture;
use rustix::fs::{SeekFrom, seek};
use rustix::io::{ReadWriteFlags, preadv2};

use crate::control::{CapsuleRef, Export, Failure, FailureCode, Pull, Reporter};
use crate::disk::Disk;
use crate::export::export;
use crate::node::Node;
use crate::transfer::pull;

/// Tells this process's files apart.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// See the module. The file has no name, and goes with it.
pub struct Whole {
    file: File,
    path: PathBuf,
    len: u64,
    /// How long writing it out took.
    pub took: Duration,
}

impl Whole {
    /// Fetches all of a capsule, and writes a component out.
    pub async fn make(
        node: &Arc<Node>,
        capsule: CapsuleRef,
        component: &str,
        wait: Option<u64>,
        reporter: &Reporter,
    ) -> Result<Self, Failure> {
        let request = Pull {
            capsule: capsule.clone(),
            wait,
            like_path: None,
            like_capsule: None,
        };
        pull(node, request, reporter).await?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("nbd-{number}.new-{}", std::process::id());
        let to = node.home.dir().join(name);
        let remove = RemoveOnDrop(to.clone());
        // That of a process of the same number, long ago.
        let _gone = std::fs::remove_file(&to);
        let began = Instant::now();
        let request = Export {
            capsule,
            to: to.clone(),
            component: Some(component.to_owned()),
            force: false,
        };
        export(node, request, reporter).await?;
        let opened = File::open(&to).and_then(|file| Ok((file.metadata()?.len(), file)));
        drop(remove);
        let (len, file) = opened.map_err(|error| {
            let message = format!("opening {}: {error}", to.display());
            Failure::new(FailureCode::Io, message)
        })?;
        Ok(Self {
            file,
            path: to,
            len,
            took: began.elapsed(),
        })
    }

    /// Bytes that it takes on the disk.
    pub fn takes(&self) -> u64 {
        self.file.metadata().map_or(0, |found| found.blocks() * 512)
    }
}

/// A file that nobody needs a name for.
struct RemoveOnDrop(PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.0);
    }
}

impl Disk for Whole {
    fn len(&self) -> u64 {
        self.len
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        match seek(&self.file, SeekFrom::Data(range.start)) {
            Ok(data) => data >= range.end,
            // No data from there on.
            Err(error) => error == rustix::io::Errno::NXIO,
        }
    }

    fn read_at_hand(&self, range: Range<u64>, into: &mut Vec<u8>) -> bool {
        let start = into.len();
        let len = (range.end - range.start) as usize;
        into.resize(start + len, 0);
        let parts = &mut [io::IoSliceMut::new(&mut into[start..])];
        let read = preadv2(&self.file, parts, range.start, ReadWriteFlags::NOWAIT);
        let came = read.is_ok_and(|came| came == len);
        if !came {
            into.truncate(start);
        }
        came
    }

    fn read(
        self: Arc<Self>,
        range: Range<u64>,
        mut into: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, ReadError>> {
        async move {
            let (path, at) = (self.path.clone(), range.start);
            let read = tokio::task::spawn_blocking(move || {
                let start = into.len();
                into.resize(start + (range.end - range.start) as usize, 0);
                let read = self.file.read_exact_at(&mut into[start..], range.start);
                read.map(|()| into)
            });
            let read = read.await.map_err(io::Error::other).flatten();
            read.map_err(|error| ReadError::io(path, at, error))
        }
        .boxed()
    }
}
