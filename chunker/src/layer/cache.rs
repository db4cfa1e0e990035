//! What the layers of a stack, or of several that are read side by side, keep together: decoded frames and pages of indexes.
//!
//! One limit for all of them, as which layers are wanted differs from place to place. What was not used since it was last
//! looked at goes first. What two readers want at the same time is made once: the second waits for the first, as long as
//! its own read is not stopped; where the first fails, the second makes it itself, from its own budget.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use capsule_proto::index::{Frame, Run};

use super::budget::{Budget, Spent};
use super::codec::Decoder;
use super::read::ReadOptions;

/// Bytes of pages of runs kept, at about 128 KiB each: two for each of the 256 layers of a long chain.
const RUNS_KEPT: usize = 64 << 20;
/// Bytes of pages of frames kept, at about 150 KiB each.
const ENTRIES_KEPT: usize = 32 << 20;
/// Most decoders kept for the next reader: as many readers as disks and mounts have at a time.
const DECODERS_KEPT: usize = 64;
/// What keeping a value takes beside it, so that no number of tiny ones fills the memory.
const OVERHEAD: usize = 256;
/// Who waits for another's making asks so often whether to go on.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// Which layer, by [`next_number`], and which of its frames or pages.
pub(super) type Key = (u64, u64);

/// A number for a layer that is opened: above those of its sources, as these were opened before. So whatever a frame refers to
/// has a smaller key than itself.
pub(super) fn next_number() -> u64 {
    static OPENED: AtomicU64 = AtomicU64::new(0);
    OPENED.fetch_add(1, Ordering::Relaxed)
}

/// What the layers of a stack share. Give the same to all of them.
#[derive(Clone)]
pub struct LayerCache(pub(super) Arc<Shared>);

pub(super) struct Shared {
    pub frames: Cache<Vec<u8>>,
    pub runs: Cache<Vec<Run>>,
    pub entries: Cache<Vec<Frame>>,
    decoders: Mutex<Vec<Decoder>>,
}

impl LayerCache {
    /// Keeps nothing yet.
    pub fn new(options: &ReadOptions) -> Self {
        Self(Arc::new(Shared {
            frames: Cache::new(options.cache_len),
            runs: Cache::new(RUNS_KEPT),
            entries: Cache::new(ENTRIES_KEPT),
            decoders: Mutex::default(),
        }))
    }

    /// Forgets all pages of indexes: one that was damaged may have been read as another that is well-formed.
    pub fn forget_pages(&self) {
        self.0.runs.clear();
        self.0.entries.clear();
    }
}

impl Shared {
    /// Lends a decoder.
    pub fn with_decoder<R>(&self, work: impl FnOnce(&mut Decoder) -> R) -> R {
        let decoders = || self.decoders.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = decoders().pop();
        let mut decoder = kept.unwrap_or_default();
        let result = work(&mut decoder);
        let mut kept = decoders();
        if kept.len() < DECODERS_KEPT {
            kept.push(decoder);
        }
        result
    }
}

/// Values of bounded weight together.
pub(super) struct Cache<V> {
    inner: Mutex<Inner<V>>,
    limit: usize,
}

struct Inner<V> {
    entries: HashMap<Key, Entry<V>>,
    /// What is kept, in the order in which it is looked at when room is wanted.
    kept: VecDeque<Key>,
    weight: usize,
}

struct Entry<V> {
    slot: Arc<Slot<V>>,
    /// 0 while it is made.
    weight: usize,
    /// Since it was last looked at.
    used: bool,
}

/// Holds a value once it is made.
struct Slot<V> {
    state: Mutex<State<V>>,
    changed: Condvar,
}

enum State<V> {
    Wanted,
    Making,
    Made(Arc<V>),
}

impl<V> Cache<V> {
    /// Keeps values of at most this weight together; but always the one made last.
    pub fn new(limit: usize) -> Self {
        let inner = Inner {
            entries: HashMap::new(),
            kept: VecDeque::new(),
            weight: 0,
        };
        Self {
            inner: Mutex::new(inner),
            limit,
        }
    }

    /// The value of a key, if it is kept.
    pub fn kept(&self, key: Key) -> Option<Arc<V>> {
        let slot = {
            let mut inner = self.lock();
            let entry = inner.entries.get_mut(&key)?;
            entry.used = true;
            entry.slot.clone()
        };
        match &*slot.lock() {
            State::Made(value) => Some(value.clone()),
            State::Wanted | State::Making => None,
        }
    }

    /// Forgets what is kept; what is being made stays.
    pub fn clear(&self) {
        let mut inner = self.lock();
        while let Some(key) = inner.kept.pop_front() {
            if let Some(entry) = inner.entries.remove(&key) {
                inner.weight -= entry.weight;
            }
        }
    }

    /// Returns the value of a key; makes it, and tells its weight, where it is not kept. Nothing is kept of a failure.
    ///
    /// While it is made others may wait for it. They cannot come to wait in a circle as long as what is made wants only
    /// keys that are smaller, or of other caches that want none of this.
    pub fn get<E: From<Spent>>(
        &self,
        key: Key,
        budget: &mut Budget<'_>,
        make: impl FnOnce(&mut Budget<'_>) -> Result<(V, usize), E>,
    ) -> Result<Arc<V>, E> {
        let slot = self.lock().slot(key);
        if let Some(made) = slot.wait(budget)? {
            return Ok(made);
        }
        // Whatever comes of it, those who wait are told.
        let mut making = Making {
            cache: self,
            key,
            slot: &slot,
            made: None,
        };
        let (value, weight) = make(budget)?;
        let value = Arc::new(value);
        making.made = Some((value.clone(), weight + OVERHEAD));
        Ok(value)
    }

    fn lock(&self) -> MutexGuard<'_, Inner<V>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<V> Slot<V> {
    /// The value, once it is there; or nothing, and then it is the caller's to make it.
    fn wait(&self, budget: &Budget<'_>) -> Result<Option<Arc<V>>, Spent> {
        let mut state = self.lock();
        loop {
            match &*state {
                State::Made(value) => return Ok(Some(value.clone())),
                State::Wanted => {
                    *state = State::Making;
                    return Ok(None);
                }
                State::Making => {
                    budget.check()?;
                    let waited = self.changed.wait_timeout(state, ASK_EVERY);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<V>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A value that is being made: kept if it was, forgotten if that failed or panicked.
struct Making<'a, V> {
    cache: &'a Cache<V>,
    key: Key,
    slot: &'a Arc<Slot<V>>,
    made: Option<(Arc<V>, usize)>,
}

impl<V> Drop for Making<'_, V> {
    fn drop(&mut self) {
        let mut inner = self.cache.lock();
        let state = match self.made.take() {
            Some((value, weight)) => {
                inner.keep(self.key, self.slot, weight, self.cache.limit);
                State::Made(value)
            }
            None => {
                inner.forget(self.key, self.slot);
                State::Wanted
            }
        };
        drop(inner);
        *self.slot.lock() = state;
        self.slot.changed.notify_all();
    }
}

impl<V> Inner<V> {
    fn slot(&mut self, key: Key) -> Arc<Slot<V>> {
        let entry = self.entries.entry(key).or_insert_with(Entry::new);
        entry.used = true;
        entry.slot.clone()
    }

    /// Keeps a value that was made, but drops others until there is room.
    fn keep(&mut self, key: Key, slot: &Arc<Slot<V>>, weight: usize, limit: usize) {
        let made = || Entry {
            slot: slot.clone(),
            weight: 0,
            used: false,
        };
        let entry = self.entries.entry(key).or_insert_with(made);
        // After a failure another may have begun anew: then that is kept.
        if !Arc::ptr_eq(&entry.slot, slot) {
            return;
        }
        entry.weight = weight;
        entry.used = false;
        while self.weight + weight > limit
            && let Some(oldest) = self.kept.pop_front()
        {
            let Some(entry) = self.entries.get_mut(&oldest) else {
                continue;
            };
            if entry.used {
                entry.used = false;
                self.kept.push_back(oldest);
            } else {
                self.weight -= entry.weight;
                self.entries.remove(&oldest);
            }
        }
        self.weight += weight;
        self.kept.push_back(key);
    }

    fn forget(&mut self, key: Key, slot: &Arc<Slot<V>>) {
        if let Some(entry) = self.entries.get(&key)
            && Arc::ptr_eq(&entry.slot, slot)
        {
            self.entries.remove(&key);
        }
    }
}

impl<V> Entry<V> {
    fn new() -> Self {
        let slot = Slot {
            state: Mutex::new(State::Wanted),
            changed: Condvar::new(),
        };
        Self {
            slot: Arc::new(slot),
            weight: 0,
            used: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};
    use std::thread;

    use super::*;

    const WEIGHT: usize = 10 + OVERHEAD;

    fn make(cache: &Cache<u64>, key: u64, made: &mut Vec<u64>) {
        let value = cache.get((0, key), &mut Budget::new(0), |_| {
            made.push(key);
            Ok::<_, Spent>((key * 2, 10))
        });
        assert_eq!(*value.unwrap(), key * 2);
    }

    #[test]
    fn what_was_not_used_goes_first() {
        let cache = Cache::new(3 * WEIGHT);
        let mut made = Vec::new();
        for key in [1, 2, 3, 1, 4, 1, 2] {
            make(&cache, key, &mut made);
        }
        assert_eq!(made, [1, 2, 3, 4, 2]);
        let inner = cache.lock();
        assert_eq!(
            (inner.weight, inner.entries.len(), inner.kept.len()),
            (3 * WEIGHT, 3, 3)
        );
    }

    #[test]
    fn one_value_may_exceed_the_limit() {
        let cache = Cache::new(5);
        let mut made = Vec::new();
        for key in [1, 1, 2, 1] {
            make(&cache, key, &mut made);
        }
        assert_eq!(made, [1, 2, 1]);
    }

    #[test]
    fn failures_are_not_kept() {
        let cache = Cache::<u64>::new(3 * WEIGHT);
        let dear = Spent::TooDear("it");
        let mut budget = Budget::new(0);
        assert_eq!(cache.get((0, 7), &mut budget, |_| Err(dear)), Err(dear));
        assert!(cache.lock().entries.is_empty());
        let made = cache.get((0, 7), &mut budget, |_| Ok::<_, Spent>((1, 10)));
        assert_eq!(made.as_deref(), Ok(&1));
    }

    #[test]
    fn readers_at_the_same_time_share_the_making() {
        let cache = Cache::new(3 * WEIGHT);
        let made = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let make = |_: &mut Budget<'_>| {
                        made.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(Duration::from_millis(20));
                        Ok::<_, Spent>((5, 10))
                    };
                    let value = cache.get((0, 1), &mut Budget::new(0), make);
                    assert_eq!(value.as_deref(), Ok(&5));
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    // The first maker fails, by an error or a panic; those who wait get the value, made by one of them.
    #[test]
    fn a_failure_is_the_makers_own() {
        for panics in [false, true] {
            let cache = Cache::<u64>::new(3 * WEIGHT);
            let made = AtomicUsize::new(0);
            let begun = AtomicBool::new(false);
            thread::scope(|scope| {
                let first = scope.spawn(|| {
                    cache.get((0, 1), &mut Budget::new(0), |_| {
                        begun.store(true, Ordering::Release);
                        thread::sleep(Duration::from_millis(50));
                        assert!(!panics, "told to panic");
                        Err(Spent::Cancelled)
                    })
                });
                while !begun.load(Ordering::Acquire) {
                    thread::yield_now();
                }
                for _ in 0..4 {
                    scope.spawn(|| {
                        let value = cache.get((0, 1), &mut Budget::new(0), |_| {
                            made.fetch_add(1, Ordering::Relaxed);
                            Ok::<_, Spent>((5, 10))
                        });
                        assert_eq!(value.as_deref(), Ok(&5));
                    });
                }
                match first.join() {
                    Ok(failed) => assert_eq!(failed, Err(Spent::Cancelled)),
                    Err(_) => assert!(panics),
                }
            });
            assert_eq!(made.into_inner(), 1);
            assert_eq!(cache.lock().weight, WEIGHT);
        }
    }

    #[test]
    fn who_is_stopped_does_not_wait_for_another() {
        let cache = Cache::<u64>::new(3 * WEIGHT);
        let (begun, end) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            let first = scope.spawn(|| {
                cache.get((0, 1), &mut Budget::new(0), |_| {
                    begun.store(true, Ordering::Release);
                    while !end.load(Ordering::Acquire) {
                        thread::yield_now();
                    }
                    Ok::<_, Spent>((5, 10))
                })
            });
            while !begun.load(Ordering::Acquire) {
                thread::yield_now();
            }
            let stopped = cache.get((0, 1), &mut Budget::until(0, &|| true), |_| {
                Ok::<_, Spent>((6, 10))
            });
            end.store(true, Ordering::Release);
            assert_eq!(stopped, Err(Spent::Cancelled));
            assert_eq!(first.join().unwrap().as_deref(), Ok(&5));
        });
    }
}
