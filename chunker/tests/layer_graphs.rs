//! Random versions of content, random layers between them, and random ways through these: whatever the way, what is read is
//! what was published.

mod layer_support;

use std::io;
use std::sync::{Arc, Mutex};

use capsule_chunker::bao::{self, Change, changed_groups, tree_of};
use capsule_chunker::content::{AsReadAt, BytesSource, Content, Progress};
use capsule_chunker::delta::{OldSource, Outline, Similar, SimilarOptions};
use capsule_chunker::layer::Cuts;
use capsule_chunker::layer::encode::{Against, EncodeOptions, Hashed, Outputs, encode_update};
use capsule_chunker::layer::reach::Reach;
use capsule_chunker::layer::read::{LayerCache, LayerContent, LayerError, ReadOptions, Spent};
use capsule_proto::index::{Source as SourceName, SourceKind, Space};
use capsule_proto::ranges::groups_touching;
use capsule_proto::{GROUP_LEN, GroupRanges, RootHash};
use layer_support::*;
use positioned_io::ReadAt;
use proptest::prelude::*;
use proptest::sample::{Index as Pick, select};
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};

/// A change of a version.
#[derive(Clone, Debug)]
enum Edit {
    Overwrite(Pick, Stretch),
    Insert(Pick, Stretch),
    /// What lies at one place comes to another too.
    Copy(Pick, Pick, usize),
    Remove(Pick, usize),
    Truncate(Pick),
    Grow(Stretch),
    /// Every so many bytes one differs.
    Sprinkle(usize),
}

fn len() -> impl Strategy<Value = usize> {
    prop_oneof![
        1..50usize,
        1..20_000usize,
        (1..12usize).prop_map(|pages| pages * 4096)
    ]
}

fn stretch() -> impl Strategy<Value = Stretch> {
    prop_oneof![
        (len(), any::<bool>()).prop_map(|(len, hole)| Stretch::Zeros { len, hole }),
        (len(), 0..9u64).prop_map(|(len, seed)| Stretch::Random { len, seed }),
        (len(), 0..9u64).prop_map(|(len, seed)| Stretch::Text { len, seed }),
    ]
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let place = any::<Pick>;
    let edit = prop_oneof![
        3 => (place(), stretch()).prop_map(|(at, new)| Edit::Overwrite(at, new)),
        2 => (place(), stretch()).prop_map(|(at, new)| Edit::Insert(at, new)),
        2 => (place(), place(), len()).prop_map(|(from, to, len)| Edit::Copy(from, to, len)),
        1 => (place(), len()).prop_map(|(at, len)| Edit::Remove(at, len)),
        1 => place().prop_map(Edit::Truncate),
        1 => stretch().prop_map(Edit::Grow),
        1 => (20..3000usize).prop_map(Edit::Sprinkle),
    ];
    prop::collection::vec(edit, 1..5)
}

fn edited(old: &[u8], edits: &[Edit], pages: bool) -> Vec<u8> {
    let mut new = old.to_vec();
    let made = |stretch: &Stretch| TestSource::made_of(std::slice::from_ref(stretch)).bytes;
    for edit in edits {
        let place = |at: &Pick| {
            let at = at.index(new.len() + 1);
            if pages { at - at % 4096 } else { at }
        };
        let range = |at: usize, len: usize| at..(at + len).min(new.len());
        match edit {
            Edit::Overwrite(at, stretch) => {
                let bytes = made(stretch);
                new.splice(range(place(at), bytes.len()), bytes);
            }
            Edit::Insert(at, stretch) => {
                let at = place(at);
                new.splice(at..at, made(stretch));
            }
            Edit::Copy(from, to, len) => {
                let (from, to) = (range(place(from), *len), place(to));
                let bytes = new[from].to_vec();
                new.splice(range(to, bytes.len()), bytes);
            }
            Edit::Remove(at, len) => drop(new.drain(range(place(at), *len))),
            Edit::Truncate(at) => new.truncate(place(at)),
            Edit::Grow(stretch) => new.extend(made(stretch)),
            Edit::Sprinkle(every) => new.iter_mut().step_by(*every).for_each(|byte| *byte ^= 1),
        }
    }
    new
}

/// How the layers of a case are made and read.
#[derive(Clone, Debug)]
struct How {
    pages: bool,
    space: Space,
    earlier: bool,
    frame_max: u32,
    cache_len: usize,
    threads: usize,
}

fn hows() -> impl Strategy<Value = How> {
    (
        any::<bool>(),
        any::<bool>(),
        select(vec![Space::Stream, Space::Contents]),
        select(vec![4096u32, 32_768, 1 << 20]),
        select(vec![0usize, 100_000, 32 << 20]),
        select(vec![1usize, 3]),
    )
        .prop_map(
            |(pages, earlier, space, frame_max, cache_len, threads)| How {
                pages,
                earlier,
                space,
                frame_max,
                cache_len,
                threads,
            },
        )
}

/// A layer: which version it leads from, and to.
struct Layer {
    parent: Option<usize>,
    target: usize,
    index: Vec<u8>,
    pack: Vec<u8>,
}

impl How {
    fn options(&self) -> EncodeOptions {
        let cuts = if self.pages { Cuts::Pages } else { Cuts::Bytes };
        EncodeOptions {
            earlier: self.earlier,
            ..options(cuts, self.frame_max, self.threads)
        }
    }

    fn source(&self, bytes: &[u8]) -> TestSource {
        let source = TestSource::new(bytes.to_vec());
        match self.space {
            Space::Stream => source,
            Space::Contents => {
                let third = bytes.len() / 3;
                source.with_parts(&[third, third, bytes.len() / 2])
            }
        }
    }

    fn whole(&self, versions: &[Vec<u8>], target: usize) -> Layer {
        let encoded = encode_to_memory(&self.source(&versions[target]), &self.options()).unwrap();
        let (encoded, pack) = encoded;
        Layer {
            parent: None,
            target,
            index: encoded.into_index(RootHash::of(&versions[target])),
            pack,
        }
    }

    fn update(&self, versions: &[Vec<u8>], parent: usize, target: usize) -> Layer {
        let (old, new) = (&versions[parent], &versions[target]);
        let name = SourceName {
            kind: SourceKind::Parent,
            root: RootHash::of(old),
            space: self.space,
            size: old.len() as u64,
        };
        let sources = [OldSource {
            name: name.clone(),
            content: Arc::new(BytesSource(old.clone())),
        }];
        let in_place = self.space == Space::Stream;
        let (tree, outboard) = tree_of(new);
        let outline = if in_place {
            let (old, old_outboard) = tree_of(old);
            let changed = changed_groups((&old, &old_outboard), (&tree, &outboard)).unwrap();
            Outline::of_groups(tree.size, &changed)
        } else {
            Outline::unknown(new.len() as u64)
        };
        let similar = Similar::build(&sources, &SimilarOptions::default(), &())
            .unwrap()
            .unwrap();
        let hashed = Hashed {
            tree,
            outboard: &outboard,
        };
        let against = Against {
            hashed: in_place.then_some(hashed),
            outline: &outline,
            sources: &sources,
            similar: &similar,
            in_place,
        };
        let mut pack = Vec::new();
        let outputs = Outputs {
            pack: &mut pack,
            pack_outboard: Vec::new(),
            content_outboard: Vec::<u8>::new(),
        };
        let source = self.source(new);
        let encoded = encode_update(&source, &against, &self.options(), outputs, &()).unwrap();
        let root = name.root;
        let index = encoded.into_update_index(RootHash::of(new), Some(root), vec![name]);
        Layer {
            parent: Some(parent),
            target,
            index,
            pack,
        }
    }
}

/// A way to a version, from nothing on: layers' positions. Through each version at most once; any of those that there are.
fn way(layers: &[Layer], target: usize, seen: &mut Vec<usize>, rng: &mut impl Rng) -> Vec<usize> {
    seen.push(target);
    let fits = |layer: &&Layer| {
        layer.target == target && layer.parent.is_none_or(|parent| !seen.contains(&parent))
    };
    let mut choices: Vec<usize> = (0..layers.len()).filter(|i| fits(&&layers[*i])).collect();
    while !choices.is_empty() {
        let choice = choices.swap_remove(rng.random_range(0..choices.len()));
        let mut way = match layers[choice].parent {
            None => return vec![choice],
            Some(parent) if seen.contains(&parent) => continue,
            Some(parent) => self::way(layers, parent, seen, rng),
        };
        if !way.is_empty() {
            way.push(choice);
            return way;
        }
    }
    Vec::new()
}

fn open_way(layers: &[Layer], way: &[usize], cache_len: usize) -> Arc<LayerContent> {
    let packs = way.iter().map(|i| Pack::of(&layers[*i])).collect();
    open_packs(layers, way, packs, cache_len).pop().unwrap()
}

/// Opens all layers of a way, with packs of their own.
fn open_packs(
    layers: &[Layer],
    way: &[usize],
    packs: Vec<Pack>,
    cache_len: usize,
) -> Vec<Arc<LayerContent>> {
    let cache = LayerCache::new(&ReadOptions { cache_len });
    let mut all: Vec<Arc<LayerContent>> = Vec::new();
    for (i, pack) in way.iter().zip(packs) {
        let below = all.last().cloned();
        let sources = below.into_iter().map(|below| below as Arc<dyn Content>);
        let index = Arc::new(layers[*i].index.clone());
        let content = LayerContent::open(index, Arc::new(pack), sources.collect(), &cache);
        all.push(Arc::new(content.unwrap()));
    }
    all
}

/// A pack that notes which of its chunk groups are read.
#[derive(Clone)]
struct Pack {
    bytes: Vec<u8>,
    read: Arc<Mutex<GroupRanges>>,
}

impl Pack {
    fn of(layer: &Layer) -> Self {
        let (bytes, read) = (layer.pack.clone(), Arc::default());
        Self { bytes, read }
    }

    /// Nothing but these groups.
    fn only(mut self, groups: &GroupRanges) -> Self {
        for (group, bytes) in self.bytes.chunks_mut(GROUP_LEN as usize).enumerate() {
            if !groups.contains(group as u64) {
                bytes.fill(0xa5);
            }
        }
        self
    }
}

impl ReadAt for Pack {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        let groups = groups_touching(&(at..at + buf.len() as u64));
        self.read.lock().unwrap().insert(groups);
        self.bytes.read_at(at, buf)
    }
}

/// What the indexes say is read of each pack is what is read; and without the rest all is as before.
fn check_reach(
    layers: &[Layer],
    way: &[usize],
    plain: &[u8],
    how: &How,
) -> Result<(), TestCaseError> {
    let packs: Vec<Pack> = way.iter().map(|i| Pack::of(&layers[*i])).collect();
    let all = open_packs(layers, way, packs.clone(), how.cache_len);
    let top = all.last().unwrap();
    let reach = Reach::of(top, &()).unwrap();
    prop_assert!(
        packs
            .iter()
            .all(|pack| pack.read.lock().unwrap().is_empty())
    );
    restore_all(top, how.threads).unwrap();
    let groups: Vec<GroupRanges> = all.iter().map(|layer| reach.groups(layer)).collect();
    for (pack, groups) in packs.iter().zip(&groups) {
        prop_assert_eq!(&*pack.read.lock().unwrap(), groups);
    }
    let cut = packs.into_iter().zip(&groups);
    let cut = cut.map(|(pack, groups)| pack.only(groups)).collect();
    let without = open_packs(layers, way, cut, 0).pop().unwrap();
    let (restored, _) = restore_all(&without, how.threads).unwrap();
    prop_assert!(restored == plain);
    check_ranges(&without, plain, 7, 3);
    Ok(())
}

/// The tree of a version is that of its parent, where it is hashed again where its layer says that it differs.
fn check_changes(content: &LayerContent, plain: &[u8], versions: &[Vec<u8>]) {
    let parent = content.header().parent;
    let is_parent = |version: &&Vec<u8>| Some(RootHash::of(version)) == parent;
    let Some(old) = versions.iter().find(is_parent) else {
        return;
    };
    let changes = content.changes().unwrap();
    let (tree, outboard) = tree_of(old);
    let change = Change {
        size: content.len(),
        dirty: &changes.groups,
        zero: &changes.zero,
        in_place: false,
    };
    let mut made = Vec::<u8>::new();
    let tree = bao::update(&tree, &outboard, &change, &AsReadAt(content), &mut made).unwrap();
    assert_eq!(tree.root, RootHash::of(plain));
    assert!(made == tree_of(plain).1, "the outboard is the same");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_version_is_read_by_every_way(
        first in prop::collection::vec(stretch(), 1..8),
        later in prop::collection::vec((any::<Pick>(), edits()), 1..6),
        pairs in prop::collection::vec((any::<Pick>(), any::<Pick>()), 0..6),
        wholes in prop::collection::vec(any::<Pick>(), 0..2),
        how in hows(),
        seed: u64,
    ) {
        let mut versions = vec![TestSource::made_of(&first).bytes];
        let mut layers = vec![how.whole(&versions, 0)];
        // Each version is made of an earlier one, and reached from it; some from any other too, or from nothing.
        let mut pairs: Vec<_> = pairs.iter().map(|(a, b)| (a.index(later.len() + 1), b.index(later.len() + 1))).collect();
        for (base, edits) in &later {
            let base = base.index(versions.len());
            versions.push(edited(&versions[base], edits, how.pages));
            pairs.push((base, versions.len() - 1));
        }
        for (parent, target) in pairs {
            // Nothing leads from a content to itself.
            if versions[parent] != versions[target] {
                layers.push(how.update(&versions, parent, target));
            }
        }
        layers.extend(wholes.iter().map(|target| how.whole(&versions, target.index(versions.len()))));

        let mut rng = SmallRng::seed_from_u64(seed);
        for (target, plain) in versions.iter().enumerate() {
            for _ in 0..2 {
                let way = way(&layers, target, &mut Vec::new(), &mut rng);
                if way.is_empty() {
                    // The same as the one that it was made of, or reached only through versions that this way had seen.
                    continue;
                }
                let content = open_way(&layers, &way, how.cache_len);
                prop_assert_eq!(content.header().target, RootHash::of(plain));
                check_ranges(&content, plain, rng.next_u64(), 6);
                let (restored, root) = restore_all(&content, how.threads).unwrap();
                prop_assert!(restored == *plain, "version {} by {:?}", target, way);
                prop_assert_eq!(root, RootHash::of(plain));
                check_changes(&content, plain, &versions);
                check_reach(&layers, &way, plain, &how)?;
            }
        }
    }
}

// Several readers at once, with a cache that is too small for two of them: they wait for each other, but not for ever.
#[test]
fn a_chain_is_read_from_many_threads() {
    let how = How {
        pages: false,
        space: Space::Stream,
        earlier: false,
        frame_max: 8192,
        cache_len: 100_000,
        threads: 2,
    };
    let mut versions = vec![[text(1, 80_000), random(2, 30_000)].concat()];
    let mut layers = vec![how.whole(&versions, 0)];
    for number in 1..9usize {
        let mut next = versions[number - 1].clone();
        next.iter_mut()
            .step_by(700 + number)
            .for_each(|byte| *byte = byte.wrapping_add(1));
        next.splice(number * 9000..number * 9000, text(number as u64, 3000));
        versions.push(next);
        layers.push(how.update(&versions, number - 1, number));
    }
    let way: Vec<usize> = (0..layers.len()).collect();
    let content = open_way(&layers, &way, how.cache_len);
    let (content, plain) = (&*content, &versions[versions.len() - 1]);
    std::thread::scope(|scope| {
        for reader in 0..6 {
            scope.spawn(move || check_ranges(content, plain, reader, 12));
        }
    });
}

// Most of what a long history leaves in its first packs is reached by nothing any more.
#[test]
fn what_was_overwritten_is_not_reached_and_looking_can_be_stopped() {
    let how = How {
        pages: true,
        space: Space::Stream,
        earlier: false,
        frame_max: 32_768,
        cache_len: 0,
        threads: 1,
    };
    let first = random(1, 1 << 20);
    let mut second = first.clone();
    second[..900 << 10].copy_from_slice(&random(2, 900 << 10));
    let versions = [first, second];
    let layers = [how.whole(&versions, 0), how.update(&versions, 0, 1)];
    let packs = layers.iter().map(Pack::of).collect();
    let all = open_packs(&layers, &[0, 1], packs, 0);
    let reach = Reach::of(&all[1], &()).unwrap();
    let kept = reach.groups(&all[0]).bytes(1 << 20);
    assert!((124 << 10..300 << 10).contains(&kept), "{kept}");
    let whole = GroupRanges::all(layers[1].pack.len() as u64);
    assert_eq!(reach.groups(&all[1]), whole);
    assert!(reach.decoded() >= 1 << 20 && reach.frames() >= 32);

    struct Stopped;
    impl Progress for Stopped {
        fn cancelled(&self) -> bool {
            true
        }
    }
    let stopped = Reach::of(&all[1], &Stopped).unwrap_err();
    assert!(matches!(stopped, LayerError::Spent(Spent::Cancelled)));
}
