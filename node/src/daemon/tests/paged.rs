//! Capsules that are read while they come: of their indexes only what is read through comes too.

use std::os::unix::fs::FileExt;

use capsule_proto::{GROUP_LEN, RootHash};

use super::read_first::{PAGE, orders, publish_disk, publish_pages};
use super::*;
use crate::disk::Disk;
use crate::layers::{open_index, read_directory};
use crate::node::Node;
use crate::paging::{self, Opened, Paged};

async fn open(node: &Arc<Node>, name: &str) -> Opened {
    let name = CapsuleRef(name.into());
    paging::open(node, &name, None, &|_| {}).await.unwrap()
}

async fn disk(opened: &Opened) -> Arc<Paged> {
    let component = opened.manifest().components[0].clone();
    Arc::new(opened.stream(&component).await.unwrap())
}

/// Compares some pages.
async fn read(disk: &Arc<Paged>, content: &[u8], pages: impl Iterator<Item = u64>) {
    for page in pages {
        let range = page * PAGE..(page + 1) * PAGE;
        let read = disk.clone().read(range.clone(), Vec::new()).await.unwrap();
        assert!(read == content[range.start as usize..range.end as usize]);
    }
}

fn here(node: &Node, blob: &RootHash) -> u64 {
    node.holdings.bytes_here([*blob])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_long_index_comes_what_is_read_through_and_a_pull_fetches_the_rest() {
    let lab = lab().await;
    let node = &lab.puller.node;
    let (component, content) = publish_pages(&lab).await;
    let opened = open(node, "lab:1").await;
    let index = orders(node, &component)[0].index;
    let begun = here(node, &index.root);
    assert!(index.size > 80_000, "several pages: {}", index.size);
    assert!((1..index.size / 3).contains(&begun), "{begun}");
    let disk = disk(&opened).await;
    assert_eq!(here(node, &index.root), begun);
    // The first pages of frames, and not the others.
    read(&disk, &content, 0..64).await;
    let came = here(node, &index.root);
    assert!(
        came > begun && came <= begun + 3 * GROUP_LEN,
        "{begun} {came}"
    );
    // Many at a time, each of which may find a page of the index missing.
    let all = (0..content.len() as u64 / PAGE).step_by(7).map(|page| {
        let (disk, content) = (disk.clone(), &content);
        async move { read(&disk, content, page..page + 1).await }
    });
    futures::future::join_all(all).await;
    drop((disk, opened));
    // What came is not fetched again.
    let pulled = lab.pull("lab:1").await.unwrap();
    let pack = orders(node, &component)[0].pack.unwrap();
    assert!(pulled.fetched_bytes < pack.size + index.size - came);
    let out = lab.export("lab:1", "out").await.unwrap();
    assert!(fs::read(out).unwrap() == content);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_update_inherits_is_read_through_the_index_below_it() {
    let lab = lab().await;
    let node = &lab.puller.node;
    let (component, mut content) = publish_pages(&lab).await;
    content[10 << 20..(10 << 20) + 20_000].fill(1);
    let updated = publish_disk(&lab, "lab:2", &content, PAGE).await;
    until(|| !orders(node, &updated).is_empty()).await;
    let opened = open(node, "lab:2").await;
    let below = orders(node, &component)[0].index;
    let above = orders(node, &updated)[0].index;
    assert!(above.size < 10_000 && here(node, &above.root) == above.size);
    let begun = here(node, &below.root);
    assert!((1..below.size / 3).contains(&begun), "{begun}");
    let disk = disk(&opened).await;
    let pages = content.len() as u64 / PAGE;
    read(&disk, &content, (0..pages).step_by(400)).await;
    read(&disk, &content, (10 << 20) / PAGE..(10 << 20) / PAGE + 6).await;
    assert!(here(node, &below.root) > begun);
    drop((disk, opened));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_of_an_index_serves_after_a_restart_and_damage_of_it_comes_again() {
    let lab = lab().await;
    let (component, content) = publish_pages(&lab).await;
    let opened = open(&lab.puller.node, "lab:1").await;
    let disk = disk(&opened).await;
    read(&disk, &content, 0..1).await;
    let index = orders(&lab.puller.node, &component)[0].index;
    let came = here(&lab.puller.node, &index.root);
    drop((disk, opened));
    let home = lab.puller.node.home.clone();
    lab.puller.stop().await.unwrap();
    let puller = restart(&home).await;
    let node = &puller.node;
    assert_eq!(here(node, &index.root), came);

    let opened = open(node, "lab:1").await;
    let disk = self::disk(&opened).await;
    // The end of the first page of frames: hashes, which are found wrong only where they are compared.
    let name = index.root.to_string();
    let dir = home.store_dir().join("blobs").join(&name[..2]);
    let file = fs::File::options()
        .write(true)
        .open(dir.join(name + ".data"));
    let first = read_directory(&*open_index(&node.store, &index.root).unwrap()).unwrap();
    let first = first.frame_pages()[0];
    assert!(first.at + u64::from(first.len) > GROUP_LEN + 100);
    let spoiled = GROUP_LEN + 10;
    file.unwrap().write_all_at(&[0xa5; 4000], spoiled).unwrap();
    read(&disk, &content, 0..1024).await;
    assert!(node.store.verify(&index.root).unwrap().is_empty());
    drop((disk, opened));
    puller.stop().await.unwrap();
    lab.publisher.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_here_in_part_is_opened_and_read_without_anybody_else() {
    let lab = lab().await;
    let (component, content) = publish_pages(&lab).await;
    let opened = open(&lab.puller.node, "lab:1").await;
    let disk = disk(&opened).await;
    read(&disk, &content, 0..20).await;
    let index = orders(&lab.puller.node, &component)[0].index;
    drop((disk, opened));
    let home = lab.puller.node.home.clone();
    lab.publisher.stop().await.unwrap();
    lab.puller.stop().await.unwrap();
    let puller = restart(&home).await;
    let node = &puller.node;
    assert!(here(node, &index.root) < index.size);
    let opened = open(node, "lab:1").await;
    let disk = self::disk(&opened).await;
    read(&disk, &content, 0..20).await;
    drop((disk, opened));
    puller.stop().await.unwrap();
}
