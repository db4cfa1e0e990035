//! Memory at hand: every transfer finds as much as it is going to fill.
//!
//! A virtual machine's host may take back what its guest has freed (free page reporting), and give it again at the first touch:
//! a file of 2 GiB was so written in 5 s instead of 0.5 s of the kernel's CPU time. Whether a tool met such memory hung on who had freed
//! how much just before. So memory is touched before a transfer begins, and freed as data crosses: a little ahead of it, since
//! what lies free for long, or is too much, is taken back at once.

use anyhow::{Context, Result};
use memmap2::{Advice, MmapMut};

/// Freed ahead of the data.
const AHEAD: u64 = 512 << 20;
/// Freed at a time.
const CHUNK: usize = 64 << 20;
const PAGE: usize = 4096;

/// Memory that was touched just now.
#[derive(Debug)]
pub struct Memory {
    chunks: Vec<MmapMut>,
    freed: u64,
}

impl Memory {
    /// Touches as much as so many bytes will take, but no more than half of what the machine has available.
    pub fn touch(bytes: u64) -> Result<Self> {
        let bytes = (bytes + AHEAD).min(capsule_tests::accounts::available_memory() / 2);
        let touched = |_| -> Result<MmapMut> {
            let mut chunk = MmapMut::map_anon(CHUNK)?;
            // In large pages, whose memory the kernel gives out again first; where it has none, that is a pity and no more.
            let _ = chunk.advise(Advice::HugePage);
            // Memory is only promised until it is written to.
            chunk.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
            Ok(chunk)
        };
        let chunks = (0..bytes.div_ceil(CHUNK as u64)).map(touched);
        let mut memory = Self {
            chunks: chunks
                .collect::<Result<_>>()
                .context("touching memory for the transfer")?,
            freed: 0,
        };
        memory.free_for(0);
        Ok(memory)
    }

    /// Frees what is needed until somewhat more than so many bytes have come.
    pub fn free_for(&mut self, bytes: u64) {
        while self.freed < bytes + AHEAD && self.chunks.pop().is_some() {
            self.freed += CHUNK as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_freed_ahead_of_the_data() {
        let mut memory = Memory::touch(128 << 20).unwrap();
        assert_eq!((memory.chunks.len(), memory.freed), (2, AHEAD));
        memory.free_for(64 << 20);
        assert_eq!(memory.chunks.len(), 1);
        memory.free_for(1 << 40);
        assert!(memory.chunks.is_empty());
    }
}
