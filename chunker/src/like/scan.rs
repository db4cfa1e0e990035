//! The spans of local content, cut as the encoder cuts.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;

use capsule_proto::FrameHash;
use capsule_proto::index::MAX_FRAME_LEN;
use rayon::prelude::*;

use crate::content::{Progress, Source};
use crate::layer::Cuts;
use crate::layer::encode::EncodeError;
use crate::layer::slabs::{Cutter, Piece, SLAB_LEN, SlabReader};

/// Slabs that are read while one is hashed.
const AHEAD: usize = 2;

/// Cuts content as other content of some size and longest frame was cut, and tells each span's hash and place, in order.
pub(super) fn spans(
    source: &dyn Source,
    (cuts, size, frame_max): (Cuts, u64, usize),
    progress: &dyn Progress,
    mut each: impl FnMut(&FrameHash, u64),
) -> Result<(), EncodeError> {
    let frame_max = frame_max.clamp(4 << 10, MAX_FRAME_LEN as usize);
    let cutter = Cutter::new(cuts, size, frame_max);
    let stop = AtomicBool::new(false);
    let mut reader = SlabReader::new(source, cutter, frame_max, progress, &stop);
    let (slabs, queue) = sync_channel(AHEAD);
    let (home, free) = sync_channel(AHEAD + 2);
    (0..AHEAD + 2).for_each(|_| home.try_send(Vec::new()).expect("there is room for each"));
    thread::scope(|scope| {
        let reading = scope.spawn(move || {
            loop {
                let Ok(mut buffer) = free.recv() else {
                    return Ok(());
                };
                buffer.resize(SLAB_LEN, 0);
                let Some(slab) = reader.next(buffer, &home)? else {
                    return Ok(());
                };
                // It fails when nobody wants more.
                if slabs.send(slab).is_err() {
                    return Ok(());
                }
            }
        });
        for slab in queue {
            let mut at = slab.range.start;
            let spans: Vec<_> = slab
                .pieces
                .iter()
                .filter_map(|piece| {
                    let start = at;
                    at += piece.len();
                    match *piece {
                        Piece::Span { at, len, .. } => Some((start, slab.bytes(at, len))),
                        _ => None,
                    }
                })
                .collect();
            let hashes: Vec<_> = spans
                .into_par_iter()
                .map(|(start, bytes)| (FrameHash::of(bytes), start))
                .collect();
            hashes.iter().for_each(|(hash, start)| each(hash, *start));
        }
        stop.store(true, Ordering::Relaxed);
        reading
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
