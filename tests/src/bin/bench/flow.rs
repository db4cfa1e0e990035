//! When data crosses the loopback interface: from the outside, the same way for every tool.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::measure::loopback_bytes;
use crate::memory::Memory;

/// Data flows once so many bytes have crossed, and until only so many are left: more than handshakes, announcements and
/// the like take.
const CHATTER: u64 = 256 << 10;
/// How often the interface is looked at until data flows, and then: at most 1/500 of a core.
const GLANCE: Duration = Duration::from_millis(2);
const LOOK: Duration = Duration::from_millis(10);
/// Looks remembered: an hour. What comes later is not told apart.
const MAX_LOOKS: usize = 360_000;

/// Watches the interface in a thread of its own.
#[derive(Debug)]
pub struct Flow {
    before: u64,
    started: Instant,
    looks: Arc<Mutex<Vec<Look>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// So many bytes had crossed by then.
#[derive(Debug, Clone, Copy)]
struct Look {
    seconds: f64,
    bytes: u64,
}

impl Flow {
    /// Begins to watch, and hands out the memory for the data as it comes.
    pub fn watch(started: Instant, mut memory: Memory) -> Self {
        let before = loopback_bytes();
        let (looks, stop) = (
            Arc::new(Mutex::new(vec![])),
            Arc::new(AtomicBool::new(false)),
        );
        let (seen, stopped) = (looks.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let look = Look::now(started, before);
                memory.free_for(look.bytes);
                let mut looks = seen.lock().unwrap_or_else(PoisonError::into_inner);
                // Before anything flows, only the last look matters.
                if look.bytes < CHATTER {
                    looks.clear();
                }
                if looks.len() < MAX_LOOKS {
                    looks.push(look);
                }
                drop(looks);
                std::thread::sleep(if look.bytes < CHATTER { GLANCE } else { LOOK });
            }
        });
        Self {
            before,
            started,
            looks,
            stop,
            thread: Some(thread),
        }
    }

    /// Seconds from the start to the first data and to the last so far; none where nothing flowed.
    pub fn span(&self) -> Option<(f64, f64)> {
        let mut looks = self
            .looks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        looks.push(Look::now(self.started, self.before));
        span(&looks)
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It does nothing that could panic.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Look {
    fn now(started: Instant, before: u64) -> Self {
        let bytes = loopback_bytes().saturating_sub(before);
        Self {
            seconds: started.elapsed().as_secs_f64(),
            bytes,
        }
    }
}

fn span(looks: &[Look]) -> Option<(f64, f64)> {
    let all = looks.last()?.bytes;
    let when = |bytes: u64| looks.iter().find(|look| look.bytes >= bytes);
    let first = when(CHATTER)?;
    let last = when(all.saturating_sub(CHATTER).max(CHATTER))?;
    Some((first.seconds, last.seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chatter_before_and_after_is_no_data() {
        let looks = [
            (0.1, 1_000),
            (1.0, 10_000),
            (5.0, 300_000),
            (6.0, 5_000_000),
            (7.0, 9_000_000),
            (7.5, 9_000_100),
            (19.0, 9_100_000),
        ];
        let looks = looks.map(|(seconds, bytes)| Look { seconds, bytes });
        assert_eq!(span(&looks), Some((5.0, 7.0)));
        assert_eq!(span(&looks[..2]), None);
        assert_eq!(span(&[]), None);
    }

    #[test]
    fn real_data_is_seen() {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let flow = Flow::watch(Instant::now(), Memory::touch(0).unwrap());
        let mut stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let sender = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            stream.write_all(&vec![7; 4 << 20]).unwrap();
        });
        let received = listener
            .accept()
            .unwrap()
            .0
            .read_to_end(&mut vec![])
            .unwrap();
        sender.join().unwrap();
        assert_eq!(received, 4 << 20);
        let (first, last) = flow.span().unwrap();
        assert!(
            0.0 < first && first <= last && last < 60.0,
            "{first} {last}"
        );
    }
}
