//! Members that break the protocol once they are in: cut off, each at its first wrong word, and nobody else notices.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use capsule_proto::ranges::{GroupRanges, Height, group_count};
use capsule_proto::record::RecordId;
use capsule_proto::wire::{Control, DataHeader, FrameKind, MAX_CONTROL_LEN, Request};
use capsule_proto::{GROUP_LEN, RootHash};
use capsule_tests::member::Member;
use capsule_tests::rogue::{self, Heard, Lane, Link, frame};
use capsule_tests::{Fleet, Node, data};
use futures::io::AsyncWriteExt;

/// How soon who breaks the protocol is cut off.
const SOON: Duration = Duration::from_secs(5);

/// A publisher of a capsule of noise, a member who wants it, and a rogue who knows its pack.
struct Scene {
    fleet: Fleet,
    rogue: Member,
    pack: RootHash,
    size: u64,
}

impl Scene {
    fn new(megabytes: u64) -> Self {
        let fleet = Fleet::of(2);
        let source = fleet.path("source");
        data::noise_file(&source, 71, megabytes << 20);
        fleet[0].publish(&source, "lab:1");
        let pack = fleet[0].json(&["show", "lab:1"])["layers"][0]["pack"].clone();
        let rogue = Member::of(&fleet.invite(&[]), 77);
        Self {
            fleet,
            rogue,
            pack: pack["root"].as_str().unwrap().parse().unwrap(),
            size: pack["size"].as_u64().unwrap(),
        }
    }

    async fn enter(&self) -> Link {
        self.enter_at(&self.fleet[0]).await
    }

    async fn enter_at(&self, node: &Node) -> Link {
        Link::enter(node.address(), &self.rogue.key, &self.rogue.credential)
            .await
            .unwrap_or_else(|error| panic!("{error}; log:\n{}", node.log()))
    }

    fn request(&self, id: u64, first: u64, count: u64) -> Control {
        Control::Request(Request {
            id,
            root: self.pack,
            size: self.size,
            groups: first..first + count,
            demand: false,
            compress: false,
            height: Height::ROOT,
        })
    }

    /// The member pulls, and gets out what went in.
    fn pull(&self, patience: Duration) {
        let (node, copy) = (&self.fleet[1], self.fleet.path("copy"));
        let started = Instant::now();
        node.ok(&["pull", "lab:1"]);
        let elapsed = started.elapsed();
        assert!(elapsed < patience, "the pull took {elapsed:?}");
        node.ok(&["export", "lab:1", "--to", copy.to_str().unwrap()]);
        assert!(fs::read(self.fleet.path("source")).unwrap() == fs::read(copy).unwrap());
    }
}

/// What is wrong, what is sent on which lane, and what the node says of it.
type Case = (&'static str, (Lane, Vec<u8>), &'static str);

fn control(message: &Control) -> (Lane, Vec<u8>) {
    (Lane::Control, frame(FrameKind::Control, &message.encode()))
}

/// What the node says of the connection that it cut off after `earlier` others: soon, as its log is written beside.
async fn word_of_cut(node: &Node, earlier: usize) -> String {
    let deadline = Instant::now() + SOON;
    loop {
        let log = node.log();
        let mut cuts = log.lines().filter(|line| line.contains("cut off"));
        match cuts.nth(earlier) {
            // Written to its end: whatever follows, the line is whole.
            Some(cut) if log.ends_with('\n') => return cut.to_owned(),
            _ => assert!(Instant::now() < deadline, "no word of it in\n{log}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_wrong_frame_ends_the_connection_and_no_other() {
    let scene = Scene::new(4);
    let node = &scene.fleet[0];
    scene.fleet[1].wait_for_peers(1);
    let started = Instant::now();
    let have = |size, groups: std::ops::Range<u64>| {
        control(&Control::Have {
            root: scene.pack,
            size,
            groups: GroupRanges::from(groups),
        })
    };
    let nobody = DataHeader {
        request: 5,
        groups: 1,
        compressed: false,
    };
    let data = |header: &[u8], len: usize| {
        let payload = [header, &vec![0; len]].concat();
        (Lane::Data, frame(FrameKind::Data, &payload))
    };
    let header = |len: u32, kind: u8| [&len.to_be_bytes()[..], &[kind]].concat();
    let ids = vec![RecordId(scene.pack); 16_385];
    let many = Control::RecordIds { ids, last: true };
    let twice = [
        control(&scene.request(7, 0, 64)).1,
        control(&scene.request(7, 64, 64)).1,
    ];
    let cases: Vec<Case> = vec![
        (
            "no message at all",
            (Lane::Control, frame(FrameKind::Control, &[])),
            "no known kind",
        ),
        (
            "noise for a message",
            (
                Lane::Control,
                frame(FrameKind::Control, &data::noise(1, 500)),
            ),
            "malformed",
        ),
        (
            "a message longer than any may be",
            (Lane::Control, header(MAX_CONTROL_LEN as u32 + 1, 0)),
            "beyond the bound",
        ),
        (
            "a message of four gigabytes",
            (Lane::Control, header(u32::MAX, 0)),
            "beyond the bound",
        ),
        (
            "content on the lane for messages",
            (Lane::Control, data(&nobody.encode(), 100).1),
            "wrong lane",
        ),
        (
            "a message on the lane for content",
            (Lane::Data, control(&Control::Ping { nonce: 1 }).1),
            "wrong lane",
        ),
        (
            "a frame of an unknown kind",
            (Lane::Data, header(100, 9)),
            "kinds are 0 and 1",
        ),
        (
            "content longer than any may be",
            (Lane::Data, header(2 << 20, 1)),
            "beyond the bound",
        ),
        (
            "content without its header",
            (Lane::Data, header(12, 1)),
            "has a header",
        ),
        (
            "content of no groups",
            data(&[0; 13], 100),
            "1 to 64 groups",
        ),
        (
            "content of too many groups",
            data(&[0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 65, 0], 100),
            "1 to 64 groups",
        ),
        (
            "content that nobody asked for",
            data(&nobody.encode(), 20_000),
            "not asked",
        ),
        (
            "an announcement of groups beyond the blob",
            have(GROUP_LEN * 3, 0..4),
            "within the blob",
        ),
        (
            "an announcement of a blob beyond all bounds",
            have(u64::MAX, 0..1),
            "within the blob",
        ),
        (
            "an announcement of nothing",
            have(GROUP_LEN, 0..0),
            "within the blob",
        ),
        (
            "a request of too much",
            control(&scene.request(1, 0, 65)),
            "1 to 64",
        ),
        (
            "a request beyond the blob",
            control(&scene.request(1, group_count(scene.size), 1)),
            "1 to 64",
        ),
        (
            "two requests of one number",
            (Lane::Control, twice.concat()),
            "still open",
        ),
        (
            "more ids of records than a message may have",
            control(&many),
            "beyond the bound",
        ),
        (
            "more records than a message may have",
            control(&Control::Records {
                records: vec![vec![1]; 257],
            }),
            "beyond the bound",
        ),
    ];
    for (number, (what, (lane, bytes), why)) in cases.into_iter().enumerate() {
        let mut link = scene.enter().await;
        // It may be cut off while it speaks.
        let _ = link.raw(lane, &bytes).await;
        assert!(link.is_cut_within(SOON).await, "{what} was let pass");
        let last = word_of_cut(node, number).await;
        assert!(last.contains(why), "{what}: {last}");
    }
    // Lanes opened twice; and more substreams than a connection may have.
    let mut link = scene.enter().await;
    let mut second = link.stream().await.unwrap();
    let _ = rogue::negotiate(&mut second, Lane::Control.protocol()).await;
    assert!(link.is_cut_within(SOON).await, "a lane was opened twice");
    let mut link = scene.enter().await;
    let mut streams = Vec::new();
    for _ in 0..200 {
        let Ok(mut stream) = link.stream().await else {
            break;
        };
        if stream.write_all(rogue::MULTISTREAM).await.is_err() {
            break;
        }
        streams.push(stream);
    }
    assert!(link.is_cut_within(SOON).await, "200 substreams were opened");

    let peers = node.json(&["peers"])["peers"].clone();
    let connected = peers[0]["connected"].as_u64().unwrap();
    assert!(
        connected + 1 >= started.elapsed().as_secs(),
        "the member's connection has stood all the while: {peers:#}"
    );
    assert_eq!(node.json(&["status"])["banned"], 0);
    scene.pull(Duration::from_secs(15));
}

/// What a rogue does with a request.
type Answer = fn(&Request) -> (DataHeader, Vec<u8>);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_asked_is_not_taken_for_an_answer() {
    let scene = Scene::new(8);
    let node = &scene.fleet[1];
    node.wait_for_peers(1);
    fn answer(id: u64, groups: u64, compressed: bool) -> (DataHeader, Vec<u8>) {
        let header = DataHeader {
            request: id,
            groups: groups as u32,
            compressed,
        };
        (header, data::noise(id, (groups * GROUP_LEN) as usize))
    }
    fn asked(request: &Request) -> u64 {
        request.groups.end - request.groups.start
    }
    // What it answers, and whether that is worse than a misunderstanding.
    let answers: [(&str, Answer, bool); 5] = [
        (
            "another number",
            |r| answer(r.id ^ 0x5555, asked(r), false),
            false,
        ),
        ("noise", |r| answer(r.id, asked(r), false), true),
        (
            "less than a group",
            |r| (answer(r.id, asked(r), false).0, vec![1; 100]),
            true,
        ),
        (
            "more groups",
            |r| answer(r.id, (asked(r) + 1).min(64), asked(r) == 64),
            true,
        ),
        ("compressed content", |r| answer(r.id, asked(r), true), true),
    ];
    let mut bans = 0;
    for (number, (what, answer, is_banned)) in answers.into_iter().enumerate() {
        let rogue = Member::of(&scene.fleet.invite(&[]), 120 + number as u8);
        let mut link = Link::enter(node.address(), &rogue.key, &rogue.credential)
            .await
            .unwrap();
        let have = Control::Have {
            root: scene.pack,
            size: scene.size,
            groups: GroupRanges::all(scene.size),
        };
        link.say(&have).await.unwrap();
        let mut pull = node.command(&["pull", "lab:1"]);
        let pull = pull.stdout(Stdio::null()).stderr(Stdio::null());
        let pulling = pull.spawn();
        let mut answered = 0;
        let talk = async {
            while let Some(heard) = link.hear().await {
                if let Heard::Control(Control::Request(request)) = heard {
                    let (header, content) = answer(&request);
                    answered += 1;
                    if link.answer(header, &content).await.is_err() {
                        break;
                    }
                }
            }
        };
        let cut = tokio::time::timeout(SOON * 3, talk).await;
        assert!(cut.is_ok() && answered > 0, "{what}: {answered} answers");
        let pulled = pulling.unwrap().wait().unwrap();
        assert!(pulled.success(), "{what}: the pull goes on with the others");
        bans += u64::from(is_banned);
        assert_eq!(node.json(&["status"])["banned"], bans, "{what}");
        let verified = node.json(&["verify"]);
        assert_eq!(verified["damaged_bytes"], 0, "{what}: {verified:#}");
        let again = Link::enter(node.address(), &rogue.key, &rogue.credential).await;
        assert_eq!(again.is_err(), is_banned, "{what}");
        // The next rogue is asked again.
        node.ok(&["rm", "lab:1", "--force"]);
    }
    scene.pull(Duration::from_secs(15));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_neither_reads_nor_ends_what_it_begins_is_cut_off() {
    let scene = Scene::new(24);
    let node = &scene.fleet[0];
    scene.fleet[1].wait_for_peers(1);
    let enter = async |number| {
        let rogue = Member::of(&scene.fleet.invite(&[]), number);
        Link::enter(node.address(), &rogue.key, &rogue.credential)
            .await
            .unwrap()
    };
    // One stops in the middle of a message, one in the middle of content, one asks for all and reads none of it,
    // one pings and never hears the answers.
    let mut message = enter(131).await;
    message
        .raw(Lane::Control, &[0, 0, 3, 232, 0, 1, 2, 3])
        .await
        .unwrap();
    let mut content = enter(132).await;
    content
        .raw(Lane::Data, &[0, 0, 3, 232, 1, 1, 2, 3])
        .await
        .unwrap();
    let mut greedy = enter(133).await;
    greedy.turn_deaf();
    for number in 0..group_count(scene.size) / 64 {
        greedy
            .say(&scene.request(number, number * 64, 64))
            .await
            .unwrap();
    }
    let mut chatty = enter(134).await;
    chatty.turn_deaf();
    let ping = frame(
        FrameKind::Control,
        &Control::Ping { nonce: u64::MAX }.encode(),
    );
    let pings = ping.repeat(4096);
    let chat = async {
        // Ten megabytes of answers: more than waits for anybody.
        for _ in 0..10 << 20 >> 16 {
            if chatty.raw(Lane::Control, &pings).await.is_err() {
                break;
            }
        }
        chatty.is_cut_within(SOON).await
    };
    let chatty_is_cut = chat.await;
    assert!(chatty_is_cut, "who does not hear the answers is cut off");
    // All of them hold on while a member pulls.
    scene.pull(Duration::from_secs(20));
    let memory = node.resident_bytes();
    assert!(memory < 200 << 20, "{memory} bytes of memory");
    for (what, link) in [
        ("half a message", &mut message),
        ("half a content", &mut content),
        ("a greedy one", &mut greedy),
    ] {
        let patience = Duration::from_secs(40);
        assert!(link.is_cut_within(patience).await, "{what} stays");
    }
}
