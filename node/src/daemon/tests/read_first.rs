//! What is told of what is read first.

use std::ops::Range;

use capsule_proto::RootHash;
use capsule_proto::manifest::Component;
use capsule_proto::record::Layer;

use super::*;
use crate::control::{ByteRange, Prefetch};
use crate::disk::Disk;
use crate::held::{HeldWay, blobs_of, layer_blobs, make_the_same};
use crate::paging::{self, Opened, Paged};
use crate::publish::{prefetch, reorder};

pub(super) const PAGE: u64 = 4096;
/// What is stored of a page.
const STORED: u64 = 2048;

/// Tells that one page is read first; says whether that was published.
async fn tell(node: &Arc<Node>, component: RootHash, start: u64, renews: bool) -> bool {
    let told = Prefetch {
        component,
        ranges: vec![ByteRange {
            start,
            length: PAGE,
        }],
        renews,
    };
    prefetch(node, told).await.unwrap().ranges == 1
}

/// Where the page lies of which was told last.
fn newest(node: &Arc<Node>, component: RootHash) -> Option<u64> {
    let told = node.records.prefetch_of(&component).unwrap();
    told.map(|newest| newest.ranges[0].0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_word_holds_until_it_is_renewed() {
    let lab = lab().await;
    let (node, other) = (&lab.publisher.node, &lab.puller.node);
    let component = RootHash::of(b"memory");
    assert!(tell(node, component, 0, false).await);
    assert!(!tell(node, component, PAGE, false).await, "it is known");
    assert!(!tell(node, component, 0, true).await, "that is the same");
    assert_eq!(newest(node, component), Some(0));
    assert!(tell(node, component, PAGE, true).await);
    until(|| newest(other, component) == Some(PAGE)).await;
    assert!(!tell(node, component, 0, true).await, "that was replaced");
    for page in 2..8 {
        assert!(tell(node, component, PAGE * page, true).await);
    }
    assert!(
        !tell(node, component, PAGE * 8, true).await,
        "that is enough"
    );
    lab.stop().await;
}

/// Publishes a disk of frames of a page each; its component and content.
pub(super) async fn publish_pages(lab: &Lab) -> (RootHash, Vec<u8>) {
    let mut content = vec![0; 24 << 20];
    fill(&mut content);
    (publish_disk(lab, "lab:1", &content, PAGE).await, content)
}

/// Fills pages. What does not compress at all would be its own pack.
fn fill(pages: &mut [u8]) {
    pages.fill(7);
    for page in pages.chunks_mut(PAGE as usize) {
        crate::home::system_entropy(&mut page[..STORED as usize]);
    }
}

/// Publishes a disk of this content, in frames of at most so many bytes.
pub(super) async fn publish_disk(lab: &Lab, name: &str, content: &[u8], frame: u64) -> RootHash {
    let file = lab.temp.path().join("disk");
    fs::write(&file, content).unwrap();
    let request = Publish {
        read_as: PublishAs::Disk,
        frame_max: Some(frame as u32),
        ..Publish::of(file, name.parse().unwrap())
    };
    let silent = Reporter::silent();
    let published = crate::publish::publish(&lab.publisher.node, request, &silent);
    published.await.unwrap().components[0].root
}

/// Every sixteenth page, each in a chunk group of its own.
fn pages(from: u64) -> Vec<Range<u64>> {
    let page = |n: u64| (16 * n + from) * PAGE..(16 * n + from + 1) * PAGE;
    (0..256).map(page).collect()
}

async fn tell_pages(node: &Arc<Node>, component: RootHash, from: u64) {
    let range = |page: Range<u64>| ByteRange {
        start: page.start,
        length: PAGE,
    };
    let told = Prefetch {
        component,
        ranges: pages(from).into_iter().map(range).collect(),
        renews: true,
    };
    assert_eq!(prefetch(node, told).await.unwrap().ranges, 256);
}

/// Opens a capsule's disk and reads pages of it as they come; it stays open with what is returned.
async fn read_pages(
    node: &Arc<Node>,
    name: &str,
    pages: &[Range<u64>],
    content: &[u8],
) -> (Component, (Arc<Paged>, Opened)) {
    let name = CapsuleRef(name.into());
    let opened = paging::open(node, &name, None, &|_| {}).await.unwrap();
    let stream = opened.manifest().components[0].clone();
    let disk = Arc::new(opened.stream(&stream).await.unwrap());
    for page in pages {
        let read = disk.clone().read(page.clone(), Vec::new()).await.unwrap();
        assert!(read == content[page.start as usize..page.end as usize]);
    }
    (stream, (disk, opened))
}

/// The layers to a component as a node knows them, in the order in which they were made.
pub(super) fn orders(node: &Node, component: &RootHash) -> Vec<Layer> {
    let mut known = node.records.layers_to(component).unwrap();
    known.sort_by_key(|known| known.sequence);
    known.into_iter().map(|known| known.layer).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_told_to_be_read_first_lies_in_front_for_who_reads_it_while_it_comes() {
    let lab = lab().await;
    let (node, other) = (&lab.publisher.node, &lab.puller.node);
    let ordering = tokio::spawn(reorder::run(node.clone()));
    let (component, content) = publish_pages(&lab).await;
    tell_pages(node, component, 3).await;
    until(|| orders(other, &component).len() == 2).await;
    let all = orders(other, &component);
    assert!(make_the_same(&all[0], &all[1]));

    let (stream, open) = read_pages(other, "lab:1", &pages(3), &content).await;
    let here = |layer: &Layer| {
        let pack = layer.pack.map(|pack| pack.root);
        other.holdings.bytes_here(pack)
    };
    let (in_front, least) = (here(&all[1]), 256 * STORED);
    assert!((least..least * 5 / 4).contains(&in_front), "{in_front}");
    assert_eq!(here(&all[0]), 0);
    drop(open);
    // What came counts for who pulls the rest.
    lab.pull("lab:1").await.unwrap();
    let way = other.holdings.way_to(&stream).unwrap();
    assert_eq!(way, Some(HeldWay::Layers(vec![layer_blobs(&all[1])])));
    let out = lab.export("lab:1", "out").await.unwrap();
    assert!(fs::read(out).unwrap() == content);
    ordering.abort();
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_longer_frames_come_without_the_rest_of_these() {
    let lab = lab().await;
    let (node, other) = (&lab.publisher.node, &lab.puller.node);
    let ordering = tokio::spawn(reorder::run(node.clone()));
    let mut content = vec![0; 24 << 20];
    fill(&mut content);
    // An update, of which what is the same below does not go into it.
    let below = publish_disk(&lab, "lab:1", &content, 16 * PAGE).await;
    fill(&mut content[12 << 20..]);
    let component = publish_disk(&lab, "lab:2", &content, 16 * PAGE).await;
    tell_pages(node, component, 3).await;
    until(|| orders(other, &component).len() == 2).await;
    let all = orders(other, &component);
    assert_eq!(all[1].parent, Some(below));
    let packs = [&all[0], &all[1]].map(|layer| layer.pack.unwrap().size);
    let read_of_it = pages(3)
        .iter()
        .filter(|page| page.start >= 12 << 20)
        .count() as u64;
    // What is taken out of frames is not left in them.
    assert!(packs[1] < packs[0] + packs[0] / 100, "{packs:?}");

    let (_, open) = read_pages(other, "lab:2", &pages(3), &content).await;
    let here = other.holdings.bytes_here(all[1].pack.map(|pack| pack.root));
    assert!(here < read_of_it * STORED * 5 / 4, "{here}");
    drop(open);
    lab.pull("lab:2").await.unwrap();
    let out = lab.export("lab:2", "out").await.unwrap();
    assert!(fs::read(out).unwrap() == content);
    ordering.abort();
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_goes_on_with_the_order_that_a_reader_has_open() {
    let lab = lab().await;
    let (node, other) = (&lab.publisher.node, &lab.puller.node);
    let ordering = tokio::spawn(reorder::run(node.clone()));
    let (component, content) = publish_pages(&lab).await;
    tell_pages(node, component, 3).await;
    until(|| orders(other, &component).len() == 2).await;
    // One page: less than what binds whoever comes later.
    let (stream, open) = read_pages(other, "lab:1", &pages(3)[..1], &content).await;
    lab.pull("lab:1").await.unwrap();
    let last = layer_blobs(&orders(other, &component)[1]);
    let way = other.holdings.way_to(&stream).unwrap();
    assert_eq!(way, Some(HeldWay::Layers(vec![last])));
    ordering.abort();
    drop(open);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_pulls_all_takes_the_order_that_others_have_and_there_are_three_at_most() {
    let lab = lab().await;
    let (node, other) = (&lab.publisher.node, &lab.puller.node);
    let ordering = tokio::spawn(reorder::run(node.clone()));
    let (component, _) = publish_pages(&lab).await;
    for (from, count) in [(3, 2), (4, 3)] {
        tell_pages(node, component, from).await;
        until(|| orders(node, &component).len() == count).await;
    }
    // Time enough for a fourth.
    tell_pages(node, component, 5).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    until(|| orders(other, &component).len() == 3).await;
    // All of them stay.
    crate::keep::gc(node, Gc { dry_run: false }).await.unwrap();
    let all = orders(node, &component);
    for layer in &all {
        assert!(blobs_of(&[layer_blobs(layer)]).all(|blob| node.holdings.is_complete(&blob)));
    }
    lab.pull("lab:1").await.unwrap();
    let held = other.store.component(&component).unwrap();
    assert_eq!(held.recipe.layers, [layer_blobs(&all[0])]);
    ordering.abort();
    lab.stop().await;
}
