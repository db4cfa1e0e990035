//! Patches: how a frame's content lies over its references, stretch by stretch, and what is new between the stretches.
//!
//! The steps are written down before the bytes, and compressed with them; see "Patch" in `proto/docs/index.md`.

use capsule_proto::codec::{DecodeError, Reader, Writer};

use super::FrameFault;
use super::lzma;

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

/// Compresses content against references by steps, which make all of it; none where steps take more than it.
pub(super) fn encode(
    content: &[u8],
    references: &[u8],
    steps: &[Step],
) -> Result<Option<Vec<u8>>, FrameFault> {
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
    bytes.extend_from_slice(content);
    let (mut at, mut old) = (control_len, 0usize);
    for step in steps {
        let over = step.over as usize;
        let under = &references[old..old + over];
        for (byte, old) in bytes[at..at + over].iter_mut().zip(under) {
            *byte = byte.wrapping_sub(*old);
        }
        at += over + step.new as usize;
        old = (old + over).wrapping_add_signed(step.seek as isize);
    }
    let mut packed = Writer::default();
    packed.varint(control_len as u64);
    packed.raw(&lzma::encode(&bytes, &[])?);
    Ok(Some(packed.finish()))
}

/// Makes exactly `len` bytes; the steps are at most as many.
pub(super) fn decode(packed: &[u8], references: &[u8], len: usize) -> Result<Vec<u8>, FrameFault> {
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
        let under = usize::try_from(old)
            .ok()
            .and_then(|old| references.get(old..)?.get(..over))
            .ok_or(FrameFault::Steps("they leave its references"))?;
        let bytes = content[at..]
            .get_mut(..over)
            .ok_or(FrameFault::Steps("they go on behind it"))?;
        for (byte, old) in bytes.iter_mut().zip(under) {
            *byte = byte.wrapping_add(*old);
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
