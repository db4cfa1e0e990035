//! The multicast packets of LAN discovery: a small part of DNS-SD (RFC 6763) over multicast DNS (RFC 6762).
//!
//! A query asks for `PTR _TAG._sub._capsule._tcp.local`, where TAG stands for the fleet; an answer gives that
//! name an instance, `PEERID._capsule._tcp.local`, whose TXT strings are `a=ADDRESS:PORT`. So a fleet hears only
//! itself, and `avahi-browse` shows what is going on. Pure functions: sockets and timing are in `lan`.
//!
//! Packets come from anyone on the link: they are read within bounds, and what they say is only a hint where to
//! dial. Whoever answers there still has to pass admission.

use std::net::SocketAddr;

use libp2p::PeerId;

/// Largest packet made or read: fits an Ethernet frame.
pub const MAX_PACKET: usize = 1400;
/// Most addresses in one answer: a machine has few, and each is dialled.
pub const MAX_ADDRESSES: usize = 8;
/// Most records read of one packet.
const MAX_RECORDS: u16 = 32;
/// Most compression pointers followed in one name: a loop ends there.
const MAX_POINTERS: usize = 8;
/// Longest name (RFC 1035).
const MAX_NAME: usize = 255;
/// Seconds for which others may keep an answer (RFC 6762's value for records with host addresses).
const TTL: u32 = 120;

const TYPE_PTR: u16 = 12;
const TYPE_TXT: u16 = 16;
const CLASS_IN: u16 = 1;
const FLAGS_ANSWER: u16 = 0x8400;
const HEADER_LEN: usize = 12;
const SERVICE: [&[u8]; 3] = [b"_capsule", b"_tcp", b"local"];

/// Which fleet a packet concerns: 16 hex digits that do not reveal the fleet's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetTag(String);

impl FleetTag {
    /// Derives the tag of a fleet from its root public key.
    pub fn of(fleet: &[u8]) -> Self {
        let hash = capsule_proto::RootHash::of(&[b"capsule lan tag: ", fleet].concat());
        Self(hash.to_string()[..16].to_owned())
    }

    fn label(&self) -> Vec<u8> {
        format!("_{}", self.0).into_bytes()
    }
}

/// What a packet says that concerns our fleet.
#[derive(Debug, PartialEq, Eq)]
pub enum Packet {
    /// Somebody looks for members; the number tells senders apart.
    Query { nonce: u16 },
    /// A member says where it listens.
    Answer {
        peer: PeerId,
        addresses: Vec<SocketAddr>,
    },
}

/// The packet that asks who of the fleet is there.
pub fn encode_query(tag: &FleetTag, nonce: u16) -> Vec<u8> {
    let mut packet = header(nonce, 0, [1, 0, 0, 0]);
    put_name(&mut packet, &subtype(tag));
    put_u16s(&mut packet, &[TYPE_PTR, CLASS_IN]);
    packet
}

/// The packet that says where this node listens; at most [`MAX_ADDRESSES`] are told.
pub fn encode_answer(tag: &FleetTag, peer: &PeerId, addresses: &[SocketAddr]) -> Vec<u8> {
    let peer = peer.to_base58();
    let mut instance = vec![peer.as_bytes()];
    instance.extend(SERVICE);
    let mut pointer = Vec::new();
    put_name(&mut pointer, &instance);
    let mut text = Vec::new();
    for address in addresses.iter().take(MAX_ADDRESSES) {
        let entry = format!("a={address}");
        text.push(entry.len() as u8);
        text.extend(entry.as_bytes());
    }
    let mut packet = header(0, FLAGS_ANSWER, [0, 3, 0, 0]);
    put_record(&mut packet, &SERVICE, TYPE_PTR, &pointer);
    put_record(&mut packet, &subtype(tag), TYPE_PTR, &pointer);
    put_record(&mut packet, &instance, TYPE_TXT, &text);
    packet
}

/// Reads a packet; `None` if it is malformed or does not concern this fleet.
pub fn decode(packet: &[u8], tag: &FleetTag) -> Option<Packet> {
    if packet.len() > MAX_PACKET {
        return None;
    }
    let word = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    let is_answer = word(2)? & 0x8000 != 0;
    let questions = word(4)?.min(MAX_RECORDS);
    let records = word(6)?
        .saturating_add(word(8)?)
        .saturating_add(word(10)?)
        .min(MAX_RECORDS);
    let wanted = join(&subtype(tag));
    let mut at = HEADER_LEN;
    for _ in 0..questions {
        let (name, next) = read_name(packet, at)?;
        let kind = word(next)?;
        let _class = word(next + 2)?;
        if !is_answer && name == wanted && kind == TYPE_PTR {
            return Some(Packet::Query { nonce: word(0)? });
        }
        at = next + 4;
    }
    if !is_answer {
        return None;
    }
    let (mut instance, mut texts) = (None, Vec::new());
    for _ in 0..records {
        let (name, next) = read_name(packet, at)?;
        let (kind, len) = (word(next)?, usize::from(word(next + 8)?));
        let data = next + 10;
        match kind {
            TYPE_PTR if name == wanted => instance = Some(read_name(packet, data)?.0),
            TYPE_TXT => texts.push((name, packet.get(data..data + len)?)),
            _ => {}
        }
        at = data + len;
    }
    let instance = instance?;
    let text = texts.iter().find(|(name, _)| *name == instance)?.1;
    let label = instance.split(|&b| b == b'.').next()?;
    let peer = std::str::from_utf8(label).ok()?.parse().ok()?;
    Some(Packet::Answer {
        peer,
        addresses: read_addresses(text),
    })
}

fn read_addresses(mut text: &[u8]) -> Vec<SocketAddr> {
    let mut addresses = Vec::new();
    while let Some((&len, rest)) = text.split_first() {
        let Some((entry, after)) = rest.split_at_checked(usize::from(len)) else {
            break;
        };
        text = after;
        let address: Option<SocketAddr> = std::str::from_utf8(entry)
            .ok()
            .and_then(|e| e.strip_prefix("a=")?.parse().ok());
        if addresses.len() < MAX_ADDRESSES {
            addresses.extend(address);
        }
    }
    addresses
}

fn subtype(tag: &FleetTag) -> Vec<Vec<u8>> {
    let mut labels = vec![tag.label(), b"_sub".to_vec()];
    labels.extend(SERVICE.map(<[u8]>::to_vec));
    labels
}

fn header(id: u16, flags: u16, counts: [u16; 4]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(512);
    put_u16s(&mut packet, &[id, flags]);
    put_u16s(&mut packet, &counts);
    packet
}

fn put_u16s(packet: &mut Vec<u8>, words: &[u16]) {
    words
        .iter()
        .for_each(|word| packet.extend(word.to_be_bytes()));
}

fn put_name<L: AsRef<[u8]>>(packet: &mut Vec<u8>, labels: &[L]) {
    for label in labels {
        packet.push(label.as_ref().len() as u8);
        packet.extend(label.as_ref());
    }
    packet.push(0);
}

fn put_record<L: AsRef<[u8]>>(packet: &mut Vec<u8>, name: &[L], kind: u16, data: &[u8]) {
    put_name(packet, name);
    put_u16s(packet, &[kind, CLASS_IN]);
    packet.extend(TTL.to_be_bytes());
    put_u16s(packet, &[data.len() as u16]);
    packet.extend(data);
}

fn join<L: AsRef<[u8]>>(labels: &[L]) -> Vec<u8> {
    labels
        .iter()
        .map(AsRef::as_ref)
        .collect::<Vec<_>>()
        .join(&b'.')
}

/// Reads a possibly compressed name: its labels joined by dots, and where it ends.
fn read_name(packet: &[u8], start: usize) -> Option<(Vec<u8>, usize)> {
    let (mut name, mut at, mut end, mut pointers) = (Vec::new(), start, None, 0);
    loop {
        let len = usize::from(*packet.get(at)?);
        if len & 0xc0 == 0xc0 {
            end = end.or(Some(at + 2));
            at = (len & 0x3f) << 8 | usize::from(*packet.get(at + 1)?);
            pointers += 1;
        } else if len == 0 {
            return Some((name, end.unwrap_or(at + 1)));
        } else {
            if !name.is_empty() {
                name.push(b'.');
            }
            name.extend(packet.get(at + 1..at + 1 + len)?);
            at += 1 + len;
        }
        if pointers > MAX_POINTERS || name.len() > MAX_NAME {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (FleetTag, PeerId, Vec<SocketAddr>) {
        let addresses = ["10.0.0.7:4001", "[fe80::1]:4001"]
            .map(|a| a.parse().unwrap())
            .to_vec();
        (FleetTag::of(b"fleet"), PeerId::random(), addresses)
    }

    #[test]
    fn packets_round_trip_within_their_fleet_only() {
        let (tag, peer, addresses) = sample();
        let (query, answer) = (
            encode_query(&tag, 7),
            encode_answer(&tag, &peer, &addresses),
        );
        assert_eq!(decode(&query, &tag), Some(Packet::Query { nonce: 7 }));
        assert_eq!(
            decode(&answer, &tag),
            Some(Packet::Answer { peer, addresses })
        );
        let other = FleetTag::of(b"another fleet");
        assert_eq!(decode(&query, &other), None);
        assert_eq!(decode(&answer, &other), None);
    }

    #[test]
    fn packets_are_those_of_the_document() {
        const DOC: &str = include_str!("../../docs/lan.md");
        let golden = |name: &str| {
            let start = DOC.split(&format!("```golden {name}\n")).nth(1).unwrap();
            let digits: String = start
                .split("```")
                .next()
                .unwrap()
                .split_whitespace()
                .collect();
            (0..digits.len() / 2)
                .map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).unwrap())
                .collect::<Vec<u8>>()
        };
        let (tag, _, addresses) = sample();
        let peer = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
            .parse()
            .unwrap();
        assert_eq!(encode_query(&tag, 7), golden("query"));
        assert_eq!(encode_answer(&tag, &peer, &addresses), golden("answer"));
    }

    #[test]
    fn the_longest_answer_fits_a_packet() {
        let (tag, peer, _) = sample();
        let long: SocketAddr = "[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535"
            .parse()
            .unwrap();
        let answer = encode_answer(&tag, &peer, &[long; 20]);
        assert!(answer.len() <= MAX_PACKET, "{}", answer.len());
        let addresses = vec![long; MAX_ADDRESSES];
        assert_eq!(
            decode(&answer, &tag),
            Some(Packet::Answer { peer, addresses })
        );
    }

    #[test]
    fn every_truncation_and_bit_flip_is_survived() {
        let (tag, peer, addresses) = sample();
        for packet in [
            encode_query(&tag, 7),
            encode_answer(&tag, &peer, &addresses),
        ] {
            for len in 0..packet.len() {
                assert_eq!(decode(&packet[..len], &tag), None, "cut to {len}");
            }
            for bit in 0..packet.len() * 8 {
                let mut damaged = packet.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                let _survived = decode(&damaged, &tag);
            }
        }
    }

    #[test]
    fn a_loop_of_pointers_ends() {
        let mut packet = header(0, 0, [1, 0, 0, 0]);
        packet.extend([0xc0, 12]);
        assert_eq!(decode(&packet, &FleetTag::of(b"fleet")), None);
    }
}
