//! Gossip: which topics there are, and how gossipsub is bounded.
//!
//! Two topics. *Records* carries signed records as they are made; *status* what members hold, in short. Messages are
//! signed by their publisher's machine key, so that nobody speaks for another; whether what they say is right is checked
//! before they are passed on (`validate_messages`).
//!
//! Gossipsub's own repair, telling peers outside of the mesh which messages there were, is kept to the least: it would be most
//! of what idle nodes send, and whoever misses a record has it by anti-entropy.

use std::time::Duration;

use capsule_proto::RootHash;
use capsule_proto::record::MAX_RECORD_LEN;
use libp2p::gossipsub::{
    self, Behaviour, ConfigBuilder, IdentTopic, Message, MessageAuthenticity, MessageId,
    ValidationMode,
};
use libp2p::identity::Keypair;

/// Room for a record, or a status, and gossipsub's own fields and signature.
const MAX_MESSAGE: usize = MAX_RECORD_LEN + (4 << 10);
/// Messages waiting for one peer; a slow one misses some, which anti-entropy brings later.
const QUEUE_LEN: usize = 256;
/// Message ids told or asked for in one heartbeat by one peer.
const MAX_IDS: usize = 1024;
/// How long a message is remembered as seen.
const REMEMBERED: Duration = Duration::from_secs(120);

/// The topics.
pub struct Topics {
    pub records: IdentTopic,
    pub status: IdentTopic,
}

impl Topics {
    /// Connections stay within a fleet, so topics need not name it.
    pub fn new() -> Self {
        Self {
            records: IdentTopic::new("/capsule/records/1"),
            status: IdentTopic::new("/capsule/status/1"),
        }
    }
}

/// Gossipsub, subscribed to the topics.
pub fn behaviour(identity: &Keypair, topics: &Topics) -> Result<Behaviour, String> {
    let config = ConfigBuilder::default()
        .validation_mode(ValidationMode::Strict)
        .validate_messages()
        .message_id_fn(message_id)
        .max_transmit_size(MAX_MESSAGE)
        .duplicate_cache_time(REMEMBERED)
        .gossip_lazy(1)
        .gossip_factor(0.0)
        .history_gossip(1)
        .max_ihave_messages_heartbeat(16)
        .max_control_messages_sent(MAX_IDS)
        .connection_handler_queue_len(QUEUE_LEN)
        .build()
        .map_err(|error| error.to_string())?;
    let authenticity = MessageAuthenticity::Signed(identity.clone());
    let mut behaviour = Behaviour::new(authenticity, config).map_err(str::to_owned)?;
    for topic in [&topics.records, &topics.status] {
        behaviour
            .subscribe(topic)
            .map_err(|error| error.to_string())?;
    }
    Ok(behaviour)
}

/// By content: the same record published by two members is one message. A status carries its member and a sequence.
fn message_id(message: &gossipsub::Message) -> MessageId {
    let Message { topic, data, .. } = message;
    let topic = RootHash::of(topic.as_str().as_bytes());
    let data = RootHash::of(data);
    MessageId::from([&topic.as_bytes()[..8], &data.as_bytes()[..16]].concat())
}
