//! Proving components while they come, as far as each frame can be proved alone: at the end of a transfer, when all machines of a room are
//! done at once, there is little left to do. What was proved then is not read again.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use capsule_chunker::layer::read::{LayerCache, LayerContent, ReadOptions};
use capsule_chunker::layer::{Storage, Unproved};
use capsule_proto::{GroupRanges, RootHash};
use tokio::time::MissedTickBehavior;

use super::prepare::{ComponentPlan, Prepared};
use crate::control::Failure;
use crate::held::HeldWay;
use crate::layers::open_all;
use crate::store::{LayerBlobs, Store};
use crate::work::blocking;

/// How often it is looked what has come.
const TICK: Duration = Duration::from_millis(250);
/// Compared at a time, some milliseconds: so long the check may wait for it to end.
const STEP: u64 = 8 << 20;
/// Components of one pull that are proved so: each keeps files open.
const MOST: usize = 4;

/// What was proved of components of which not all was here.
#[derive(Clone)]
pub struct Early(Arc<Shared>);

struct Shared {
    coming: BTreeMap<RootHash, Mutex<Coming>>,
    /// Nothing more comes.
    ended: AtomicBool,
}

struct Coming {
    layer: LayerBlobs,
    /// None before its pack has begun to come.
    open: Option<(Arc<LayerContent>, Unproved)>,
    /// What was here at the last look.
    seen: GroupRanges,
    /// There is no use in another.
    over: bool,
}

impl Early {
    /// For the components of a capsule that are fetched. Their indexes are here.
    pub fn new(prepared: &Prepared) -> Self {
        let fetched = |plan: &&ComponentPlan| !plan.held && plan.like.is_none();
        // A component that is the pack of its one layer, as far as can be told without the index.
        let by_pack = |plan: &ComponentPlan| {
            let root = plan.component.root;
            match &plan.way {
                HeldWay::Layers(layers) => match layers[..] {
                    [layer] if layer.pack == Some(root) => Some((root, layer)),
                    _ => None,
                },
                _ => None,
            }
        };
        let all = prepared.components.iter().filter(fetched);
        Self::of(all.filter_map(by_pack).take(MOST))
    }

    fn of(layers: impl Iterator<Item = (RootHash, LayerBlobs)>) -> Self {
        let coming = |layer| Coming {
            layer,
            open: None,
            seen: GroupRanges::new(),
            over: false,
        };
        Self(Arc::new(Shared {
            coming: layers
                .map(|(root, layer)| (root, Mutex::new(coming(layer))))
                .collect(),
            ended: AtomicBool::new(false),
        }))
    }

    /// Proves what comes while it is fetched.
    pub async fn during<T>(&self, store: &Store, fetching: impl Future<Output = T>) -> T {
        let _ended = EndOnDrop(&self.0.ended);
        let mut fetching = pin!(fetching);
        tokio::select! {
            fetched = &mut fetching => return fetched,
            Err(failure) = self.prove(store) => {
                tracing::warn!(%failure.message, "nothing more is proved while it comes");
            }
        }
        fetching.await
    }

    /// Until there is no use in it, or it is dropped: what was proved by then counts.
    async fn prove(&self, store: &Store) -> Result<(), Failure> {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut goes_on = !self.0.coming.is_empty();
        while goes_on {
            ticks.tick().await;
            let (early, store) = (self.clone(), store.clone());
            goes_on = blocking(move || Ok(early.look(&store))).await?;
        }
        Ok(())
    }

    /// What is left to be proved of a component that comes by this way; none if nothing of it was. May block for some milliseconds.
    pub fn take(&self, root: &RootHash, way: &HeldWay) -> Option<Unproved> {
        let coming = self.0.coming.get(root)?;
        let mut coming = coming.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = matches!(way, HeldWay::Layers(layers) if *layers == [coming.layer]);
        coming.open.take_if(|_| is_it).map(|(_, unproved)| unproved)
    }

    /// Looks what has come; false if there is no use in another look. What fails is left to the check, which says whose fault it is.
    fn look(&self, store: &Store) -> bool {
        let mut goes_on = false;
        for (root, coming) in &self.0.coming {
            let mut coming = coming.lock().unwrap_or_else(PoisonError::into_inner);
            if coming.over {
                continue;
            }
            if let Err(failure) = coming.look(root, store, &self.0.ended) {
                tracing::debug!(%root, %failure.message, "not proved while it comes");
                coming.over = true;
            }
            goes_on |= !coming.over;
        }
        goes_on
    }
}

/// Has a look end that is under way when nobody waits any more.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Coming {
    fn look(&mut self, root: &RootHash, store: &Store, ended: &AtomicBool) -> Result<(), Failure> {
        let Some(here) = store.present(root) else {
            return Ok(());
        };
        let (content, unproved) = match &mut self.open {
            Some(open) => open,
            closed => match open(root, self.layer, store)? {
                Some(opened) => closed.insert(opened),
                None => {
                    self.over = true;
                    return Ok(());
                }
            },
        };
        let fresh = here.ranges.difference(&self.seen);
        let (groups, one) = ((&here.ranges, &fresh), NonZeroUsize::MIN);
        while !ended.load(Ordering::Relaxed) {
            if unproved.prove(content, groups, STEP, one, &())? < STEP {
                self.seen = here.ranges;
                self.over = unproved.left() == 0;
                break;
            }
        }
        Ok(())
    }
}

/// Opens a component whose pack may be coming, if it is one as it lies.
fn open(
    root: &RootHash,
    layer: LayerBlobs,
    store: &Store,
) -> Result<Option<(Arc<LayerContent>, Unproved)>, Failure> {
    let pack = |_: &LayerBlobs| Ok(store.open_coming(root)? as Storage);
    let cache = LayerCache::new(&ReadOptions { cache_len: 0 });
    let as_it_is = |_: &LayerBlobs, content| Ok(content);
    let Some(content) = open_all(store, &[layer], &cache, &pack, &as_it_is)?.pop() else {
        return Ok(None);
    };
    let unproved = content.unproved()?;
    Ok(unproved.map(|unproved| (content, unproved)))
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::path::Path;

    use capsule_proto::FrameHash;
    use capsule_proto::index::{Index, IndexBuilder, Space};
    use capsule_proto::manifest::Component;
    use capsule_proto::ranges::{Height, group_count};
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::control::FailureCode;
    use crate::held::Holdings;
    use crate::publish::tests::published;
    use crate::store::{BlobKind, StoreOptions};
    use crate::transfer::check::check;
    use crate::work::Work;

    fn store(path: &Path) -> Store {
        Store::open(path, StoreOptions::default()).unwrap()
    }

    /// A store with a component that does not compress, and another that begins to fetch it.
    struct Fetching {
        from: Store,
        to: Store,
        component: Component,
        layer: LayerBlobs,
        temp: tempfile::TempDir,
    }

    impl Fetching {
        /// `change` may make the index say something else.
        fn begin(change: impl Fn(&mut Index)) -> Self {
            let temp = tempfile::tempdir().unwrap();
            let mut bytes = vec![0; 3 << 20];
            StdRng::seed_from_u64(7).fill_bytes(&mut bytes);
            std::fs::write(temp.path().join("file"), &bytes).unwrap();
            let (from, to) = (store(&temp.path().join("a")), store(&temp.path().join("b")));
            let component = published(&from, &temp.path().join("file")).components[0].clone();
            let holdings = Holdings::new(from.clone());
            let layers = holdings.recipe(Space::Stream, &component.root);
            let layers = layers.unwrap().unwrap();
            let index = from.read_whole(&layers[0].index, 1 << 20).unwrap();
            let mut index = Index::decode(&index).unwrap();
            change(&mut index);
            let mut builder = IndexBuilder::new();
            for frame in index.frames {
                builder.push_frame(frame).unwrap();
            }
            for run in index.runs {
                builder.push_run(run).unwrap();
            }
            let index = builder.finish(index.directory.header());
            to.put_small(&index, BlobKind::Index).unwrap();
            let layer = LayerBlobs {
                index: RootHash::of(&index),
                pack: layers[0].pack,
            };
            assert_eq!(layer.pack, Some(component.root), "it does not compress");
            Self {
                from,
                to,
                component,
                layer,
                temp,
            }
        }

        fn early(&self) -> Early {
            Early::of([(self.component.root, self.layer)].into_iter())
        }

        fn left(&self, early: &Early) -> Option<u64> {
            Some(early.take(&self.component.root, &self.way())?.left())
        }

        fn way(&self) -> HeldWay {
            HeldWay::Layers(vec![self.layer])
        }

        fn create(&self) {
            let Component { root, size, .. } = self.component;
            self.to.create_partial(&root, size, BlobKind::Pack).unwrap();
        }

        fn fetch(&self, groups: Range<u64>) {
            let (root, height, mut encoded) = (&self.component.root, Height::ROOT, Vec::new());
            let read = self
                .from
                .read_encoded(root, groups.clone(), height, &mut encoded);
            read.unwrap();
            self.to
                .write_encoded(root, groups, height, &encoded)
                .unwrap();
        }

        fn check(&self, early: Option<&Early>) -> Result<(), Failure> {
            self.to.flush(&self.component.root).unwrap();
            let way = self.way();
            let early = early.and_then(|early| early.take(&self.component.root, &way));
            check(&self.to, &self.component, &way, early, &Work::default())
        }

        /// Changes what lies on the disk of the pack.
        fn damage(&self) {
            let name = format!("{}.data", self.component.root);
            let mut dirs = vec![self.temp.path().join("b")];
            while let Some(dir) = dirs.pop() {
                for entry in std::fs::read_dir(dir).unwrap() {
                    let path = entry.unwrap().path();
                    if path.is_dir() {
                        dirs.push(path);
                    } else if path.ends_with(&name) {
                        std::fs::write(path, vec![7; self.component.size as usize]).unwrap();
                        return;
                    }
                }
            }
            panic!("the pack's file was not found");
        }
    }

    #[test]
    fn what_came_is_proved_before_the_rest_comes() {
        let fetching = Fetching::begin(|_| ());
        let Component { root, size, .. } = fetching.component;
        let groups = group_count(size);
        let early = fetching.early();
        assert!(early.look(&fetching.to), "its pack may still begin to come");
        assert_eq!(fetching.left(&early), None);
        fetching.create();
        fetching.fetch(0..groups / 2);
        assert!(early.look(&fetching.to));
        assert!(early.look(&fetching.to), "nothing new");
        fetching.fetch(groups / 2..groups);
        assert!(!early.look(&fetching.to), "all is proved");
        let other = HeldWay::Layers(vec![fetching.layer; 2]);
        assert!(early.take(&root, &other).is_none(), "another way");

        // It needs not be read again.
        fetching.to.flush(&root).unwrap();
        fetching.damage();
        fetching.check(Some(&early)).unwrap();
        let holdings = Holdings::new(fetching.to.clone());
        assert!(holdings.way_to(&fetching.component).unwrap().is_some());
        let refused = fetching.check(Some(&early)).unwrap_err();
        assert_eq!(refused.code, FailureCode::Io, "taken once");
    }

    #[test]
    fn what_comes_after_the_last_look_is_left() {
        let fetching = Fetching::begin(|_| ());
        let (early, groups) = (fetching.early(), group_count(fetching.component.size));
        fetching.create();
        fetching.fetch(groups / 2..groups);
        assert!(early.look(&fetching.to));
        let left = fetching.left(&early).unwrap();
        // But for frames of which some is here.
        let half = fetching.component.size / 2;
        assert!((half..half + (1 << 20)).contains(&left), "{left}");
    }

    #[test]
    fn a_frame_that_is_not_what_its_hash_says_is_refused_in_the_end() {
        let lie = |index: &mut Index| index.frames.last_mut().unwrap().hash = FrameHash([1; 16]);
        let fetching = Fetching::begin(lie);
        fetching.create();
        fetching.fetch(0..group_count(fetching.component.size));
        let early = fetching.early();
        assert!(!early.look(&fetching.to), "there is no use in going on");
        for early in [Some(&early), None] {
            let refused = fetching.check(early).unwrap_err();
            assert_eq!(refused.code, FailureCode::Damaged);
            let said = &refused.message;
            assert!(said.contains("its content has hash"), "{said}");
        }
    }
}
