//! What encoding did, and how long its stages worked: figures for people, never for decisions.

use std::fmt;
use std::time::Duration;

/// What encoding did. Times are those of a stage at work, added up over its threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeStats {
    /// Bytes of the content.
    pub content: u64,
    /// Of these, zeros that no frame holds.
    pub zero: u64,
    /// Of these, repeats of what an earlier frame holds.
    pub repeated: u64,
    /// Of these, what the parent has at the same offset.
    pub inherited: u64,
    /// Of these, what a source has at another.
    pub copied: u64,
    /// Of these, what the frames hold.
    pub framed: u64,
    /// Of what the frames hold, what is compressed against sources.
    pub referring: u64,
    /// Number of frames.
    pub frames: u64,
    /// Bytes of the pack.
    pub pack: u64,
    /// Reading the source.
    pub reading: Duration,
    /// Cutting at content-defined places.
    pub cutting: Duration,
    /// Hashing spans and small files.
    pub hashing: Duration,
    /// Compressing, and hashing frames.
    pub compressing: Duration,
    /// Writing the pack and hashing it.
    pub writing: Duration,
}

impl EncodeStats {
    /// Bytes of the pack for a byte of content that is not zero; 1 where there is none.
    pub fn ratio(&self) -> f64 {
        match self.content - self.zero {
            0 => 1.0,
            data => self.pack as f64 / data as f64,
        }
    }
}

impl fmt::Display for EncodeStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        writeln!(
            f,
            "{:.1} MB ({:.1} zero, {:.1} repeated) -> {} frames, {:.1} MB (ratio {:.3})",
            mb(self.content),
            mb(self.zero),
            mb(self.repeated),
            self.frames,
            mb(self.pack),
            self.ratio()
        )?;
        let data = self.framed + self.repeated;
        let stages = [
            ("read", data, self.reading),
            ("cut", data, self.cutting),
            ("hash", data, self.hashing),
            ("compress", self.framed, self.compressing),
            ("write", self.pack, self.writing),
        ];
        for (i, (name, bytes, time)) in stages.into_iter().enumerate() {
            let rate = mb(bytes) / time.as_secs_f64().max(1e-9);
            write!(f, "{}{name} {rate:.0} MB/s", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}
