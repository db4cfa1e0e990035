//! Against QEMU's server, and against one by hand where that does not misbehave as it should.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command};

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, timeout};

use super::super::wire::{
    IHAVEOPT, NBDMAGIC, OPTION_REPLY, SIMPLE_REPLY, STRUCTURED_REPLY, chunk, option, reply,
};
use super::*;

/// No test takes longer.
const LONGEST: Duration = Duration::from_secs(60);
const LEN: u64 = 40 << 20;

/// A server, which ends with the test.
struct Server(Child);

impl Server {
    fn start(dir: &TempDir) -> Self {
        let mut command = Command::new("qemu-nbd");
        command.args(["-r", "-t", "-e", "16", "-f", "raw", "-k"]);
        command
            .arg(dir.path().join("socket"))
            .arg(dir.path().join("image"));
        Self(command.spawn().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _over = self.0.kill();
        let _over = self.0.wait();
    }
}

/// Of each 4 MiB, the first is data.
fn byte(at: u64) -> u8 {
    match at >> 20 & 3 {
        0 => (at / 3) as u8 | 1,
        _ => 0,
    }
}

fn expect(range: Range<u64>) -> Vec<u8> {
    range.map(byte).collect()
}

fn image() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let file = File::create(dir.path().join("image")).unwrap();
    file.set_len(LEN).unwrap();
    for start in (0..LEN).step_by(4 << 20) {
        file.write_all_at(&expect(start..start + (1 << 20)), start)
            .unwrap();
    }
    dir
}

async fn connect(dir: &TempDir) -> Arc<NbdDisk> {
    NbdDisk::connect(&dir.path().join("socket")).await.unwrap()
}

#[tokio::test]
async fn reads_what_is_there_and_knows_zeros() {
    let test = async {
        let dir = image();
        let _server = Server::start(&dir);
        let disk = connect(&dir).await;
        assert_eq!(disk.len(), LEN);
        assert!(disk.is_zero(1 << 20..4 << 20));
        assert!(disk.is_zero(5 << 20..6 << 20));
        assert!(!disk.is_zero(0..4096));
        assert!(!disk.is_zero((4 << 20) - 4096..(4 << 20) + 4096));
        for range in [
            0..1,
            4095..70_000,
            1_000_000..9_000_000,
            0..LEN,
            LEN - 5..LEN,
            7..7,
        ] {
            let read = disk
                .clone()
                .read(range.clone(), b"before".to_vec())
                .await
                .unwrap();
            assert_eq!(&read[..6], b"before");
            assert!(read[6..] == expect(range.clone()), "{range:?}");
        }
        disk.cache(0..LEN).await.unwrap();
        assert!(
            disk.clone()
                .read(LEN - 1..LEN + 1, Vec::new())
                .await
                .is_err()
        );
        assert!(disk.cache(LEN..LEN + 1).await.is_err());
    };
    timeout(LONGEST, test).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outlives_its_server() {
    let test = async {
        let dir = image();
        let server = Server::start(&dir);
        let disk = connect(&dir).await;
        let until = Instant::now() + Duration::from_secs(6);
        let read = |seed: u64| {
            let disk = disk.clone();
            tokio::spawn(async move {
                let (mut at, mut reads) = (seed, 0);
                while Instant::now() < until {
                    at = at
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(seed);
                    let start = (at >> 20) % (LEN - (3 << 20));
                    let len = (at >> 8) % [5_000, 3 << 20][(at >> 60) as usize & 1] + 1;
                    let read = disk.clone().read(start..start + len, Vec::new());
                    assert!(read.await.unwrap() == expect(start..start + len));
                    reads += 1;
                }
                reads
            })
        };
        let readers: Vec<_> = (1..9).map(read).collect();
        let mut server = Some(server);
        for gone in [50, 700, 0] {
            tokio::time::sleep(Duration::from_millis(700)).await;
            drop(server.take());
            tokio::time::sleep(Duration::from_millis(gone)).await;
            server = Some(Server::start(&dir));
        }
        let mut reads = 0;
        for reader in readers {
            reads += reader.await.unwrap();
        }
        assert!(reads > 50, "{reads} reads");
    };
    timeout(LONGEST, test).await.unwrap();
}

#[tokio::test]
async fn waits_for_a_server_and_ends_with_who_waits() {
    let test = async {
        let dir = image();
        let connecting = connect(&dir);
        let none = timeout(Duration::from_millis(500), connecting).await;
        assert!(none.is_err());
        let starting = async {
            tokio::time::sleep(Duration::from_millis(400)).await;
            Server::start(&dir)
        };
        let (disk, server) = tokio::join!(connect(&dir), starting);
        drop(server);
        let reading = disk.clone().read(0..4096, Vec::new());
        assert!(timeout(Duration::from_millis(700), reading).await.is_err());
        let _server = Server::start(&dir);
        assert!(disk.read(0..4096, Vec::new()).await.unwrap() == expect(0..4096));
    };
    timeout(LONGEST, test).await.unwrap();
}

/// Shakes hands as a server with or without structured replies, which tells of no zeros.
async fn greet(stream: &mut UnixStream, is_structured: bool) -> io::Result<()> {
    stream.write_u64(NBDMAGIC).await?;
    stream.write_u64(IHAVEOPT).await?;
    stream.write_u16(1).await?;
    assert_eq!(stream.read_u32().await?, 1);
    loop {
        assert_eq!(stream.read_u64().await?, IHAVEOPT);
        let number = stream.read_u32().await?;
        let mut data = vec![0; stream.read_u32().await? as usize];
        stream.read_exact(&mut data).await?;
        let mut answer = async |kind, data: &[u8]| {
            stream.write_u64(OPTION_REPLY).await?;
            stream.write_u32(number).await?;
            stream.write_u32(kind).await?;
            stream.write_u32(data.len() as u32).await?;
            stream.write_all(data).await
        };
        match number {
            option::GO => {
                let info = [&[0, 0][..], &LEN.to_be_bytes(), &[0, 1]].concat();
                answer(reply::INFO, &info).await?;
                return answer(reply::ACK, &[]).await;
            }
            option::STRUCTURED_REPLY if is_structured => answer(reply::ACK, &[]).await?,
            _ => answer(reply::ERR_UNSUP, b"never heard of it").await?,
        }
    }
}

/// The next request: its cookie and what it asks for.
async fn asked(stream: &mut UnixStream) -> io::Result<([u8; 8], Range<u64>)> {
    let mut request = [0; 28];
    stream.read_exact(&mut request).await?;
    let (head, rest) = request.split_at(16);
    let offset = u64::from_be_bytes(rest[..8].try_into().unwrap());
    let len = u32::from_be_bytes(rest[8..].try_into().unwrap());
    let cookie = head[8..].try_into().unwrap();
    Ok((cookie, offset..offset + u64::from(len)))
}

/// A server that knows the least, and answers two requests in another order than they came.
async fn old(listener: UnixListener) -> io::Result<()> {
    let (mut stream, _) = listener.accept().await?;
    greet(&mut stream, false).await?;
    let requests = [asked(&mut stream).await?, asked(&mut stream).await?];
    for (cookie, range) in requests.into_iter().rev() {
        stream.write_u32(SIMPLE_REPLY).await?;
        stream.write_u32(0).await?;
        stream.write_all(&cookie).await?;
        stream.write_all(&expect(range)).await?;
    }
    stream.read_u8().await.map(drop)
}

#[tokio::test]
async fn old_servers_are_understood() {
    let test = async {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let server = tokio::spawn(old(listener));
        let disk = connect(&dir).await;
        assert!(!disk.is_zero(1 << 20..2 << 20));
        disk.cache(0..LEN).await.unwrap();
        let (one, other) = tokio::join!(
            disk.clone().read(5..4096, Vec::new()),
            disk.clone().read(1000..70_000, Vec::new()),
        );
        assert!(one.unwrap() == expect(5..4096));
        assert!(other.unwrap() == expect(1000..70_000));
        drop(disk);
        assert!(
            server.await.unwrap().is_err(),
            "it hears that its client has left"
        );
    };
    timeout(LONGEST, test).await.unwrap();
}

/// A server that leaves out the end of a first read and cannot read the first 64 KiB; the rest it tells backwards, by pages, with holes.
async fn damaged(listener: UnixListener) -> io::Result<()> {
    let (mut stream, _) = listener.accept().await?;
    greet(&mut stream, true).await?;
    for number in 0.. {
        let (cookie, range) = asked(&mut stream).await?;
        let mut say = async |kind: u16, flags: u16, data: &[u8]| {
            stream.write_u32(STRUCTURED_REPLY).await?;
            stream.write_u16(flags).await?;
            stream.write_u16(kind).await?;
            stream.write_all(&cookie).await?;
            stream.write_u32(data.len() as u32).await?;
            stream.write_all(data).await
        };
        if range.start < 65_536 {
            let data = [&5u32.to_be_bytes()[..], &7u16.to_be_bytes(), b"damaged"].concat();
            say(chunk::ERROR, chunk::DONE, &data).await?;
            continue;
        }
        let left_out = usize::from(number == 0);
        let starts: Vec<u64> = range.step_by(4096).collect();
        for start in starts.into_iter().rev().skip(left_out) {
            let bytes = expect(start..start + 4096);
            let start = start.to_be_bytes();
            match bytes.iter().any(|byte| *byte != 0) {
                true => say(chunk::OFFSET_DATA, 0, &[&start[..], &bytes].concat()).await?,
                false => {
                    let data = [&start[..], &4096u32.to_be_bytes()].concat();
                    say(chunk::OFFSET_HOLE, 0, &data).await?;
                }
            }
        }
        say(chunk::NONE, chunk::DONE, &[]).await?;
    }
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_read_is_tried_again_and_then_told() {
    let test = async {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let _server = tokio::spawn(damaged(listener));
        let disk = connect(&dir).await;
        let range = (5 << 20) - 65_536..(5 << 20) + 65_536;
        assert!(disk.clone().read(range.clone(), Vec::new()).await.unwrap() == expect(range));
        let start = Instant::now();
        let error = disk.read(0..65_536, Vec::new()).await.unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("the server refuses with error 5: damaged"),
            "{error}"
        );
        assert!(start.elapsed() >= 2 * PAUSE);
    };
    timeout(LONGEST, test).await.unwrap();
}

#[tokio::test]
async fn what_is_no_server_is_refused() {
    let test = async {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream
                .write_all(b"220 mail.example.org ESMTP ready")
                .await
                .unwrap();
            stream
        };
        let path = dir.path().join("socket");
        let (disk, _stream) = tokio::join!(NbdDisk::connect(&path), server);
        assert_eq!(
            disk.map(drop).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    };
    timeout(LONGEST, test).await.unwrap();
}
