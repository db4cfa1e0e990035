//! Tests with members that speak the real protocol, and say in it whatever the test wants.
//!
//! They have a credential, our transport and our lanes, but neither engine nor scheduler; and they read no content.

mod asking;
#[path = "../../tests/network/node.rs"]
#[allow(dead_code, reason = "the network tests use more of it")]
mod node;
mod unread;

use std::net::SocketAddr;
use std::sync::Arc;

use capsule_proto::wire::{Control, Request};
use capsule_swarm_core::PeerKey;
use futures::StreamExt;
use libp2p::identity::Keypair;
use libp2p::swarm::{Config, Swarm, SwarmEvent};

use self::node::{Machine, NOW, Records, within};
use crate::address;
use crate::engine::NEVER_IDLE;
use crate::protocol::{self, Behaviour, Buffers, Event, Pace};
use crate::transport::{self, Gatekeeper, Sockets};

/// A member under the test's control.
struct Raw {
    swarm: Swarm<Behaviour>,
    key: PeerKey,
}

impl Raw {
    /// Connects to a node.
    async fn join(machine: &Machine, to: SocketAddr) -> Self {
        let identity = Keypair::ed25519_from_bytes(machine.key.secret()).unwrap();
        let local = identity.public().to_peer_id();
        let records = Arc::new(Records::new(machine));
        let gatekeeper = Arc::new(Gatekeeper::new(
            local,
            &machine.credential,
            records,
            Arc::new(|| NOW),
            String::new(),
            [],
        ));
        let sockets = Arc::new(Sockets::default());
        let transport = transport::build(&identity, gatekeeper.clone(), sockets.clone()).unwrap();
        // No content fits: it stops reading at the first.
        let behaviour = Behaviour::new(local, gatekeeper, Buffers::new(0), Pace::new(), sockets);
        let config = Config::with_tokio_executor().with_idle_connection_timeout(NEVER_IDLE);
        let mut swarm = Swarm::new(transport, behaviour, local, config);
        swarm.dial(address::to_multiaddr(to)).unwrap();
        let key = within(async {
            loop {
                if let SwarmEvent::Behaviour(Event::Connected(connected)) =
                    swarm.select_next_some().await
                {
                    return connected.key;
                }
            }
        })
        .await;
        Self { swarm, key }
    }

    fn say(&mut self, message: &Control) {
        let frame = protocol::control_frame(message);
        self.swarm.behaviour_mut().send(self.key, frame);
    }

    fn ask(&mut self, request: Request) {
        self.say(&Control::Request(request));
    }

    /// The next message but pings, which are answered: whoever reads no content is no less alive. `None` when the
    /// connection has ended.
    async fn hear(&mut self) -> Option<Control> {
        loop {
            match self.swarm.select_next_some().await {
                SwarmEvent::Behaviour(Event::Control { message, .. }) => match *message {
                    Control::Ping { nonce } => self.say(&Control::Pong { nonce }),
                    message => return Some(message),
                },
                SwarmEvent::Behaviour(Event::Disconnected { .. }) => return None,
                _ => {}
            }
        }
    }

    /// Lives on without the test; whether it is still connected then is told by the task's end.
    fn live(mut self) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move { while self.hear().await.is_some() {} })
    }
}
