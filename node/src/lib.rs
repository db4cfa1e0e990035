//! The `capsule` program's parts, so that tests can reach them.
//!
//! | room | what |
//! |---|---|
//! | `home`, `control` | the directory; the way from the command line to the daemon |
//! | `daemon`, `node` | starting, stopping, what happens by itself; what the parts share |
//! | `publish`, `transfer`, `export`, `verify`, `keep`, `follow`, `report` | the commands |
//! | `paging`, `disk`, `nbd`, `mount` | capsules that are read while they come; as network block devices, as files |
//! | `machine` | machines that run from capsules, and are captured |
//! | `records`, `held`, `graph`, `layers`, `encoding`, `rehash` | what the fleet says; what is here; ways to components; reading, making and hashing them |
//! | `needs`, `materialise` | what of packs is read; what is dear to read is encoded anew |
//! | `store`, `blobs` | bytes on the disk, and as the network sees them |
//! | `clock`, `rates`, `work` | time with a floor; caps by the time of day; long work on few threads |

pub mod blobs;
pub mod clock;
pub mod control;
pub mod daemon;
mod disk;
mod encoding;
pub mod export;
mod failure;
pub mod follow;
pub mod graph;
pub mod held;
pub mod home;
pub mod keep;
pub mod layers;
pub mod machine;
mod materialise;
mod mount;
mod nbd;
mod needs;
pub mod node;
mod paging;
pub mod publish;
pub mod rates;
pub mod records;
mod rehash;
pub mod report;
pub mod store;
pub mod transfer;
pub mod verify;
pub mod work;
