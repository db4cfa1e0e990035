//! A small cache of what is dear to make: decoded frames, pages of an index.
//!
//! Least recently used goes first. What two readers want at the same time is made once: the second waits for the first.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Values by number, of bounded weight together.
pub(super) struct Cache<V> {
    inner: Mutex<Inner<V>>,
    limit: usize,
}

/// Holds a value once it is made. Its lock is held while it is made.
type Slot<V> = Arc<Mutex<Option<Arc<V>>>>;

struct Inner<V> {
    slots: HashMap<u64, Entry<V>>,
    /// Keys by when they were last used.
    order: BTreeMap<u64, u64>,
    weight: usize,
    clock: u64,
}

struct Entry<V> {
    slot: Slot<V>,
    used: u64,
    weight: usize,
}

impl<V> Cache<V> {
    /// Keeps values of at most this weight together; but always the one used last.
    pub fn new(limit: usize) -> Self {
        let inner = Inner {
            slots: HashMap::new(),
            order: BTreeMap::new(),
            weight: 0,
            clock: 0,
        };
        Self {
            inner: Mutex::new(inner),
            limit,
        }
    }

    /// Returns the value of a key; makes it where it is not kept. Nothing is kept of a failure.
    pub fn get<E>(
        &self,
        key: u64,
        weight: usize,
        make: impl FnOnce() -> Result<V, E>,
    ) -> Result<Arc<V>, E> {
        let slot = self.lock().touch(key, weight, self.limit);
        let mut value = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = &*value {
            return Ok(value.clone());
        }
        match make() {
            Ok(made) => Ok(value.insert(Arc::new(made)).clone()),
            Err(error) => {
                self.lock().forget(key, &slot);
                Err(error)
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<V>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<V> Inner<V> {
    fn touch(&mut self, key: u64, weight: usize, limit: usize) -> Slot<V> {
        self.clock += 1;
        let used = self.clock;
        if let Some(entry) = self.slots.get_mut(&key) {
            self.order.remove(&entry.used);
            entry.used = used;
            self.order.insert(used, key);
            return entry.slot.clone();
        }
        while self.weight + weight > limit
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.weight -= self.slots.remove(&oldest).map_or(0, |entry| entry.weight);
        }
        let slot = Slot::default();
        self.weight += weight;
        self.order.insert(used, key);
        self.slots.insert(
            key,
            Entry {
                slot: slot.clone(),
                used,
                weight,
            },
        );
        slot
    }

    fn forget(&mut self, key: u64, slot: &Slot<V>) {
        if self
            .slots
            .get(&key)
            .is_some_and(|entry| Arc::ptr_eq(&entry.slot, slot))
            && let Some(entry) = self.slots.remove(&key)
        {
            self.order.remove(&entry.used);
            self.weight -= entry.weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn make(cache: &Cache<u64>, key: u64, made: &mut Vec<u64>) {
        let value = cache.get(key, 10, || {
            made.push(key);
            Ok::<_, Infallible>(key * 2)
        });
        assert_eq!(*value.unwrap(), key * 2);
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let cache = Cache::new(30);
        let mut made = Vec::new();
        for key in [1, 2, 3, 1, 4, 1, 2] {
            make(&cache, key, &mut made);
        }
        assert_eq!(made, [1, 2, 3, 4, 2]);
        assert_eq!(cache.lock().weight, 30);
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
        let cache = Cache::<u64>::new(30);
        assert_eq!(cache.get(7, 10, || Err("no")), Err("no"));
        assert_eq!(cache.lock().weight, 0);
        assert_eq!(cache.get(7, 10, || Ok::<_, &str>(1)).as_deref(), Ok(&1));
    }

    #[test]
    fn readers_at_the_same_time_share_the_making() {
        let cache = Cache::new(30);
        let made = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let make = || {
                        made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        Ok::<_, Infallible>(5)
                    };
                    assert_eq!(cache.get(1, 10, make).as_deref(), Ok(&5));
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }
}
