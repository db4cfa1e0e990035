//! Patches: how a frame's content lies over its references, stretch by stretch, and what is new between the stretches.
//!
//! The steps are written down before the bytes, and compressed with them; see "Patch" in `proto/docs/index.md`.

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
    let mut bytes = Vec::with_capacity(content.len() + 4 * steps.len());
    for step in steps {
        push_varint(&mut bytes, step.over);
        push_varint(&mut bytes, step.new);
        push_varint(&mut bytes, ((step.seek << 1) ^ (step.seek >> 31)) as u32);
    }
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
    let mut packed = Vec::new();
    push_varint(&mut packed, control_len as u32);
    packed.extend(lzma::encode(&bytes, &[])?);
    Ok(Some(packed))
}

/// Makes exactly `len` bytes; the steps are at most as many.
pub(super) fn decode(packed: &[u8], references: &[u8], len: usize) -> Result<Vec<u8>, FrameFault> {
    let mut stream = packed;
    let control_len = take_varint(&mut stream)
        .map(|control_len| control_len as usize)
        .filter(|control_len| *control_len <= len)
        .ok_or(FrameFault::Steps("they are longer than it"))?;
    let mut control = lzma::decode(stream, &[], control_len + len)?;
    let mut content = control.split_off(control_len);
    let mut control = control.as_slice();
    let (mut at, mut old) = (0usize, 0i64);
    while at < len {
        let step = take_step(&mut control).ok_or(FrameFault::Steps("they end before it"))?;
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
    if at > len || !control.is_empty() {
        return Err(FrameFault::Steps("they go on behind it"));
    }
    Ok(content)
}

fn take_step(control: &mut &[u8]) -> Option<Step> {
    let (over, new, seek) = (
        take_varint(control)?,
        take_varint(control)?,
        take_varint(control)?,
    );
    Some(Step {
        over,
        new,
        seek: (seek >> 1) as i32 ^ -((seek & 1) as i32),
    })
}

fn push_varint(bytes: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// Seven bits a byte, the lowest first, at most 32 of them.
fn take_varint(bytes: &mut &[u8]) -> Option<u32> {
    let mut value = 0u64;
    for shift in (0..35).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return u32::try_from(value).ok();
        }
    }
    None
}
