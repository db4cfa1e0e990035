//! The files behind a qcow2 image: header, backing chain, external data file.
//!
//! Every file is found and opened here, once, before anything reads it: so the chain is bounded and without loops, all
//! files can be watched for changes, and no image makes anybody open a network address. Backing files may lie anywhere on this machine,
//! as QEMU allows; whoever publishes an image from elsewhere should look at `qemu-img info` first. That the files are whole is checked by
//! `complete`; clusters are read in `qcow2`.
//!
//! Source: QEMU's `docs/interop/qcow2.txt`.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use capsule_proto::ranges::MAX_CONTENT_LEN;

use super::complete::{self, Tables};
use super::detect::{Format, Probe};
use crate::content::ReadError;
use crate::osfile::Fingerprint;

/// Longest chain; QEMU itself becomes slow long before.
const MAX_CHAIN: usize = 64;
/// Longest file name in a header, by the format.
const MAX_NAME: u64 = 1023;
/// Most header extensions looked at; four kinds exist.
const MAX_EXTENSIONS: usize = 32;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE: u32 = 0x4441_5441;

/// Incompatible feature bits that matter here.
const CORRUPT: u64 = 2;
const EXTERNAL_DATA: u64 = 4;
const EXTENDED_L2: u64 = 16;
/// All that exist, those of lazy reference counts and of the compression's kind too.
const KNOWN_FEATURES: u64 = 1 | CORRUPT | EXTERNAL_DATA | 8 | EXTENDED_L2;

/// A file that an image is made of.
pub(super) struct Link {
    pub path: PathBuf,
    pub file: File,
    pub stamp: Fingerprint,
    pub format: Format,
    /// For an image with an external data file.
    pub data: Option<(PathBuf, File, Fingerprint)>,
}

/// All files of an image, the image itself first.
pub(super) struct Chain {
    pub links: Vec<Link>,
    /// Whether something in it is beyond our own reader: zstd, extended L2 entries, other formats, what is not known yet.
    pub needs_qemu: bool,
}

/// What the header of an image says of other files and of features.
#[derive(Debug, Default)]
struct Header {
    tables: Tables,
    encryption: u32,
    features: u64,
    backing: Option<Vec<u8>>,
    backing_format: Option<Vec<u8>>,
    data_file: Option<Vec<u8>>,
}

/// Finds and opens all files of an image.
pub(super) fn open(path: &Path, file: File) -> Result<Chain, ReadError> {
    let mut chain = Chain {
        links: Vec::new(),
        needs_qemu: false,
    };
    let mut next = Some((path.to_owned(), file, Some(Format::Qcow2)));
    let mut inodes = Vec::new();
    while let Some((path, file, format)) = next.take() {
        let metadata = file.metadata().map_err(|e| ReadError::io(&path, 0, e))?;
        if inodes.contains(&(metadata.dev(), metadata.ino())) || inodes.len() == MAX_CHAIN {
            let why = format!(
                "its backing chain is a loop, or longer than {MAX_CHAIN}: flatten it with qemu-img convert"
            );
            return Err(ReadError::Format {
                path,
                offset: 8,
                why,
            });
        }
        inodes.push((metadata.dev(), metadata.ino()));
        next = chain.push(path, file, format)?;
    }
    Ok(chain)
}

impl Chain {
    /// Adds a file; returns the one behind it.
    fn push(
        &mut self,
        path: PathBuf,
        file: File,
        format: Option<Format>,
    ) -> Result<Option<(PathBuf, File, Option<Format>)>, ReadError> {
        let io = |e| ReadError::io(&path, 0, e);
        let stamp = Fingerprint::of(&rustix::fs::fstat(&file).map_err(|e| io(e.into()))?);
        let format = match format {
            Some(format) => format,
            None => Probe::read(&file, file.metadata().map_err(io)?.len())
                .map_err(io)?
                .format(),
        };
        let mut link = Link {
            path: path.clone(),
            file,
            stamp,
            format,
            data: None,
        };
        let mut behind = None;
        match format {
            Format::Raw | Format::Device => {}
            Format::Qcow2 => {
                let header = Header::read(&link)?;
                self.check(&link, &header)?;
                if let Some(name) = &header.data_file {
                    let path = resolve(&link, name, "external data")?;
                    let (file, stamp) = open_file(&path)?;
                    link.data = Some((path, file, stamp));
                }
                link.check_complete(&header)?;
                if let Some(name) = &header.backing {
                    let format = Self::backing_format(header.backing_format.as_deref());
                    let path = resolve(&link, name, "backing")?;
                    behind = Some((path.clone(), open_file(&path)?.0, format));
                }
            }
            _ => self.needs_qemu = true,
        }
        self.links.push(link);
        Ok(behind)
    }

    fn check(&mut self, link: &Link, header: &Header) -> Result<(), ReadError> {
        let refuse = |offset, why: &str| {
            Err(ReadError::Format {
                path: link.path.clone(),
                offset,
                why: why.to_owned(),
            })
        };
        if header.tables.disk > MAX_CONTENT_LEN {
            return refuse(24, "its disk is larger than 1 PiB");
        }
        if header.encryption != 0 {
            return refuse(
                32,
                "it is encrypted: decrypt it with qemu-img convert, or publish it with --as file",
            );
        }
        if header.features & CORRUPT != 0 {
            return refuse(
                72,
                "it is marked corrupt: repair it with qemu-img check -r all",
            );
        }
        self.needs_qemu |= header.features & !EXTERNAL_DATA != 0;
        if (header.features & EXTERNAL_DATA != 0) != header.data_file.is_some() {
            return refuse(
                72,
                "it names no external data file, or one that it does not use: convert it with qemu-img",
            );
        }
        Ok(())
    }

    /// The format that a header gives for its backing file; `None` if that must be probed.
    fn backing_format(name: Option<&[u8]>) -> Option<Format> {
        let known = [
            Format::Qcow2,
            Format::Qcow,
            Format::Vmdk,
            Format::Vdi,
            Format::Vhdx,
            Format::Vpc,
            Format::Qed,
            Format::Parallels,
        ];
        match name? {
            b"raw" | b"file" | b"host_device" => Some(Format::Raw),
            name => known
                .into_iter()
                .find(|format| format.name().as_bytes() == name),
        }
    }
}

impl Link {
    /// Checks that nothing of an image is missing at the end.
    fn check_complete(&self, header: &Header) -> Result<(), ReadError> {
        if header.features & !KNOWN_FEATURES != 0 {
            // Its tables may mean anything; QEMU knows them, or refuses.
            return Ok(());
        }
        let data = self.data.as_ref();
        let data = data.map(|(path, file, _)| (path.as_path(), file));
        complete::check(&header.tables, (&self.path, &self.file), data)
    }
}

/// The path that a header's file name means: relative ones start at the image's directory.
fn resolve(link: &Link, name: &[u8], what: &str) -> Result<PathBuf, ReadError> {
    let name = name.strip_prefix(b"file:").unwrap_or(name);
    // As QEMU reads it: a protocol ends with the first colon, unless a slash comes before.
    let protocol = name.iter().find(|&&b| b == b':' || b == b'/') == Some(&b':');
    if name.is_empty() || name.contains(&0) || protocol {
        let why = format!(
            "its {what} file {:?} is no local file: convert it with qemu-img first",
            name.escape_ascii().to_string()
        );
        return Err(ReadError::Format {
            path: link.path.clone(),
            offset: 8,
            why,
        });
    }
    let directory = link.path.parent().unwrap_or(Path::new(""));
    Ok(directory.join(OsStr::from_bytes(name)))
}

fn open_file(path: &Path) -> Result<(File, Fingerprint), ReadError> {
    let open = || {
        // Never wait for a pipe: a header may name anything.
        let flags =
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
        let file = File::from(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?);
        let stat = rustix::fs::fstat(&file)?;
        let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
        if !kind.is_file() && !kind.is_block_device() {
            return Err(std::io::Error::other("neither a regular file nor a device"));
        }
        Ok((file, Fingerprint::of(&stat)))
    };
    open().map_err(|e| ReadError::io(path, 0, e))
}

impl Header {
    fn read(link: &Link) -> Result<Self, ReadError> {
        let invalid = |offset, why: &str| ReadError::Format {
            path: link.path.clone(),
            offset,
            why: why.to_owned(),
        };
        let field = |offset: u64, buf: &mut [u8]| {
            link.file
                .read_exact_at(buf, offset)
                .map_err(|_| invalid(offset, "the qcow2 header is cut short"))
        };
        let u32_at = |offset| {
            let mut buf = [0; 4];
            field(offset, &mut buf).map(|()| u32::from_be_bytes(buf))
        };
        let u64_at = |offset| {
            let mut buf = [0; 8];
            field(offset, &mut buf).map(|()| u64::from_be_bytes(buf))
        };
        let name_at = |offset, len: u64| {
            let mut buf = vec![0; len as usize];
            field(offset, &mut buf).map(|()| buf)
        };
        let version = u32_at(4)?;
        if u32_at(0)? != u32::from_be_bytes(*b"QFI\xfb") || !(2..=3).contains(&version) {
            return Err(invalid(0, "it is not qcow2 of version 2 or 3"));
        }
        let mut header = Self {
            tables: Tables {
                disk: u64_at(24)?,
                cluster_bits: u32_at(20)?,
                l1_at: u64_at(40)?,
                l1_len: u64::from(u32_at(36)?),
                extended: false,
            },
            encryption: u32_at(32)?,
            ..Self::default()
        };
        let (backing_at, backing_len) = (u64_at(8)?, u64::from(u32_at(16)?));
        if backing_at != 0 {
            if backing_len > MAX_NAME {
                return Err(invalid(
                    16,
                    "the name of its backing file is longer than the format allows",
                ));
            }
            header.backing = Some(name_at(backing_at, backing_len)?);
        }
        let mut at = if version == 2 {
            72
        } else {
            u64::from(u32_at(100)?)
        };
        header.features = if version == 2 { 0 } else { u64_at(72)? };
        header.tables.extended = header.features & EXTENDED_L2 != 0;
        for _ in 0..MAX_EXTENSIONS {
            // Without an end mark the extensions end at the backing file's name.
            if backing_at != 0 && at >= backing_at {
                break;
            }
            let (kind, len) = (u32_at(at)?, u64::from(u32_at(at + 4)?));
            match kind {
                0 => break,
                BACKING_FORMAT if len <= MAX_NAME => {
                    header.backing_format = Some(name_at(at + 8, len)?)
                }
                DATA_FILE if len <= MAX_NAME => header.data_file = Some(name_at(at + 8, len)?),
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(header)
    }
}
