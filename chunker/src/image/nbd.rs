//! The little of the NBD protocol that reading a disk from `qemu-nbd` takes.
//!
//! Fixed newstyle handshake, the default export, simple replies, reads only. Source: the NBD project's `doc/proto.md`.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

const INIT: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
/// Fixed newstyle, and no 124 zeros after the handshake; both of the server and of the client.
const FLAGS: u16 = 0b11;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const CMD_READ: u16 = 0;
const CMD_DISCONNECT: u16 = 2;
/// Longest read: servers must allow 32 MiB.
const MAX_READ: usize = 16 << 20;
/// Longest reply to an option that we accept; messages for people come here.
const MAX_OPTION_REPLY: u32 = 64 << 10;

/// A connection to the server; one request at a time.
pub(super) struct Client {
    stream: UnixStream,
    size: u64,
}

impl Client {
    /// Shakes hands and asks for the default export.
    pub fn new(mut stream: UnixStream) -> io::Result<Self> {
        let mut hello = [0; 18];
        stream.read_exact(&mut hello)?;
        let known = hello[..8] == INIT.to_be_bytes() && hello[8..16] == OPTION.to_be_bytes();
        if !known || u16::from_be_bytes([hello[16], hello[17]]) & FLAGS != FLAGS {
            return Err(protocol("the server does not speak fixed newstyle NBD"));
        }
        let mut ask = u32::from(FLAGS).to_be_bytes().to_vec();
        ask.extend(OPTION.to_be_bytes());
        ask.extend(OPT_GO.to_be_bytes());
        // An empty name, and no wish for further information.
        ask.extend(6_u32.to_be_bytes());
        ask.extend([0; 6]);
        stream.write_all(&ask)?;
        let mut size = None;
        loop {
            let (kind, data) = option_reply(&mut stream)?;
            match kind {
                REP_INFO if data.len() >= 12 && data[..2] == INFO_EXPORT.to_be_bytes() => {
                    size = Some(u64::from_be_bytes(data[2..10].try_into().expect("8 bytes")));
                }
                REP_INFO => {}
                REP_ACK => break,
                _ => {
                    return Err(protocol(&format!(
                        "the server refuses: {}",
                        String::from_utf8_lossy(&data)
                    )));
                }
            }
        }
        let size = size.ok_or_else(|| protocol("the server does not tell the disk's size"))?;
        Ok(Self { stream, size })
    }

    /// Length of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills a buffer from the disk.
    pub fn read_at(&mut self, mut offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for part in buf.chunks_mut(MAX_READ) {
            self.request(CMD_READ, offset, part.len() as u32)?;
            let mut reply = [0; 16];
            self.stream.read_exact(&mut reply)?;
            if reply[..4] != REPLY.to_be_bytes() || reply[8..] != offset.to_be_bytes() {
                return Err(protocol("the server's reply is not to our request"));
            }
            match i32::from_be_bytes(reply[4..8].try_into().expect("4 bytes")) {
                0 => self.stream.read_exact(part)?,
                error => return Err(io::Error::from_raw_os_error(error)),
            }
            offset += part.len() as u64;
        }
        Ok(())
    }

    fn request(&mut self, kind: u16, offset: u64, len: u32) -> io::Result<()> {
        let mut request = [0; 28];
        request[..4].copy_from_slice(&REQUEST.to_be_bytes());
        request[6..8].copy_from_slice(&kind.to_be_bytes());
        // The offset serves as the cookie that comes back.
        request[8..16].copy_from_slice(&offset.to_be_bytes());
        request[16..24].copy_from_slice(&offset.to_be_bytes());
        request[24..].copy_from_slice(&len.to_be_bytes());
        self.stream.write_all(&request)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // A courtesy; the server also notices the closed socket.
        let _ = self.request(CMD_DISCONNECT, 0, 0);
    }
}

fn option_reply(stream: &mut UnixStream) -> io::Result<(u32, Vec<u8>)> {
    let mut head = [0; 20];
    stream.read_exact(&mut head)?;
    let field = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("4 bytes"));
    if head[..8] != OPTION_REPLY.to_be_bytes() || field(8) != OPT_GO || field(16) > MAX_OPTION_REPLY
    {
        return Err(protocol("the server's reply is not to our option"));
    }
    let mut data = vec![0; field(16) as usize];
    stream.read_exact(&mut data)?;
    Ok((field(12), data))
}

fn protocol(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
