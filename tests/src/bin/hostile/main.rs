//! A member of a fleet that misbehaves as it is told to, or a stranger at its door: what labs set beside real nodes.
//!
//! It says `peer ID` (of members), then `ready` once it is connected; it ends after the given time, or when its standard input does.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use capsule_proto::credential::MachineKey;
use capsule_tests::hostile::by_hand::{self, Trouble};
use capsule_tests::hostile::{Held, Hostile, Part, Vice};
use capsule_tests::member::Member;
use capsule_tests::rogue;
use clap::Parser;
use libp2p::identity::Keypair;
use tokio::time::Instant;

/// Connections that it waits for, and how long.
const CONNECTIONS: usize = 4;
const COMING_IN: Duration = Duration::from_secs(30);
/// Largest blob: it is held in memory.
const MAX_BLOB: u64 = 1 << 30;
/// Most blobs.
const MAX_BLOBS: usize = 64;

/// Joins a fleet, announces blobs, and misbehaves.
#[derive(Parser)]
struct Args {
    /// How it misbehaves.
    part: Part,
    /// Where its key is kept, so that it is the same member again.
    #[arg(long)]
    home: PathBuf,
    /// What it joins with; strangers need none.
    #[arg(long, default_value = "")]
    token: String,
    /// Where it listens, if it acts as a node does: to lie, corrupt or stall.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Nodes that it goes to, if it acts by hand.
    #[arg(long)]
    at: Vec<String>,
    /// Blobs that it announces: files with their content.
    #[arg(long)]
    blob: Vec<PathBuf>,
    /// How many answers of a hundred have wrong bytes, where it lies or corrupts.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u8).range(..=100))]
    percent: u8,
    /// Decides what is left to chance.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// When it ends by itself.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(
        args.blob.len() <= MAX_BLOBS,
        "give at most {MAX_BLOBS} blobs"
    );
    end_with_input();
    let vice = match args.part {
        Part::Lie => Vice::Lies {
            percent: args.percent,
        },
        Part::Corrupt => Vice::Corrupts {
            percent: args.percent,
        },
        Part::Stall => Vice::Stalls,
        Part::Drip | Part::Flap | Part::Announce | Part::Stranger => {
            return rogue::runtime().block_on(by_hand(args));
        }
    };
    let member = member(&args)?;
    let blobs = blobs(&args)?;
    // It has a runtime of its own.
    let hostile = Hostile::member(member, vice, blobs, args.listen);
    let deadline = std::time::Instant::now() + COMING_IN;
    while hostile.peers() < CONNECTIONS && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(
        hostile.peers() > 0,
        "nobody could be reached: give a token with an address of a running node"
    );
    println!("ready");
    std::thread::sleep(Duration::from_secs(args.seconds));
    Ok(())
}

async fn by_hand(args: Args) -> Result<()> {
    ensure!(!args.at.is_empty(), "give a node's address with --at");
    let until = Instant::now() + Duration::from_secs(args.seconds);
    if args.part == Part::Stranger {
        println!("ready");
        by_hand::strangers(args.at, args.seed, until).await;
        return Ok(());
    }
    let trouble = Trouble {
        member: member(&args)?,
        at: args.at.clone(),
        blobs: blobs(&args)?,
        seed: args.seed,
        until,
    };
    println!("ready");
    match args.part {
        Part::Drip => trouble.drip().await,
        Part::Flap => trouble.flap().await,
        _ => trouble.announce().await,
    }
    Ok(())
}

/// Ends this process with standard input: whoever started it is gone then.
fn end_with_input() {
    std::thread::spawn(|| {
        let _however = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
}

/// The member of this home.
fn member(args: &Args) -> Result<Member> {
    let key = MachineKey::from_secret(secret(&args.home)?);
    let identity = Keypair::ed25519_from_bytes(key.secret()).context("the key is none")?;
    println!("peer {}", identity.public().to_peer_id());
    Member::join(&args.token, key)
        .context("the token does not admit it: make one with `capsule fleet invite`")
}

/// The key of this home, made at its first start.
fn secret(home: &Path) -> Result<[u8; 32]> {
    std::fs::create_dir_all(home).with_context(|| format!("making {}", home.display()))?;
    let path = home.join("key");
    if let Ok(kept) = std::fs::read(&path) {
        let kept: Result<[u8; 32], _> = kept.try_into();
        return kept
            .map_err(|_| anyhow::anyhow!("{} is no key: remove it for a new one", path.display()));
    }
    let made: [u8; 32] = rand::random();
    std::fs::write(&path, made).with_context(|| format!("writing {}", path.display()))?;
    Ok(made)
}

fn blobs(args: &Args) -> Result<Vec<Held>> {
    let read = |path: &PathBuf| {
        let read = || {
            let len = path.metadata()?.len();
            anyhow::Ok(if len <= MAX_BLOB {
                Some(std::fs::read(path)?)
            } else {
                None
            })
        };
        let content = read().with_context(|| format!("reading {}", path.display()))?;
        let content = content
            .with_context(|| format!("{} is too large: give at most 1 GiB", path.display()))?;
        let held = Held::of(content);
        let serves = matches!(args.part, Part::Corrupt | Part::Drip);
        Ok(if serves { held } else { held.hollow() })
    };
    args.blob.iter().map(read).collect()
}
