//! The memory itself, against a model; `mounted` has it as a machine does.

mod mounted;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use capsule_chunker::content::ReadError;
use futures::FutureExt;
use futures::future::BoxFuture;
use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::machine::touched::Watched;

/// No test takes longer.
const LONGEST: Duration = Duration::from_secs(60);

/// Numbers that look random, the same each time.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    fn range(&mut self, limit: u64, longest: u64) -> Range<u64> {
        let aligned = self.below(2) == 0;
        let unit = if aligned { PAGE } else { 1 };
        let start = self.below(limit / unit) * unit;
        let len = (self.below(longest / unit) + 1) * unit;
        start..(start + len).min(limit)
    }
}

/// A base in memory, which takes its time. Of 256 KiB, the last are zeros.
struct Base {
    bytes: Vec<u8>,
    delay: Duration,
    is_damaged: AtomicBool,
    reads: AtomicU64,
}

impl Base {
    fn new(len: u64, delay: u64) -> Arc<Self> {
        let byte = |at: u64| match at >> 16 & 3 {
            3 => 0,
            _ => (at / 5 + at / PAGE) as u8 | 1,
        };
        Arc::new(Self {
            bytes: (0..len).map(byte).collect(),
            delay: Duration::from_micros(delay),
            is_damaged: AtomicBool::new(false),
            reads: AtomicU64::new(0),
        })
    }

    fn range(range: Range<u64>) -> Range<usize> {
        range.start as usize..range.end as usize
    }
}

impl Disk for Base {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        let start = range.start;
        range.end <= (start >> 18 << 18) + (4 << 16) && start >> 16 & 3 == 3
    }

    fn read(
        self: Arc<Self>,
        range: Range<u64>,
        mut into: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, ReadError>> {
        async move {
            self.reads.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(self.delay).await;
            if self.is_damaged.load(Ordering::Relaxed) {
                let error = io::Error::other("the disk is damaged");
                return Err(ReadError::io("base", range.start, error));
            }
            into.extend(&self.bytes[Self::range(range)]);
            Ok(into)
        }
        .boxed()
    }
}

fn memory(len: u64, base: Option<Arc<Base>>) -> (TempDir, Arc<Ram>) {
    let dir = tempfile::tempdir().unwrap();
    let base = base.map(|base| base as Arc<dyn Disk>);
    let ram = Ram::new(dir.path(), len, base).unwrap();
    (dir, Arc::new(ram))
}

fn runtime() -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().unwrap()
}

/// What the frozen generations say, above the base.
fn compose(frozen: &[Frozen], below: &[u8]) -> Vec<u8> {
    let mut all = below.to_vec();
    for generation in frozen {
        let file = File::open(&generation.file).unwrap();
        for run in &generation.runs {
            let part = &mut all[Base::range(run.start..run.start + run.len)];
            match run.data {
                true => file.read_exact_at(part, run.start).unwrap(),
                false => part.fill(0),
            }
        }
    }
    all
}

fn names(dir: &TempDir) -> usize {
    std::fs::read_dir(dir.path()).unwrap().count()
}

#[tokio::test]
async fn is_what_a_model_is() {
    const LEN: u64 = 2 << 20;
    let test = async {
        let base = Base::new(LEN - 5000, 0);
        let mut model = base.bytes.clone();
        model.resize(LEN as usize, 0);
        let mut published = model.clone();
        let (dir, mut ram) = memory(LEN, Some(base.clone()));
        let mut seeded = Seeded(0x1234_5678);
        for step in 0..6000 {
            let range = seeded.range(LEN, [9000, 200_000][(step % 8 == 0) as usize]);
            let place = Base::range(range.clone());
            match seeded.below(100) {
                0..45 => assert!(
                    ram.read(range).await.unwrap() == model[place],
                    "step {step}"
                ),
                45..80 => {
                    let byte = seeded.below(4) as u8;
                    model[place.clone()].fill(byte);
                    if byte > 1 {
                        model[place.clone()]
                            .iter_mut()
                            .step_by(3)
                            .for_each(|byte| *byte ^= 7);
                    }
                    ram.write(range.start, &model[place]).await.unwrap();
                }
                80..95 => {
                    model[place].fill(0);
                    ram.zero(range).await.unwrap();
                }
                95..98 => ram.freeze().unwrap(),
                98 => {
                    let frozen = ram.frozen();
                    let some = seeded.below(frozen.len() as u64 + 1) as usize;
                    published = compose(&frozen[..some], &published);
                    ram.absorb(some).unwrap();
                    assert!(compose(&ram.frozen(), &published).len() == model.len());
                }
                _ if step % 3 == 0 => {
                    // It starts again, with what was published as its base, from what its last stop left.
                    ram.freeze().unwrap();
                    assert!(compose(&ram.frozen(), &published) == model, "step {step}");
                    let again = Arc::new(Base {
                        bytes: published.clone(),
                        delay: Duration::ZERO,
                        is_damaged: AtomicBool::new(false),
                        reads: AtomicU64::new(0),
                    });
                    drop(ram);
                    ram = Arc::new(Ram::new(dir.path(), LEN, Some(Plain::of(again))).unwrap());
                }
                _ => {
                    let told = compose(&ram.frozen(), &published);
                    ram.merge().unwrap();
                    assert!(ram.frozen().len() <= 1);
                    assert!(compose(&ram.frozen(), &published) == told, "step {step}");
                }
            }
        }
        assert!(ram.read(0..LEN).await.unwrap() == model);
        let count = ram.frozen().len();
        ram.absorb(count).unwrap();
        assert!(ram.read(0..LEN).await.unwrap() == model);
        assert_eq!(names(&dir), 1);
        drop(ram);
        assert_eq!(names(&dir), 0);
    };
    timeout(LONGEST, test).await.unwrap();
}

/// A base that knows no zeros.
struct Plain(Arc<Base>);

impl Plain {
    fn of(base: Arc<Base>) -> Arc<dyn Disk> {
        Arc::new(Self(base))
    }
}

impl Disk for Plain {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn is_zero(&self, _: Range<u64>) -> bool {
        false
    }

    fn read(
        self: Arc<Self>,
        range: Range<u64>,
        into: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, ReadError>> {
        self.0.clone().read(range, into)
    }
}

#[tokio::test]
async fn pages_are_fetched_once_and_told_as_they_are_asked_for() {
    /// What a base is of one kind in.
    const PIECE: u64 = 64 << 10;
    let test = async {
        let base = Base::new(1 << 20, 20_000);
        let dir = tempfile::tempdir().unwrap();
        let watched = Arc::new(Watched::new(base.clone(), None));
        let ram = Ram::new(dir.path(), 1 << 20, Some(watched.clone())).unwrap();
        let reads = (0..16).map(|part| ram.read(part * 256..(part + 1) * 256));
        futures::future::try_join_all(reads).await.unwrap();
        assert_eq!(base.reads.load(Ordering::Relaxed), 1);
        assert_eq!(
            ram.stats(),
            Stats {
                fetched: PAGE,
                ..Stats::default()
            }
        );
        // Zeros that are known take nothing.
        assert!(ram.read(3 * PIECE..4 * PIECE).await.unwrap() == vec![0; PIECE as usize]);
        let at = 9 * PIECE;
        ram.read(at + 100..at + 200).await.unwrap();
        ram.read(at + PAGE..at + 3 * PAGE).await.unwrap();
        ram.read(5 * PIECE..5 * PIECE + 1).await.unwrap();
        ram.read(0..PAGE).await.unwrap();
        let touched = [(0, PAGE), (at, 3 * PAGE), (5 * PIECE, PAGE)];
        assert_eq!(watched.touched(), touched);
        assert_eq!(base.reads.load(Ordering::Relaxed), 5);
        ram.freeze().unwrap();
        assert_eq!(ram.frozen()[0].runs, [], "what was read was not written");
    };
    timeout(LONGEST, test).await.unwrap();
}

#[tokio::test]
async fn writes_win_over_reads_of_the_base_under_way() {
    let test = async {
        let base = Base::new(1 << 20, 100_000);
        let (_dir, ram) = memory(1 << 20, Some(base.clone()));
        let range = 2 * PAGE..3 * PAGE;
        let change = async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            ram.write(range.start, &[9; PAGE as usize]).await.unwrap();
            ram.zero(3 * PAGE..4 * PAGE).await.unwrap();
            ram.freeze().unwrap();
        };
        let (read, ()) = tokio::join!(ram.read(PAGE..5 * PAGE), change);
        let expected = [
            &base.bytes[4096..8192],
            &[9; 4096],
            &[0; 4096],
            &base.bytes[16384..20480],
        ];
        assert!(read.unwrap() == expected.concat());
        assert!(ram.read(PAGE..5 * PAGE).await.unwrap() == expected.concat());
        ram.absorb(1).unwrap();
        assert!(ram.read(PAGE..5 * PAGE).await.unwrap() == expected.concat());
    };
    timeout(LONGEST, test).await.unwrap();
}

#[tokio::test]
async fn a_base_that_fails_is_asked_again() {
    let test = async {
        let base = Base::new(1 << 20, 0);
        let (_dir, ram) = memory(1 << 20, Some(base.clone()));
        base.is_damaged.store(true, Ordering::Relaxed);
        assert!(ram.read(0..PAGE).await.is_err());
        assert!(ram.write(5, b"part of a page").await.is_err());
        ram.write(0, &[1; PAGE as usize]).await.unwrap();
        base.is_damaged.store(false, Ordering::Relaxed);
        assert!(ram.read(0..2 * PAGE).await.unwrap()[4096..] == base.bytes[4096..8192]);
    };
    timeout(LONGEST, test).await.unwrap();
}

#[test]
fn what_is_left_over_goes_and_what_does_not_fit_is_refused() {
    let (dir, ram) = memory(1 << 20, None);
    assert_eq!(ram.absorb(1).unwrap_err().kind(), ErrorKind::InvalidInput);
    let rt = runtime();
    rt.block_on(ram.write(PAGE, &[1; PAGE as usize])).unwrap();
    ram.freeze().unwrap();
    let frozen = ram.frozen();
    let run = Run {
        start: PAGE,
        len: PAGE,
        data: true,
    };
    assert_eq!(frozen[0].runs, [run]);
    rt.block_on(ram.write(0, &[1; PAGE as usize])).unwrap();
    // It did not stop.
    std::mem::forget(ram);
    std::fs::write(dir.path().join("generation-9.coming"), b"").unwrap();
    let again = Ram::new(dir.path(), 1 << 20, None).unwrap();
    assert_eq!(again.frozen(), frozen);
    assert_eq!(names(&dir), 3);
    drop(again);
    let other = Ram::new(dir.path(), 2 << 20, None);
    assert_eq!(other.map(drop).unwrap_err().kind(), ErrorKind::InvalidData);
    let longer = Ram::new(dir.path(), 1 << 20, Some(Base::new(2 << 20, 0)));
    assert_eq!(
        longer.map(drop).unwrap_err().kind(),
        ErrorKind::InvalidInput
    );
}

/// Much memory takes little of it.
#[test]
fn is_compact() {
    let (_dir, ram) = memory(64 << 30, None);
    let rt = runtime();
    rt.block_on(ram.write(63 << 30, &[1; 1 << 20])).unwrap();
    let start = std::time::Instant::now();
    ram.freeze().unwrap();
    let runs = &ram.frozen()[0].runs;
    assert_eq!(runs.len(), 1);
    ram.absorb(1).unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    assert!(
        rt.block_on(ram.read((63 << 30) - 1..(63 << 30) + 1))
            .unwrap()
            == [0, 1]
    );
}
