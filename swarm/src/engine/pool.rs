//! The threads that call the node's stores, which block.
//!
//! Content jobs are bounded by the buffers that they carry, all others by their callers, who count what they have
//! submitted; so the queue needs no bound of its own. Jobs are begun in the order of submission.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use capsule_proto::GroupRanges;
use capsule_proto::RootHash;
use capsule_proto::ranges::Height;
use capsule_proto::wire::DataHeader;
use capsule_swarm_core::PeerKey;
use libp2p::PeerId;
use libp2p::gossipsub::MessageId;
use tokio::sync::mpsc;

use crate::api::{BlobStore, Offer, RecordId, RecordStore, ServeError, StoreError};
use crate::protocol::{self, Buffer};

/// Finished jobs that may wait for the engine before the threads wait for it.
const DONE_READY: usize = 256;
/// Bytes of records read for one request of a peer's; it asks again for the rest.
const RECORDS_PER_READ: usize = 4 << 20;

/// Which content of whom a job is about.
#[derive(Clone, Debug)]
pub struct Part {
    pub peer: PeerKey,
    pub peer_id: PeerId,
    /// The requester's number.
    pub request: u64,
    pub root: RootHash,
    pub size: u64,
    pub groups: Range<u64>,
    /// Up to where it is proved.
    pub height: Height,
    /// The transfer that asked for it; of no meaning for what is served.
    pub transfer: u64,
}

/// How a record came.
#[derive(Clone, Debug)]
pub enum Via {
    /// In answer to our asking.
    Peer(PeerKey),
    /// By gossip, whose verdict it awaits.
    Gossip { from: PeerId, message: MessageId },
}

/// Something to do.
#[derive(Debug)]
pub enum Job {
    Presence { root: RootHash },
    Read { part: Part, frame: Buffer },
    Write { part: Part, encoded: Buffer },
    RecordIds,
    Records { peer: PeerKey, ids: Vec<RecordId> },
    Offer { bytes: Vec<u8>, via: Via },
}

/// What came of it.
#[derive(Debug)]
pub enum Done {
    Presence {
        root: RootHash,
        presence: Option<(u64, GroupRanges)>,
    },
    Read {
        part: Part,
        result: Result<Buffer, ServeError>,
    },
    Write {
        part: Part,
        result: Result<(), StoreError>,
    },
    RecordIds {
        ids: Vec<RecordId>,
    },
    Records {
        peer: PeerKey,
        records: Vec<Vec<u8>>,
    },
    Offer {
        bytes: Vec<u8>,
        via: Via,
        offer: Offer,
    },
}

struct Queue {
    jobs: Mutex<(VecDeque<Job>, bool)>,
    wake: Condvar,
}

/// See the module. Threads end when it is dropped, after the job that they are at.
pub struct Pool {
    queue: Arc<Queue>,
    done: mpsc::Receiver<Done>,
}

impl Pool {
    /// Starts the threads.
    pub fn start(threads: usize, store: Arc<dyn BlobStore>, records: Arc<dyn RecordStore>) -> Self {
        let queue = Arc::new(Queue {
            jobs: Mutex::default(),
            wake: Condvar::new(),
        });
        let (sender, done) = mpsc::channel(DONE_READY);
        for number in 0..threads.max(1) {
            let (queue, sender) = (queue.clone(), sender.clone());
            let (store, records) = (store.clone(), records.clone());
            let thread = std::thread::Builder::new().name(format!("capsule-store-{number}"));
            let work = move || work(&queue, &sender, &*store, &*records);
            thread.spawn(work).expect("a thread can be started");
        }
        Self { queue, done }
    }

    /// Queues a job.
    pub fn submit(&self, job: Job) {
        self.queue
            .jobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .push_back(job);
        self.queue.wake.notify_one();
    }

    /// The next finished job.
    pub async fn done(&mut self) -> Option<Done> {
        self.done.recv().await
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut jobs = self
            .queue
            .jobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        jobs.0.clear();
        jobs.1 = true;
        self.queue.wake.notify_all();
    }
}

fn work(
    queue: &Queue,
    done: &mpsc::Sender<Done>,
    store: &dyn BlobStore,
    records: &dyn RecordStore,
) {
    loop {
        let mut jobs = queue.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let job = loop {
            if jobs.1 {
                return;
            }
            match jobs.0.pop_front() {
                Some(job) => break job,
                None => {
                    jobs = queue
                        .wake
                        .wait(jobs)
                        .unwrap_or_else(PoisonError::into_inner)
                }
            }
        };
        drop(jobs);
        if done.blocking_send(carry_out(job, store, records)).is_err() {
            return;
        }
    }
}

fn carry_out(job: Job, store: &dyn BlobStore, records: &dyn RecordStore) -> Done {
    match job {
        Job::Presence { root } => Done::Presence {
            root,
            presence: store.presence(&root),
        },
        Job::Read { part, mut frame } => {
            protocol::reserve_content_header(&mut frame);
            let result =
                store.read_encoded(&part.root, part.groups.clone(), part.height, &mut frame);
            let groups = (part.groups.end - part.groups.start) as u32;
            let header = DataHeader {
                request: part.request,
                groups,
                compressed: false,
            };
            let result = result.map(|()| {
                protocol::fill_content_header(&mut frame, &header);
                frame
            });
            Done::Read { part, result }
        }
        Job::Write { part, encoded } => {
            let result = store.write_encoded(
                &part.root,
                part.size,
                part.groups.clone(),
                part.height,
                &encoded,
            );
            Done::Write { part, result }
        }
        Job::RecordIds => {
            let mut ids = records.ids();
            ids.sort_unstable();
            ids.dedup();
            Done::RecordIds { ids }
        }
        Job::Records { peer, ids } => {
            let mut left = RECORDS_PER_READ;
            let read = ids
                .iter()
                .filter_map(|id| records.get(id))
                .take_while(|record| {
                    let fits = record.len() <= left;
                    left = left.saturating_sub(record.len());
                    fits
                });
            Done::Records {
                peer,
                records: read.collect(),
            }
        }
        Job::Offer { bytes, via } => {
            let offer = records.offer(&bytes);
            Done::Offer { bytes, via, offer }
        }
    }
}
