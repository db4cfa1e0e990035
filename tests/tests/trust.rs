//! Who may take part: strangers, other fleets, expired tokens, members without the role.

use std::fs;

use capsule_tests::{Fleet, Node, data};

#[test]
fn another_fleets_machine_never_reaches_a_protocol() {
    let fleet = Fleet::of(1);
    let mut stranger = Node::new(fleet.path("stranger"));
    stranger.init();
    stranger.start();
    // The other way round: a member of their fleet that is told to meet ours.
    let address = fleet[0].address().to_owned();
    let token = stranger.ok(&["fleet", "invite", "--addr", &address]);
    let mut visitor = Node::new(fleet.path("visitor"));
    visitor.ok(&["join", token.trim()]);
    visitor.start();
    visitor.wait_until("it was told why it is refused", |node| {
        node.json(&["status"])["troubles"]
            .as_array()
            .unwrap()
            .iter()
            .any(|t| t.as_str().unwrap().contains("fleet"))
    });
    assert_eq!(
        fleet[0].json(&["peers"])["peers"].as_array().unwrap().len(),
        0
    );
    assert_eq!(
        visitor.json(&["peers"])["peers"].as_array().unwrap().len(),
        0
    );
}

#[test]
fn an_expired_token_does_not_join_and_a_damaged_one_says_so() {
    let fleet = Fleet::of(1);
    let token = fleet.invite(&["--expires", "1s"]);
    std::thread::sleep(std::time::Duration::from_millis(2100));
    let late = Node::new(fleet.path("late"));
    let said = late.fails(1, &["join", &token]);
    assert!(said.contains("expired"), "{said}");
    let good = fleet.invite(&[]);
    let said = late.fails(1, &["join", &good[..good.len() - 5]]);
    assert!(said.contains("token"), "{said}");
}

#[test]
fn a_member_whose_credential_expires_is_let_go_and_refused_from_then_on() {
    let mut fleet = Fleet::of(1);
    let token = fleet.invite(&["--expires", "5s"]);
    let brief = fleet.join(&token);
    fleet[brief].wait_for_peers(1);
    // Though nothing was wrong with the connection when it was made.
    fleet[0].wait_until("the member is let go", |node| {
        node.json(&["status"])["peers"] == 0
    });
    let log = fleet[0].log();
    assert!(log.contains("cut off: the credential expired"), "{log}");
    fleet[brief].wait_until("it was told why it is refused", |node| {
        let status = node.json(&["status"]);
        status["troubles"].to_string().contains("expired")
    });
    assert_eq!(fleet[0].json(&["status"])["peers"], 0);
    fleet[brief].stop();
    let said = fleet[brief].fails(1, &["node", "--listen", "127.0.0.1:0"]);
    assert!(said.contains("expired"), "{said}");
}

#[test]
fn publishing_needs_the_role_and_the_channel() {
    let mut fleet = Fleet::of(2);
    let source = fleet.path("source");
    fs::write(&source, data::prose(1, 100_000)).unwrap();
    let path = source.to_str().unwrap().to_owned();
    let said = fleet[1].fails(1, &["publish", &path, "--name", "lab:1"]);
    assert!(said.contains("lab") || said.contains("publish"), "{said}");
    let token = fleet.invite(&["--role", "publisher", "--channel", "lab"]);
    let publisher = fleet.join(&token);
    fleet[publisher].wait_for_peers(1);
    fleet[publisher].fails(1, &["publish", &path, "--name", "other:1"]);
    let published = fleet[publisher].publish(&source, "lab:1");
    // All members with the grant publish as one.
    fleet[0].wait_until("the name has spread", |node| {
        node.run(&["show", "lab:1"]).code == Some(0)
    });
    fs::write(&source, data::prose(2, 100_000)).unwrap();
    assert!(
        fleet[0]
            .fails(1, &["publish", &path, "--name", "lab:1"])
            .contains("lab:1")
    );
    let second = fleet[0].publish(&source, "lab:2");
    fleet[1].wait_until("the newest is known", |node| {
        node.run(&["show", "lab"]).code == Some(0)
            && node.json(&["show", "lab"])["capsule"] == second["capsule"]
    });
    assert_eq!(
        fleet[1].json(&["pull", "lab:1"])["capsule"],
        published["capsule"]
    );
}
