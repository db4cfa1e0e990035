#[allow(dead_code)]
#[path = "network/node.rs"]
mod node;
use node::*;
use std::time::{Duration, Instant};

fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let f: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let t: u64 = f[11].parse::<u64>().unwrap() + f[12].parse::<u64>().unwrap();
    eprint!("[u {} s {}] ", f[11], f[12]);
    Duration::from_millis(t * 10)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cpu_cost() {
    let fleet = Fleet::new(1);
    let publisher = Start::new(fleet.enrol()).go().await;
    let puller = Start::new(fleet.enrol()).to(&publisher).go().await;
    puller.connected(1).await;
    for mb in [8usize, 32, 512, 512] {
        let data = content(mb as u64 + rand_seed(), mb << 20);
        let tree = publisher.share(&data).await;
        drop(data);
        let (c, t) = (cpu(), Instant::now());
        let mut fetch = puller.net.fetch(capsule_swarm::FetchSpec::whole(tree.root, Some(tree.size))).await.unwrap();
        fetch.done().await.unwrap();
        let (c, t) = (cpu() - c, t.elapsed());
        eprintln!("{mb} MiB: {t:?} cpu {c:?} = {:.2} ns/B, {:.0} MB/s", c.as_nanos() as f64 / tree.size as f64, tree.size as f64 / 1e6 / t.as_secs_f64());
        puller.store.remove(&tree.root);
        publisher.store.remove(&tree.root);
    }
}
fn rand_seed() -> u64 { 5 }
