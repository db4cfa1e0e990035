//! Members that ask who has what, without end.

use std::time::Duration;

use capsule_proto::wire::Control;
use tokio::time::timeout;

use super::Raw;
use super::node::{Fleet, Start, content};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_given_at_a_rate() {
    let fleet = Fleet::new(1);
    let provider = Start::new(fleet.enrol()).go().await;
    let tree = provider.share(&content(1, 100_000)).await;
    let mut raw = Raw::join(&fleet.enrol(), provider.address()).await;
    (0..3000).for_each(|_| raw.say(&Control::SizeQuery { root: tree.root }));
    let mut answers = 0;
    while let Ok(heard) = timeout(Duration::from_secs(1), raw.hear()).await {
        let heard = heard.expect("who asks much is not cut off");
        answers += u32::from(matches!(heard, Control::Have { root, .. } if root == tree.root));
    }
    assert!((512..1500).contains(&answers), "{answers}");
}
