//! Capsules made by hand, with every right and as wrong as one likes: what a publisher's shelf is filled with.

use capsule_chunker::content::BytesSource;
use capsule_chunker::layer::encode::{Effort, EncodeOptions, Outputs, encode};
use capsule_proto::index::Space;
use capsule_proto::manifest::{Component, ComponentKind, Manifest};
use capsule_proto::record::{BlobRef, Body, Layer, Name};
use capsule_proto::{CapsuleId, RootHash};

use crate::hostile::Hostile;
use crate::member::Member;

/// What a layer leads to.
pub type Target = (Space, RootHash, u64);
/// An index and a pack.
pub type Encoded = (Vec<u8>, Vec<u8>);

/// What a publisher made by hand.
pub struct Shelf {
    publisher: Member,
    records: Vec<Vec<u8>>,
    blobs: Vec<Vec<u8>>,
    names: u64,
}

impl Shelf {
    /// An empty one, of a token that may publish in channel `lab`.
    pub fn of(token: &str, number: u8) -> Self {
        Self {
            publisher: Member::of(token, number),
            records: Vec::new(),
            blobs: Vec::new(),
            names: 0,
        }
    }

    /// Offers all of it at the address that the token names.
    pub fn open(self) -> Hostile {
        Hostile::with_records(self.publisher, self.records, self.blobs)
    }

    fn blob(&mut self, content: Vec<u8>) -> BlobRef {
        let blob = BlobRef {
            root: RootHash::of(&content),
            size: content.len() as u64,
        };
        self.blobs.push(content);
        blob
    }

    /// Names whatever this is a manifest of.
    pub fn name(&mut self, version: &str, manifest: Vec<u8>) {
        self.names += 1;
        let BlobRef { root, size } = self.blob(manifest);
        let name = Name {
            channel: "lab".parse().unwrap(),
            version: version.parse().unwrap(),
            capsule: CapsuleId(root),
            manifest_size: size,
        };
        let record = self.publisher.sign(self.names, Body::Name(name));
        self.records.push(record);
    }

    /// Says that a layer leads somewhere.
    pub fn layer(&mut self, (space, target, target_size): Target, (index, pack): Encoded) {
        let layer = Layer {
            space,
            parent: None,
            target,
            target_size,
            index: self.blob(index),
            pack: (!pack.is_empty()).then(|| self.blob(pack)),
        };
        let record = self.publisher.sign(0, Body::Layer(layer));
        self.records.push(record);
    }

    /// Names a file of that hash and length, to which this layer is said to lead.
    pub fn file(&mut self, version: &str, root: RootHash, size: u64, encoded: Encoded) {
        let component = component(ComponentKind::File, root, size, size);
        self.layer((Space::Stream, root, size), encoded);
        self.name(version, component);
    }

    /// Names a tree without contents, of whatever this is a listing of.
    pub fn tree(&mut self, version: &str, listing: &[u8]) {
        let (root, size) = (RootHash::of(listing), listing.len() as u64);
        self.layer((Space::Stream, root, size), encoded(listing, root));
        self.name(version, component(ComponentKind::Tree, root, size, 0));
    }
}

/// The manifest of a capsule of one component.
pub fn component(kind: ComponentKind, root: RootHash, size: u64, content_size: u64) -> Vec<u8> {
    let name = kind.word().to_owned();
    let component = Component {
        name,
        kind,
        root,
        size,
        content_size,
    };
    Manifest::new(vec![component]).unwrap().encode()
}

/// A layer as it should be, but for the hash that it says it leads to.
pub fn encoded(content: &[u8], root: RootHash) -> Encoded {
    let mut pack = Vec::new();
    let outputs = Outputs {
        pack: &mut pack,
        pack_outboard: Vec::new(),
        content_outboard: Vec::new(),
    };
    let options = EncodeOptions::new(ComponentKind::File, Effort::Fast);
    let encoded = encode(&BytesSource(content.to_vec()), &options, outputs, &()).unwrap();
    (encoded.into_index(root), pack)
}
