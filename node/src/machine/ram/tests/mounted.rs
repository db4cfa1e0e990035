//! The memory as a machine has it: a file that is mapped, written to, and punched holes into, against a model.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::process::{Child, Command};

use rustix::fs::{FallocateFlags, fallocate};

use crate::nbd::client::NbdDisk;

use super::*;

/// The file, mapped as a machine does.
struct Mapped {
    file: File,
    memory: *mut u8,
    len: usize,
}

// SAFETY: the mapping is of the process, and lives as long as this.
unsafe impl Send for Mapped {}
// SAFETY: as above; whoever shares it writes to places apart.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn open(mounted: &Mounted) -> Self {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(mounted.file())
            .unwrap();
        let len = file.metadata().unwrap().len() as usize;
        let how = libc::PROT_READ | libc::PROT_WRITE;
        let (anywhere, fd) = (std::ptr::null_mut(), file.as_raw_fd());
        // SAFETY: a new mapping, wherever the kernel likes.
        let memory = unsafe { libc::mmap(anywhere, len, how, libc::MAP_SHARED, fd, 0) };
        assert!(memory != libc::MAP_FAILED);
        let memory = memory.cast();
        Self { file, memory, len }
    }

    #[allow(clippy::mut_from_ref)]
    fn at(&self, range: Range<u64>) -> &mut [u8] {
        let range = Base::range(range);
        assert!(range.end <= self.len);
        // SAFETY: it lies in the mapping; the tests look at one place at a time.
        unsafe { std::slice::from_raw_parts_mut(self.memory.add(range.start), range.len()) }
    }

    fn sync(&self) {
        // SAFETY: it is the mapping.
        let synced = unsafe { libc::msync(self.memory.cast(), self.len, libc::MS_SYNC) };
        assert_eq!(synced, 0);
        self.file.sync_data().unwrap();
    }

    fn punch(&self, range: Range<u64>) {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, how, range.start, range.end - range.start).unwrap();
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: nothing refers to it any longer.
        let gone = unsafe { libc::munmap(self.memory.cast(), self.len) };
        assert_eq!(gone, 0);
    }
}

/// Fails where a test does not end: file systems can hang.
fn bounded(test: impl FnOnce() + Send + 'static) {
    let (done, is_done) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    match is_done.recv_timeout(LONGEST) {
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("it takes too long"),
        _ => thread.join().unwrap(),
    }
}

#[test]
fn a_mapped_file_is_what_a_model_is() {
    const LEN: u64 = 4 << 20;
    bounded(|| {
        let rt = runtime();
        let base = Base::new(LEN, 300);
        let mut model = base.bytes.clone();
        let mut published = model.clone();
        let (_dir, ram) = memory(LEN, Some(base));
        let at = tempfile::tempdir().unwrap();
        let mounted = ram.mount(at.path(), rt.handle().clone()).unwrap();
        let mapped = Mapped::open(&mounted);
        let mut seeded = Seeded(0x9876_5432);
        for step in 0..3000 {
            let range = seeded.range(LEN, [9000, 300_000][(step % 16 == 0) as usize]);
            let place = Base::range(range.clone());
            match seeded.below(100) {
                0..30 => assert!(mapped.at(range) == &model[place], "step {step}"),
                30..40 => {
                    let mut bytes = vec![0; place.len()];
                    mapped.file.read_exact_at(&mut bytes, range.start).unwrap();
                    assert!(bytes == model[place], "step {step}");
                }
                40..65 => {
                    model[place.clone()].fill(seeded.below(5) as u8);
                    mapped.at(range).copy_from_slice(&model[place]);
                }
                65..75 => {
                    model[place.clone()].fill(seeded.below(5) as u8);
                    mapped
                        .file
                        .write_all_at(&model[place], range.start)
                        .unwrap();
                }
                75..90 => {
                    model[place].fill(0);
                    mapped.punch(range);
                }
                90..96 => {
                    mapped.sync();
                    assert!(
                        rt.block_on(ram.read(range)).unwrap() == model[place],
                        "step {step}"
                    );
                }
                96..98 => {
                    mapped.sync();
                    ram.freeze().unwrap();
                    assert!(compose(&ram.frozen(), &published) == model, "step {step}");
                }
                _ => {
                    let frozen = ram.frozen();
                    let some = frozen.len().div_ceil(2);
                    published = compose(&frozen[..some], &published);
                    ram.absorb(some).unwrap();
                }
            }
        }
        assert!(mapped.at(0..LEN) == &model[..]);
        let file = OpenOptions::new().write(true).open(mounted.file()).unwrap();
        assert!(file.set_len(LEN).is_ok() && file.set_len(LEN + PAGE).is_err());
        drop((mapped, file, mounted));
        assert!(!at.path().join(FILE).exists());
    });
}

#[test]
fn many_write_while_the_machine_stops_and_what_is_frozen_stays() {
    const LEN: u64 = 8 << 20;
    const EACH: u64 = LEN / 4;
    bounded(|| {
        let rt = runtime();
        let base = Base::new(LEN, 500);
        let (_dir, ram) = memory(LEN, Some(base.clone()));
        let at = tempfile::tempdir().unwrap();
        let mounted = ram.mount(at.path(), rt.handle().clone()).unwrap();
        let mapped = Arc::new(Mapped::open(&mounted));
        let is_over = Arc::new(AtomicBool::new(false));
        // Each has a part of its own, in which it knows what is there.
        let write = |part: u64| {
            let (mapped, is_over) = (mapped.clone(), is_over.clone());
            let mut model = base.bytes[Base::range(part * EACH..(part + 1) * EACH)].to_vec();
            std::thread::spawn(move || {
                let mut seeded = Seeded(part + 77);
                while !is_over.load(Ordering::Relaxed) {
                    let range = seeded.range(EACH, 20_000);
                    let place = Base::range(range.clone());
                    let there = part * EACH + range.start..part * EACH + range.end;
                    match seeded.below(10) {
                        0..5 => assert!(mapped.at(there) == &model[place]),
                        5..7 => {
                            model[place.clone()].fill(seeded.below(9) as u8);
                            mapped.at(there).copy_from_slice(&model[place]);
                        }
                        7..9 => {
                            model[place.clone()].fill(seeded.below(9) as u8);
                            mapped
                                .file
                                .write_all_at(&model[place], there.start)
                                .unwrap();
                        }
                        _ => {
                            model[place].fill(0);
                            mapped.punch(there);
                        }
                    }
                }
                model
            })
        };
        let writers: Vec<_> = (0..4).map(write).collect();
        let mut before: Vec<(Frozen, Vec<u8>)> = Vec::new();
        for round in 0..20 {
            std::thread::sleep(Duration::from_millis(100));
            mapped.file.sync_data().unwrap();
            ram.freeze().unwrap();
            for (frozen, bytes) in &before {
                assert!(*bytes == compose(std::slice::from_ref(frozen), &base.bytes));
            }
            before = ram
                .frozen()
                .into_iter()
                .map(|frozen| {
                    let bytes = compose(std::slice::from_ref(&frozen), &base.bytes);
                    (frozen, bytes)
                })
                .collect();
            if round % 3 == 0 {
                ram.absorb(1).unwrap();
                before.remove(0);
            }
        }
        is_over.store(true, Ordering::Relaxed);
        let models = writers.into_iter().map(|writer| writer.join().unwrap());
        let model = models.collect::<Vec<_>>().concat();
        assert!(mapped.at(0..LEN) == &model[..]);
        mapped.sync();
        assert!(rt.block_on(ram.read(0..LEN)).unwrap() == model);
        drop((mapped, mounted));
    });
}

#[test]
fn who_waits_for_the_base_hears_when_the_memory_goes() {
    bounded(|| {
        let rt = runtime();
        let (_dir, ram) = memory(1 << 20, Some(Base::new(1 << 20, 1_000_000_000)));
        let at = tempfile::tempdir().unwrap();
        let mounted = ram.mount(at.path(), rt.handle().clone()).unwrap();
        let file = File::open(mounted.file()).unwrap();
        let read = std::thread::spawn(move || file.read_exact_at(&mut [0; 10], 0));
        std::thread::sleep(Duration::from_millis(200));
        drop(mounted);
        assert!(read.join().unwrap().is_err());
    });
}

/// QEMU's server, which ends with the test.
struct Server(Child);

impl Server {
    fn start(dir: &TempDir) -> Self {
        let mut command = Command::new("qemu-nbd");
        command.args(["-r", "-t", "-f", "raw", "-k"]);
        command
            .arg(dir.path().join("socket"))
            .arg(dir.path().join("image"));
        Self(command.spawn().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _over = self.0.kill();
        let _over = self.0.wait();
    }
}

#[test]
fn a_machine_waits_while_its_base_has_no_server() {
    const LEN: u64 = 32 << 20;
    bounded(|| {
        let rt = runtime();
        let dir = tempfile::tempdir().unwrap();
        let mut model = Base::new(LEN, 0).bytes.clone();
        std::fs::write(dir.path().join("image"), &model).unwrap();
        let server = Server::start(&dir);
        let socket = dir.path().join("socket");
        let base = rt.block_on(NbdDisk::connect(&socket)).unwrap();
        let kept = tempfile::tempdir().unwrap();
        let ram = Arc::new(Ram::new(kept.path(), LEN, Some(base)).unwrap());
        let at = tempfile::tempdir().unwrap();
        let mounted = ram.mount(at.path(), rt.handle().clone()).unwrap();
        let mapped = Mapped::open(&mounted);
        let restarting = std::thread::spawn(move || {
            let mut server = server;
            for _ in 0..3 {
                std::thread::sleep(Duration::from_millis(100));
                drop(server);
                std::thread::sleep(Duration::from_millis(300));
                server = Server::start(&dir);
            }
            (server, dir)
        });
        let mut seeded = Seeded(0xabcd);
        while !restarting.is_finished() {
            let range = seeded.range(LEN, 9000);
            let place = Base::range(range.clone());
            assert!(mapped.at(range.clone()) == &model[place.clone()]);
            model[place.clone()].fill(7);
            mapped.at(range).fill(7);
        }
        assert!(mapped.at(0..LEN) == &model[..]);
        drop((mapped, mounted, restarting.join().unwrap()));
    });
}
