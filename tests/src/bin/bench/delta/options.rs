//! What `bench delta` is asked for, and what follows from it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::build::{FULL, Plan, Recipe, SMALL, Set};
use super::peers::Peer;

/// How long building one image may take.
const STEP: Duration = Duration::from_secs(2 * 3600);

/// What `bench delta` is asked for.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The large set: 8 GiB images of a desktop, instead of 2 GiB ones of a server.
    #[arg(long)]
    pub full: bool,
    /// Where images and package files are kept for later runs; `bench-delta` in the target directory by default.
    #[arg(long)]
    cache: Option<PathBuf>,
    /// Only build the images.
    #[arg(long)]
    build_only: bool,
    /// Build kernels without initial RAM disks: those change with each upgrade, and no package holds them.
    #[arg(long)]
    no_initrd: bool,
    /// Only these parts.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Part::ALL)]
    pub only: Vec<Part>,
    /// Only these other tools; by default all with --full, else those that the figures need but for zstd -19, and quick ones.
    #[arg(long, value_enum, value_delimiter = ',')]
    tools: Option<Vec<Peer>>,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// All packages upgraded, free blocks trimmed.
    Upgrade,
    /// The same as apt left it.
    Untrimmed,
    /// Large applications installed.
    Install,
    /// `/usr` of the upgrade, as a directory.
    Directory,
    /// A machine two versions behind.
    TwoSteps,
    /// An unchanged image published again.
    Republish,
    /// A thousand edits in a very large image.
    Scattered,
    /// A machine with no ancestor, but with another image of nearly the same packages.
    Hashing,
}

impl Part {
    const ALL: [Self; 8] = [
        Self::Upgrade,
        Self::Untrimmed,
        Self::Install,
        Self::Directory,
        Self::TwoSteps,
        Self::Republish,
        Self::Scattered,
        Self::Hashing,
    ];
}

impl Options {
    /// Which images.
    pub fn recipe(&self) -> &'static Recipe {
        if self.full { &FULL } else { &SMALL }
    }

    fn cache(&self) -> Result<PathBuf> {
        let cache = match &self.cache {
            Some(cache) => cache.clone(),
            None => {
                let me = std::env::current_exe()?;
                me.ancestors()
                    .nth(2)
                    .context("this program lies in a target directory")?
                    .join("bench-delta")
            }
        };
        std::fs::create_dir_all(&cache).with_context(|| format!("making {}", cache.display()))?;
        Ok(cache.canonicalize()?)
    }

    fn plan<'a>(&self, cache: &'a Path) -> Plan<'a> {
        Plan {
            cache,
            recipe: self.recipe(),
            initrd: !self.no_initrd,
            other: self.only.contains(&Part::Hashing),
            step: STEP,
        }
    }

    /// The other tools that are measured on a pair: in the small run those that the figures need, and what is quick.
    pub fn tools(&self, part: Part) -> Vec<Peer> {
        let chosen = match (&self.tools, self.full, part) {
            (Some(tools), ..) => &tools[..],
            (None, true, _) => &Peer::ALL,
            (None, false, Part::Upgrade) => &Peer::ALL_BUT_SLOWEST,
            (None, false, Part::Untrimmed) => &[Peer::Rsync, Peer::Xdelta3, Peer::Zstd3],
            (None, false, Part::Directory) => &[Peer::Rsync, Peer::Ostree],
            (None, false, _) => &[Peer::Zstd3],
        };
        let fits = |peer: &Peer| peer.takes(part == Part::Directory);
        chosen.iter().copied().filter(fits).collect()
    }

    /// Whether images have to be built, which takes the network.
    pub fn must_build(&self) -> Result<bool> {
        Ok(!self.plan(&self.cache()?).is_done())
    }

    /// The images, which were built before.
    pub fn set(&self) -> Result<Set> {
        Set::open(&self.cache()?, self.recipe(), !self.no_initrd)
    }

    /// Builds them.
    pub fn build(&self) -> Result<()> {
        self.plan(&self.cache()?).build()
    }

    /// Whether that is all.
    pub fn is_build_only(&self) -> bool {
        self.build_only
    }
}
