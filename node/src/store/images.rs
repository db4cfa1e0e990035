//! Which images on this machine have the content of which component: noted when they are published or written here, so that an
//! image upon one of them need not be read where it changed nothing.
//!
//! A hint of bounded length, newest last: what is forgotten is read and hashed.

use capsule_proto::RootHash;
use capsule_proto::codec::{DecodeError, Reader, Writer};
use positioned_io::WriteAt;
use redb::ReadableTable;

use super::Store;
use super::error::DatabaseError;
use super::meta::VALUES;
use super::rows::Row;

const KEY: &str = "images";
/// More than a commit adds to the database.
const PROBE: usize = 1 << 20;
/// Most images remembered: their row has half of the longest value's bytes then.
const MAX_IMAGES: usize = 512;

/// Images by a hash of what recognises them, and the roots of their content.
#[derive(Debug, Default, PartialEq, Eq)]
struct Images(Vec<(RootHash, RootHash)>);

impl Row for Images {
    const TABLE: &'static str = "values";

    fn write(&self, out: &mut Writer) {
        out.list(&self.0, |out, (image, content)| {
            out.hash(image);
            out.hash(content);
        });
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let images = input.list("images", MAX_IMAGES, 64, |input| {
            Ok((input.hash("image")?, input.hash("content")?))
        })?;
        Ok(Self(images))
    }
}

impl Images {
    /// What cannot be read is forgotten.
    fn of(value: Option<&[u8]>) -> Self {
        value
            .and_then(|bytes| Self::decode(bytes).ok())
            .unwrap_or_default()
    }

    fn note(&mut self, image: RootHash, content: RootHash) {
        self.0.retain(|(known, _)| *known != image);
        let over = (self.0.len() + 1).saturating_sub(MAX_IMAGES);
        self.0.drain(..over);
        self.0.push((image, content));
    }
}

impl Store {
    /// Notes what has the content of a component; not where the disk is full, as exports write nothing there then.
    pub fn note_images(&self, images: &[RootHash], content: RootHash) -> Result<(), DatabaseError> {
        if images.is_empty() || !self.has_room() {
            return Ok(());
        }
        self.inner.meta.write(|tx| {
            let mut table = tx.open_table(VALUES)?;
            let mut known = Images::of(table.get(KEY)?.as_ref().map(|value| value.value()));
            images.iter().for_each(|image| known.note(*image, content));
            table.insert(KEY, &known.encode()[..])?;
            Ok(())
        })
    }

    /// Whether a commit will find room: one that does not is dear, as the database is opened anew after it.
    fn has_room(&self) -> bool {
        self.scratch()
            .is_ok_and(|mut probe| probe.write_all_at(0, &[1; PROBE]).is_ok())
    }

    /// The component whose content an image has, where that is known.
    pub fn image(&self, image: &RootHash) -> Result<Option<RootHash>, DatabaseError> {
        let images = Images::of(self.value(KEY)?.as_deref());
        let found = images.0.iter().find(|(known, _)| known == image);
        Ok(found.map(|(_, content)| *content))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_kept_and_the_bytes_stay() {
        let hash = |n: usize| RootHash::of(&n.to_le_bytes());
        let mut images = Images::default();
        for n in 0..MAX_IMAGES + 3 {
            images.note(hash(n), hash(n + 1));
        }
        images.note(hash(5), hash(7));
        assert_eq!(images.0.len(), MAX_IMAGES);
        assert_eq!(images.0[0], (hash(3), hash(4)));
        assert_eq!(images.0.last(), Some(&(hash(5), hash(7))));
        let few = Images(vec![(
            RootHash::from_bytes([1; 32]),
            RootHash::from_bytes([2; 32]),
        )]);
        assert_eq!(few.encode(), [&[1, 1][..], &[1; 32], &[2; 32]].concat());
        assert_eq!(Images::of(Some(&few.encode())), few);
        assert_eq!(Images::of(Some(&[2, 1])), Images::default());
        assert!(images.encode().len() <= super::super::MAX_VALUE_LEN);
    }
}
