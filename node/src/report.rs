//! Answers that only look: `ls`, `show`, `layers`, `status`, `peers`, `hashes`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use capsule_proto::credential::{Channels, Roles};
use capsule_proto::index::Space;
use capsule_proto::manifest::Manifest;
use capsule_proto::{CapsuleId, RootHash};
use capsule_swarm::{PeerId, PeerInfo};

use crate::control::{
    BanInfo, BlobStatus, ConnectedPeer, Failure, HashList, HeldHash, HolderInfo, LayerInfo,
    LayerList, Layers, Listed, ListedCapsule, Ls, NameInfo, NodeStatus, PeerList, Peers, ReadInfo,
    Show, Shown, TransferInfo,
};
use crate::follow;
use crate::held::{HeldWay, component_info, kind_word, space_word};
use crate::keep::{origin_word, pins_of};
use crate::node::{Node, conflicts};
use crate::records::{KnownLayer, KnownName};
use crate::store::{Ban, HeldCapsule};
use crate::work::blocking;

/// Bans listed by `status`: more than a person reads.
const MAX_BANS_SHOWN: usize = 32;

/// Lists capsules.
pub async fn ls(node: &Arc<Node>, request: Ls) -> Result<Listed, Failure> {
    let node = node.clone();
    blocking(move || {
        let names = node.records.all_names()?;
        let held: BTreeMap<CapsuleId, HeldCapsule> = node.store.capsules()?.into_iter().collect();
        let mut pins: BTreeMap<CapsuleId, Vec<String>> = BTreeMap::new();
        for (id, origin) in node.store.pins()? {
            pins.entry(id).or_default().push(origin_word(&origin));
        }
        let ids: BTreeSet<CapsuleId> = names
            .iter()
            .map(|name| name.capsule)
            .chain(held.keys().copied())
            .collect();
        let mut capsules = Vec::new();
        for capsule in ids {
            let mut own: Vec<&KnownName> = names
                .iter()
                .filter(|name| name.capsule == capsule)
                .collect();
            own.sort_by_key(|name| std::cmp::Reverse((name.issued, name.sequence)));
            let in_channel = |channel| own.iter().any(|name| name.name.channel == channel);
            let left_out = request
                .channel
                .clone()
                .is_some_and(|channel| !in_channel(channel));
            if left_out || (request.held && !held.contains_key(&capsule)) {
                continue;
            }
            let manifest = node.holdings.manifest(&capsule);
            capsules.push(ListedCapsule {
                capsule,
                names: own.iter().map(|name| name.name.to_string()).collect(),
                holding: node.holdings.holding(&capsule)?,
                content_bytes: manifest.as_ref().map(Manifest::content_size),
                stored_bytes: node
                    .holdings
                    .bytes_here(node.holdings.blobs_of(&capsule, &node.records)?),
                kinds: manifest
                    .iter()
                    .flat_map(|m| &m.components)
                    .map(|c| c.kind.word().to_owned())
                    .collect(),
                pins: pins.get(&capsule).cloned().unwrap_or_default(),
                conflict: own.iter().any(|name| conflicts(&names, name)),
                issued: own.first().map(|name| name.issued),
                added: held.get(&capsule).map(|held| held.added),
            });
        }
        capsules.sort_by(|a, b| {
            let key = |c: &ListedCapsule| (c.names.is_empty(), c.names.first().cloned());
            key(a).cmp(&key(b))
        });
        Ok(Listed { capsules })
    })
    .await
}

/// Shows one capsule.
pub async fn show(node: &Arc<Node>, request: Show) -> Result<Shown, Failure> {
    let (shared, reference) = (node.clone(), request.capsule);
    let mut shown = blocking(move || {
        let node = shared;
        let capsule = node.resolve(&reference)?.capsule;
        let manifest = node.holdings.manifest(&capsule);
        let names = node.records.names_for(&capsule)?;
        let manifest_bytes = manifest
            .as_ref()
            .map(|m| m.encode().len() as u64)
            .or(names.first().map(|n| n.manifest_size));
        Ok(Shown {
            capsule,
            names: names
                .iter()
                .map(|name| name_info(&node, name))
                .collect::<Result<_, Failure>>()?,
            holding: node.holdings.holding(&capsule)?,
            manifest_bytes,
            components: manifest
                .iter()
                .flat_map(|m| &m.components)
                .map(component_info)
                .collect(),
            content_bytes: manifest.as_ref().map(Manifest::content_size),
            layers: layers_of(&node, manifest.as_ref())?,
            stored_bytes: node
                .holdings
                .bytes_here(node.holdings.blobs_of(&capsule, &node.records)?),
            pins: pins_of(&node, &capsule)?,
            added: node.store.capsule(&capsule)?.map(|held| held.added),
            holders: Vec::new(),
        })
    })
    .await?;
    node.remember_names(&node.network.peers().await?);
    let holders = node.holders(&shown.capsule).into_iter();
    shown.holders = holders
        .map(|(peer, complete)| HolderInfo {
            peer: peer.to_string(),
            name: node.name_of(&peer),
            complete,
        })
        .collect();
    Ok(shown)
}

fn name_info(node: &Node, name: &KnownName) -> Result<NameInfo, Failure> {
    let of_channel = node.records.names_of(&name.name.channel)?;
    Ok(NameInfo {
        name: name.name.to_string(),
        capsule: name.capsule,
        sequence: name.sequence,
        issued: name.issued,
        expires: name.expires,
        signer: name.signer.to_string(),
        newest: of_channel
            .first()
            .is_some_and(|newest| newest.sequence == name.sequence),
        conflict: conflicts(&of_channel, name),
    })
}

/// Most layers listed: longer histories are cut at their far end.
const MAX_LISTED: usize = 4096;

/// Lists the layers by which a capsule can be come to, and those that lead to where they start.
pub async fn layers(node: &Arc<Node>, request: Layers) -> Result<LayerList, Failure> {
    let node = node.clone();
    blocking(move || {
        let capsule = node.resolve(&request.capsule)?.capsule;
        let manifest = node.holdings.manifest(&capsule);
        let layers = graph_of(&node, manifest.as_ref())?;
        Ok(LayerList {
            capsule,
            reads: reads_of(&node, manifest.as_ref(), &layers)?,
            layers,
        })
    })
    .await
}

/// Through which layers a manifest's components are read here.
fn reads_of(
    node: &Node,
    manifest: Option<&Manifest>,
    told: &[LayerInfo],
) -> Result<Vec<ReadInfo>, Failure> {
    let told: BTreeSet<RootHash> = told.iter().map(|layer| layer.index.root).collect();
    let mut reads = Vec::new();
    for component in manifest.iter().flat_map(|manifest| &manifest.components) {
        let (space, layers) = match node.holdings.way_to(component)? {
            Some(HeldWay::Layers(layers)) => (Space::Stream, layers),
            Some(HeldWay::Tree(way)) => (Space::Contents, way.contents),
            Some(HeldWay::Blob) | None => continue,
        };
        let own = layers.iter().filter(|layer| !told.contains(&layer.index));
        reads.push(ReadInfo {
            component: component.name.clone(),
            space: space_word(space).to_owned(),
            own: own.count(),
            layers: layers.len(),
        });
    }
    Ok(reads)
}

/// The layers that lead to a manifest's components.
fn layers_of(node: &Node, manifest: Option<&Manifest>) -> Result<Vec<LayerInfo>, Failure> {
    let mut layers = Vec::new();
    for component in manifest.iter().flat_map(|manifest| &manifest.components) {
        layers.extend(layers_to(node, &component.name, &component.root)?);
    }
    Ok(layers)
}

/// All that leads to a manifest's components, over any number of layers; the last layers first.
fn graph_of(node: &Node, manifest: Option<&Manifest>) -> Result<Vec<LayerInfo>, Failure> {
    let mut layers = Vec::new();
    for component in manifest.iter().flat_map(|manifest| &manifest.components) {
        let (mut seen, mut next) = (BTreeSet::new(), VecDeque::from([component.root]));
        while let Some(root) = next.pop_front() {
            if !seen.insert(root) {
                continue;
            }
            let found = layers_to(node, &component.name, &root)?;
            next.extend(found.iter().filter_map(|layer| layer.parent));
            layers.extend(found);
            if layers.len() >= MAX_LISTED {
                return Ok(layers);
            }
        }
    }
    Ok(layers)
}

fn layers_to(node: &Node, component: &str, root: &RootHash) -> Result<Vec<LayerInfo>, Failure> {
    let status = |blob: &capsule_proto::record::BlobRef| BlobStatus {
        root: blob.root,
        size: blob.size,
        have: node
            .store
            .durable(&blob.root)
            .map_or(0, |here| here.ranges.bytes(here.size)),
    };
    let known = node.records.layers_to(root)?.into_iter();
    let info = |known: KnownLayer| LayerInfo {
        component: component.to_owned(),
        parent: known.layer.parent,
        target: known.layer.target,
        space: space_word(known.layer.space).to_owned(),
        target_size: known.layer.target_size,
        index: status(&known.layer.index),
        pack: known.layer.pack.as_ref().map(status),
        order: known.sequence,
        signer: known.signer.to_string(),
        issued: known.issued,
    };
    Ok(known.map(info).collect())
}

/// Says how the node is.
pub async fn status(node: &Arc<Node>) -> Result<NodeStatus, Failure> {
    let peers = node.network.peers().await?;
    let totals = node.network.totals().await?;
    node.remember_names(&peers);
    let transfers = node
        .transfers
        .list()
        .into_iter()
        .map(|(capsule, progress)| TransferInfo { capsule, progress });
    let transfers = transfers.collect();
    let shared = node.clone();
    blocking(move || {
        let node = shared;
        let banned = node.store.bans(node.clock.now())?;
        let credential = &node.identity.credential;
        let grant = credential.grant();
        let capsules = node.store.capsules()?;
        let complete = capsules.iter().filter(|(_, held)| held.complete).count();
        let usage = node.store.usage();
        let free = rustix::fs::statvfs(node.home.dir())
            .map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        // Its own signature was checked when it was read; the name is in what was verified.
        let own = credential.verify(&credential.fleet(), grant.issued, &Default::default());
        Ok(NodeStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            home: node.home.dir().to_owned(),
            fleet: credential.fleet().to_string(),
            machine: credential.machine().to_string(),
            machine_name: own.map(|member| member.name).unwrap_or_default(),
            peer: node.network.local_peer().to_string(),
            roles: roles(&grant.roles),
            channels: match &grant.channels {
                Channels::All => None,
                Channels::Only(channels) => {
                    Some(channels.iter().map(ToString::to_string).collect())
                }
            },
            credential_expires: grant.expires,
            site: node.settings.site.clone(),
            listening: node
                .network
                .listening()
                .iter()
                .map(ToString::to_string)
                .collect(),
            uptime: node.started.elapsed().as_secs(),
            peers: peers.len(),
            banned: banned.len(),
            bans: bans(&node, banned),
            records: node.records.count(),
            capsules: complete,
            partial: capsules.len() - complete,
            store_bytes: usage.used,
            quota: usage.quota,
            free_bytes: free,
            sent_bytes: totals.all.sent,
            received_bytes: totals.all.received,
            transfers,
            follows: follow::list(&node)?,
            caps: node.rates.in_force(),
            troubles: node.troubles(),
        })
    })
    .await
}

/// Bans for people, the latest first; of very many, the earlier ones are left out.
fn bans(node: &Node, mut banned: Vec<(Vec<u8>, Ban)>) -> Vec<BanInfo> {
    banned.sort_by_key(|(_, ban)| std::cmp::Reverse(ban.until));
    let shown = banned.into_iter().filter_map(|(peer, ban)| {
        let peer = PeerId::from_bytes(&peer).ok()?;
        Some(BanInfo {
            peer: peer.to_string(),
            name: node.name_of(&peer),
            reason: ban.reason,
            until: ban.until,
        })
    });
    shown.take(MAX_BANS_SHOWN).collect()
}

fn roles(roles: &Roles) -> Vec<String> {
    let all = [(roles.publisher, "publisher"), (roles.admin, "admin")];
    all.into_iter()
        .filter(|(has, _)| *has)
        .map(|(_, word)| word.to_owned())
        .collect()
}

/// Lists connected peers.
pub async fn peers(node: &Arc<Node>, request: Peers) -> Result<PeerList, Failure> {
    let connected = node.network.peers().await?;
    node.remember_names(&connected);
    let mut peers: Vec<ConnectedPeer> = match request.have {
        None => connected.iter().map(connected_peer).collect(),
        Some(root) => {
            let mut having = Vec::new();
            for provider in node.network.providers(root).await? {
                let Some(peer) = connected.iter().find(|peer| peer.id == provider.peer) else {
                    continue;
                };
                let have = Some(provider.groups.bytes(provider.size));
                having.push(ConnectedPeer {
                    have,
                    have_of: Some(provider.size),
                    ..connected_peer(peer)
                });
            }
            having
        }
    };
    peers.sort_by(|a, b| (&a.name, &a.peer).cmp(&(&b.name, &b.peer)));
    Ok(PeerList { peers })
}

fn connected_peer(peer: &PeerInfo) -> ConnectedPeer {
    ConnectedPeer {
        peer: peer.id.to_string(),
        name: peer.member.name.clone(),
        machine: peer.member.machine.to_string(),
        roles: roles(&peer.member.grant.roles),
        address: peer.address.to_string(),
        site: Some(peer.site.clone()).filter(|site| !site.is_empty()),
        beyond: peer.beyond,
        dialled: peer.dialled,
        rtt: peer.rtt.map(|rtt| rtt.as_secs_f64()),
        rate_in: peer.rate_in,
        rate_out: peer.rate_out,
        bytes_in: peer.bytes_in,
        bytes_out: peer.bytes_out,
        blobs: peer.blobs,
        connected: peer.connected.as_secs(),
        have: None,
        have_of: None,
    }
}

/// Lists what is held and announced.
pub async fn hashes(node: &Arc<Node>) -> Result<HashList, Failure> {
    let totals: BTreeMap<_, _> = node.network.totals().await?.blobs.into_iter().collect();
    let store = node.store.clone();
    blocking(move || {
        let mut hashes = BTreeMap::new();
        let mut add = |root, kind: &str, size, have| {
            let totals = totals.get(&root).copied().unwrap_or_default();
            let (sent, received) = (totals.sent, totals.received);
            hashes.entry(root).or_insert(HeldHash {
                root,
                kind: kind.to_owned(),
                size,
                have,
                sent,
                received,
            });
        };
        for blob in store.blobs() {
            let have = blob.presence.ranges.bytes(blob.presence.size);
            if have > 0 || blob.presence.complete {
                add(blob.root, kind_word(blob.kind), blob.presence.size, have);
            }
        }
        for (root, component) in store.components() {
            let have = store
                .present(&root)
                .map_or(0, |here| here.ranges.bytes(here.size));
            add(root, "component", component.size, have);
        }
        Ok(HashList {
            hashes: hashes.into_values().collect(),
        })
    })
    .await
}
