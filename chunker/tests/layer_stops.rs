//! Work that cannot be done to its end stops with the reason: sources that change, full disks, cancelling, panics.

mod layer_support;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use capsule_chunker::bao::TreeHasher;
use capsule_chunker::content::{Extent, Progress, ReadError};
use capsule_chunker::layer::Cuts;
use capsule_chunker::layer::encode::{EncodeError, Outputs, encode};
use capsule_chunker::layer::restore::{RestoreError, Sink, restore};
use layer_support::*;
use positioned_io::{ReadAt, WriteAt};

#[test]
fn sources_that_change_break_or_lie_are_not_published() {
    let broken = TestSource {
        broken_at: Some(9 << 20),
        ..TestSource::new(text(1, 12 << 20))
    };
    let changed = TestSource {
        changed: true,
        ..TestSource::new(text(1, 100))
    };
    let extent = |start, end| Extent {
        range: start..end,
        zero: false,
    };
    let gap = TestSource {
        extents: vec![extent(0, 10), extent(11, 100)],
        ..TestSource::new(text(1, 100))
    };
    let short = TestSource {
        extents: vec![extent(0, 99)],
        ..TestSource::new(text(1, 100))
    };
    let long = TestSource {
        extents: vec![extent(0, 100), extent(100, 101)],
        ..TestSource::new(text(1, 100))
    };
    let few_parts = TestSource {
        parts: Some(vec![50, 49]),
        ..TestSource::new(text(1, 100))
    };
    let many_parts = TestSource {
        parts: Some(vec![50, 50, 1]),
        ..TestSource::new(text(1, 100))
    };
    let error = |source: &TestSource| {
        encode_to_memory(source, &options(Cuts::Bytes, 1 << 20, 2))
            .map(drop)
            .unwrap_err()
    };
    assert!(
        matches!(error(&broken), EncodeError::Read(ReadError::Io { offset, .. }) if offset == 9 << 20)
    );
    assert!(matches!(
        error(&changed),
        EncodeError::Read(ReadError::Changed { .. })
    ));
    assert!(matches!(error(&gap), EncodeError::Extents { offset: 10 }));
    assert!(matches!(error(&short), EncodeError::Extents { offset: 99 }));
    assert!(matches!(error(&long), EncodeError::Extents { offset: 100 }));
    assert!(matches!(error(&few_parts), EncodeError::Parts { len: 100 }));
    assert!(matches!(
        error(&many_parts),
        EncodeError::Parts { len: 100 }
    ));
}

/// A file on a full disk.
struct Full(usize);

impl io::Write for Full {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0 = self
            .0
            .checked_sub(buf.len())
            .ok_or_else(|| io::Error::from(io::ErrorKind::StorageFull))?;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for Full {
    fn data(&mut self, _: u64, bytes: &[u8]) -> io::Result<()> {
        io::Write::write_all(self, bytes)
    }

    fn zeros(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// An outboard on a full disk.
struct NoRoom;

impl ReadAt for NoRoom {
    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
}

impl WriteAt for NoRoom {
    fn write_at(&mut self, _: u64, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// More than the hasher gathers before it writes, and than the queues hold.
#[test]
fn an_outboard_that_cannot_be_written_ends_the_encoding() {
    let source = TestSource::new(random(1, 100 << 20));
    let options = options(Cuts::Bytes, 1 << 20, 2);
    let (pack, memory) = (&mut io::sink(), Vec::<u8>::new);
    let outputs = Outputs {
        pack,
        pack_outboard: memory(),
        content_outboard: NoRoom,
    };
    let error = encode(&source, &options, outputs, &())
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, EncodeError::Hash(_)), "{error}");
    let pack = &mut io::sink();
    let outputs = Outputs {
        pack,
        pack_outboard: NoRoom,
        content_outboard: memory(),
    };
    let error = encode(&source, &options, outputs, &())
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, EncodeError::Hash(_)), "{error}");
}

/// Cancels after a number of bytes were read or written.
struct CancelAfter(u64, AtomicU64);

impl Progress for CancelAfter {
    fn read(&self, bytes: u64) {
        self.1.fetch_add(bytes, Ordering::Relaxed);
    }

    fn written(&self, bytes: u64) {
        self.1.fetch_add(bytes, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.1.load(Ordering::Relaxed) > self.0
    }
}

#[test]
fn a_full_disk_and_cancelling_end_the_encoding() {
    let source = TestSource::new(random(1, 30 << 20));
    let run = |pack: &mut dyn io::Write, progress: &dyn Progress| {
        let outputs = Outputs {
            pack,
            pack_outboard: Vec::<u8>::new(),
            content_outboard: Vec::<u8>::new(),
        };
        encode(
            &source,
            &options(Cuts::Bytes, 1 << 20, 2),
            outputs,
            progress,
        )
        .map(drop)
        .unwrap_err()
    };
    let error = run(&mut Full(5 << 20), &());
    assert!(
        matches!(&error, EncodeError::Pack { offset, .. } if *offset > 3 << 20),
        "{error}"
    );
    for after in [0, 3 << 20, 20 << 20] {
        let error = run(&mut io::sink(), &CancelAfter(after, AtomicU64::new(0)));
        assert!(matches!(error, EncodeError::Cancelled), "{error}");
    }
}

#[test]
fn a_full_disk_and_cancelling_end_the_restoring() {
    let source = TestSource::new(text(1, 10 << 20));
    let encoded = encode_to_memory(&source, &options(Cuts::Bytes, 256 << 10, 2)).unwrap();
    let root = target(&encoded);
    let content = open(encoded.0.into_index(root), encoded.1, vec![]).unwrap();
    let threads = 2.try_into().unwrap();
    let mut hasher = TreeHasher::new();
    let error = restore(
        &content,
        threads,
        &mut Full(2 << 20),
        Some(&mut hasher),
        &(),
    )
    .unwrap_err();
    assert!(
        matches!(&error, RestoreError::Sink { offset, .. } if *offset > 1 << 20),
        "{error}"
    );
    let progress = CancelAfter(1 << 20, AtomicU64::new(0));
    let error = restore(&content, threads, &mut Gather::default(), None, &progress).unwrap_err();
    assert!(matches!(error, RestoreError::Cancelled), "{error}");
}

#[test]
#[should_panic(expected = "a scoped thread panicked")]
fn a_panic_in_a_source_ends_the_encoding() {
    let source = TestSource {
        panics_at: Some(9 << 20),
        ..TestSource::new(text(1, 20 << 20))
    };
    let _ = encode_to_memory(&source, &options(Cuts::Bytes, 1 << 20, 2));
}
