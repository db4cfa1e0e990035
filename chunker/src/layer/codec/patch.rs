//! Patches: how a frame's content lies over its references, stretch by stretch, and what is new between the stretches.
//!
//! The steps are written down before the bytes, and compressed with them; see "Patch"
//! and "Patch of code" in `proto/docs/index.md`.

use capsule_proto::codec::{DecodeError, Reader, Writer};
use capsule_proto::index::Codec;

use super::FrameFault;
use super::lzma;
use super::moves::{Moves, Way, bytewise};

/// What of the content comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// So many bytes lie over the references' content.
    pub over: u32,
    /// So many behind them lie over nothing.
    pub new: u32,
    /// So far the place in the references' content then moves.
    pub seek: i32,
}

/// Compresses content against references by steps, which make all of it; none where steps take more than it. As code, if that
/// leaves less: the differences tell, so that nothing is compressed twice.
pub(super) fn encode(
    content: &[u8],
    references: &[u8],
    steps: &[Step],
) -> Result<Option<(Codec, Vec<u8>)>, FrameFault> {
    let mut control = Writer::default();
    for step in steps {
        control.varint(step.over.into());
        control.varint(step.new.into());
        control.signed(step.seek.into());
    }
    let mut bytes = control.finish();
    let control_len = bytes.len();
    if control_len > content.len() {
        return Ok(None);
    }
    let plain = difference(content, references, steps, None);
    let code = difference(content, references, steps, Some(Moves::new()));
    let (codec, difference) = if unequal(&code) < unequal(&plain) {
        (Codec::CodePatch, code)
    } else {
        (Codec::Patch, plain)
    };
    bytes.extend_from_slice(&difference);
    let mut packed = Writer::default();
    packed.varint(control_len as u64);
    packed.raw(&lzma::encode(&bytes, &[])?);
    Ok(Some((codec, packed.finish())))
}

/// What is left of content over references; where there are moves, as code.
fn difference(
    content: &[u8],
    references: &[u8],
    steps: &[Step],
    mut moves: Option<Moves>,
) -> Vec<u8> {
    let mut bytes = content.to_vec();
    let (mut at, mut old) = (0usize, 0usize);
    for step in steps {
        let over = step.over as usize;
        let under = &references[old..old + over];
        let new = &mut bytes[at..at + over];
        match &mut moves {
            Some(moves) => moves.pass(Way::Subtract, new, under, at, old),
            None => bytewise(Way::Subtract, new, under),
        }
        at += over + step.new as usize;
        old = (old + over).wrapping_add_signed(step.seek as isize);
    }
    bytes
}

fn unequal(difference: &[u8]) -> usize {
    difference.iter().filter(|byte| **byte != 0).count()
}

/// Makes exactly `len` bytes, as code where there are moves; the steps are at most as many.
pub(super) fn decode(
    packed: &[u8],
    references: &[u8],
    len: usize,
    mut moves: Option<Moves>,
) -> Result<Vec<u8>, FrameFault> {
    let mut head = Reader::new(packed);
    let control_len = head.varint("length of the steps", len as u64);
    let control_len =
        control_len.map_err(|_| FrameFault::Steps("they are longer than it"))? as usize;
    let mut control = lzma::decode(&packed[head.at()..], &[], control_len + len)?;
    let mut content = control.split_off(control_len);
    let mut control = Reader::new(&control);
    let (mut at, mut old) = (0usize, 0i64);
    while at < len {
        let step = take_step(&mut control).map_err(|_| FrameFault::Steps("they end before it"))?;
        let over = step.over as usize;
        let (from, under) = usize::try_from(old)
            .ok()
            .and_then(|old| Some((old, references.get(old..)?.get(..over)?)))
            .ok_or(FrameFault::Steps("they leave its references"))?;
        let bytes = content[at..]
            .get_mut(..over)
            .ok_or(FrameFault::Steps("they go on behind it"))?;
        match &mut moves {
            Some(moves) => moves.pass(Way::Add, bytes, under, at, from),
            None => bytewise(Way::Add, bytes, under),
        }
        at = at.saturating_add(over).saturating_add(step.new as usize);
        old += i64::from(step.over) + i64::from(step.seek);
    }
    if at > len || control.left() > 0 {
        return Err(FrameFault::Steps("they go on behind it"));
    }
    Ok(content)
}

fn take_step(control: &mut Reader<'_>) -> Result<Step, DecodeError> {
    Ok(Step {
        over: control.varint("over", u32::MAX.into())? as u32,
        new: control.varint("new", u32::MAX.into())? as u32,
        seek: take_seek(control)?,
    })
}

fn take_seek(control: &mut Reader<'_>) -> Result<i32, DecodeError> {
    let at = control.at();
    let seek = control.signed("seek")?;
    i32::try_from(seek).map_err(|_| control.invalid("seek", at, "it has more than 32 bits"))
}
