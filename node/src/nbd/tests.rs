//! A client by hand: what real ones do is tested with them.

use std::ops::Range;

use capsule_chunker::content::ReadError;
use futures::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::wire::{
    ALLOCATION, IHAVEOPT, NBDMAGIC, OPTION_REPLY, REQUEST, SIMPLE_REPLY, STRUCTURED_REPLY, chunk,
    command, error, option, reply,
};
use super::*;

/// 256 KiB: of each 64 KiB the first are zeros in every other one.
struct Sample(Vec<u8>);

impl Disk for Sample {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        self.0[range.start as usize..range.end as usize]
            .iter()
            .all(|byte| *byte == 0)
    }

    fn read(
        self: Arc<Self>,
        range: Range<u64>,
        mut into: Vec<u8>,
    ) -> BoxFuture<'static, Result<Vec<u8>, ReadError>> {
        Box::pin(async move {
            if range.start == 200_000 {
                let why = std::io::Error::other("the disk is damaged");
                return Err(ReadError::io("sample", range.start, why));
            }
            into.extend(&self.0[range.start as usize..range.end as usize]);
            Ok(into)
        })
    }
}

fn sample() -> Vec<u8> {
    let byte = |at: usize| if at >> 16 & 1 == 0 { 0 } else { at as u8 | 1 };
    (0..256 << 10).map(byte).collect()
}

/// A client that has shaken hands up to its options.
async fn connect() -> DuplexStream {
    let (mut near, far) = duplex(1 << 20);
    let export = Arc::new(Export {
        name: "lab:1/disk".to_owned(),
        description: "a disk".to_owned(),
        disk: Arc::new(Sample(sample())),
    });
    tokio::spawn(async move { serve(far, &export).await });
    assert_eq!(near.read_u64().await.unwrap(), NBDMAGIC);
    assert_eq!(near.read_u64().await.unwrap(), IHAVEOPT);
    assert_eq!(near.read_u16().await.unwrap(), 3);
    near.write_u32(3).await.unwrap();
    near
}

/// Sends an option; its replies, up to the one that ends them.
async fn ask(near: &mut DuplexStream, number: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
    near.write_u64(IHAVEOPT).await.unwrap();
    near.write_u32(number).await.unwrap();
    near.write_u32(data.len() as u32).await.unwrap();
    near.write_all(data).await.unwrap();
    let mut replies = Vec::new();
    loop {
        assert_eq!(near.read_u64().await.unwrap(), OPTION_REPLY);
        assert_eq!(near.read_u32().await.unwrap(), number);
        let kind = near.read_u32().await.unwrap();
        let mut data = vec![0; near.read_u32().await.unwrap() as usize];
        near.read_exact(&mut data).await.unwrap();
        replies.push((kind, data));
        if kind == reply::ACK || kind >> 31 == 1 {
            return replies;
        }
    }
}

/// An empty name and no wishes.
const GO: [u8; 6] = [0; 6];

async fn send(near: &mut DuplexStream, flags: u16, kind: u16, cookie: u64, offset: u64, len: u32) {
    near.write_u32(REQUEST).await.unwrap();
    near.write_u16(flags).await.unwrap();
    near.write_u16(kind).await.unwrap();
    near.write_u64(cookie).await.unwrap();
    near.write_u64(offset).await.unwrap();
    near.write_u32(len).await.unwrap();
}

/// A chunk: kind, cookie, data.
async fn chunk_of(near: &mut DuplexStream) -> (u16, u64, Vec<u8>) {
    assert_eq!(near.read_u32().await.unwrap(), STRUCTURED_REPLY);
    assert_eq!(near.read_u16().await.unwrap(), chunk::DONE);
    let (kind, cookie) = (
        near.read_u16().await.unwrap(),
        near.read_u64().await.unwrap(),
    );
    let mut data = vec![0; near.read_u32().await.unwrap() as usize];
    near.read_exact(&mut data).await.unwrap();
    (kind, cookie, data)
}

#[tokio::test]
async fn old_clients_read_by_simple_replies() {
    let mut near = connect().await;
    near.write_u64(IHAVEOPT).await.unwrap();
    near.write_u32(option::EXPORT_NAME).await.unwrap();
    near.write_u32(3).await.unwrap();
    near.write_all(b"any").await.unwrap();
    assert_eq!(near.read_u64().await.unwrap(), 256 << 10);
    let flags = near.read_u16().await.unwrap();
    assert_eq!(flags & 3, 3, "it has flags, and is read-only");
    send(&mut near, 0, command::READ, 7, 65_530, 10).await;
    assert_eq!(near.read_u32().await.unwrap(), SIMPLE_REPLY);
    assert_eq!(near.read_u32().await.unwrap(), 0);
    assert_eq!(near.read_u64().await.unwrap(), 7);
    let mut data = [0; 10];
    near.read_exact(&mut data).await.unwrap();
    assert_eq!(data, sample()[65_530..65_540]);
    // What is written is refused, and what comes with it passed over.
    near_write(&mut near).await;
    assert_eq!(near.read_u32().await.unwrap(), SIMPLE_REPLY);
    assert_eq!(near.read_u32().await.unwrap(), error::EPERM);
    assert_eq!(near.read_u64().await.unwrap(), 8);
    for (offset, len) in [(256 << 10, 1), (0, 0), (u64::MAX, 4)] {
        send(&mut near, 0, command::READ, 9, offset, len).await;
        assert_eq!(near.read_u32().await.unwrap(), SIMPLE_REPLY);
        assert_eq!(near.read_u32().await.unwrap(), error::EINVAL);
        assert_eq!(near.read_u64().await.unwrap(), 9);
    }
    send(&mut near, 0, command::DISC, 0, 0, 0).await;
    assert_eq!(near.read(&mut data).await.unwrap(), 0);
}

async fn near_write(near: &mut DuplexStream) {
    send(near, 0, command::WRITE, 8, 0, 100_000).await;
    near.write_all(&[1; 100_000]).await.unwrap();
}

#[tokio::test]
async fn new_clients_are_told_of_zeros_and_of_errors() {
    let mut near = connect().await;
    assert_eq!(
        ask(&mut near, option::STRUCTURED_REPLY, &[]).await,
        [(reply::ACK, vec![])]
    );
    let query = [
        &0u32.to_be_bytes()[..],
        &1u32.to_be_bytes(),
        &(ALLOCATION.len() as u32).to_be_bytes(),
        ALLOCATION.as_bytes(),
    ]
    .concat();
    let replies = ask(&mut near, option::SET_META_CONTEXT, &query).await;
    assert_eq!(replies[0].0, reply::META_CONTEXT);
    assert_eq!(
        replies[0].1,
        [&[0, 0, 0, 1], ALLOCATION.as_bytes()].concat()
    );
    let replies = ask(&mut near, option::GO, &GO).await;
    assert_eq!(replies.last().unwrap().0, reply::ACK);
    assert_eq!(replies[0].1[2..10], (256u64 << 10).to_be_bytes());
    send(&mut near, 0, command::BLOCK_STATUS, 1, 1000, 200_000).await;
    let (kind, cookie, data) = chunk_of(&mut near).await;
    assert_eq!((kind, cookie), (chunk::BLOCK_STATUS, 1));
    let numbers = data.as_chunks::<4>().0;
    let numbers: Vec<u32> = numbers.iter().map(|n| u32::from_be_bytes(*n)).collect();
    assert_eq!(
        numbers,
        [1, 64_536, 3, 65_536, 0, 65_536, 3, 4_392, 0],
        "lengths and whether they are holes"
    );
    send(
        &mut near,
        command::REQ_ONE,
        command::BLOCK_STATUS,
        2,
        0,
        200_000,
    )
    .await;
    assert_eq!(chunk_of(&mut near).await.2.len(), 12);
    send(&mut near, 0, command::READ, 3, 0, 65_536).await;
    let (kind, _, data) = chunk_of(&mut near).await;
    assert_eq!((kind, data.len()), (chunk::OFFSET_HOLE, 12));
    send(&mut near, 0, command::READ, 4, 70_000, 100).await;
    let (kind, cookie, data) = chunk_of(&mut near).await;
    assert_eq!((kind, cookie), (chunk::OFFSET_DATA, 4));
    assert_eq!(data[8..], sample()[70_000..70_100]);
    send(&mut near, 0, command::READ, 5, 200_000, 100).await;
    let (kind, _, data) = chunk_of(&mut near).await;
    assert_eq!(kind, chunk::ERROR);
    assert_eq!(data[..4], error::EIO.to_be_bytes());
    assert!(String::from_utf8_lossy(&data[6..]).contains("damaged"));
    send(&mut near, 0, command::CACHE, 6, 0, 131_072).await;
    assert_eq!(chunk_of(&mut near).await.0, chunk::NONE);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused() {
    let mut near = connect().await;
    let error_of = |replies: Vec<(u32, Vec<u8>)>| replies.last().unwrap().0;
    for (number, data) in [
        (option::GO, &[0, 0, 0, 9, 1][..]),
        (option::GO, &[0, 0, 0, 0, 0, 1]),
        (option::STRUCTURED_REPLY, &[1]),
        (option::LIST, &[1]),
        (option::SET_META_CONTEXT, &[0, 0, 0, 0, 0, 0, 0, 2]),
        (option::SET_META_CONTEXT, &[0; 8]),
    ] {
        assert_eq!(
            error_of(ask(&mut near, number, data).await),
            reply::ERR_INVALID,
            "{number} {data:?}"
        );
    }
    assert_eq!(error_of(ask(&mut near, 5, &[]).await), reply::ERR_UNSUP);
    let listed = ask(&mut near, option::LIST, &[]).await;
    assert!(listed[0].0 == reply::SERVER && listed[0].1.ends_with(b"a disk"));
    // It may not go on without end, nor at any length.
    near.write_u64(IHAVEOPT).await.unwrap();
    near.write_u32(option::LIST).await.unwrap();
    near.write_u32(u32::MAX).await.unwrap();
    assert_eq!(near.read(&mut [0; 8]).await.unwrap(), 0);
}
