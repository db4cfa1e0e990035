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
use std::sync::Arc;

use capsule_proto::ranges::MAX_CONTENT_LEN;

use super::bitmap::Directory;
use super::complete;
use super::detect::{Format, Probe};
use super::tables::Tables;
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
const BITMAPS: u32 = 0x2385_2875;
/// Length of that extension.
const BITMAPS_LEN: u64 = 24;

/// Incompatible feature bits that matter here.
const CORRUPT: u64 = 2;
const EXTERNAL_DATA: u64 = 4;
const EXTENDED_L2: u64 = 16;
/// All that exist, those of lazy reference counts and of the compression's kind too.
const KNOWN_FEATURES: u64 = 1 | CORRUPT | EXTERNAL_DATA | 8 | EXTENDED_L2;
/// Autoclear feature bit: whoever wrote to the image kept its bitmaps.
const BITMAPS_KEPT: u64 = 1;

/// A file that an image is made of.
pub(super) struct Link {
    pub path: PathBuf,
    pub file: File,
    pub stamp: Fingerprint,
    /// The device of the file system that it lies in.
    pub device: u64,
    pub format: Format,
    /// For an image with an external data file.
    pub data: Option<DataFile>,
    /// Of a qcow2 image.
    pub facts: Option<Facts>,
}

/// A file with an image's data.
pub(super) struct DataFile {
    pub path: PathBuf,
    pub file: File,
    pub stamp: Fingerprint,
    pub device: u64,
}

/// Where things are in a qcow2 image.
#[derive(Clone, Copy)]
pub(super) struct Facts {
    pub tables: Tables,
    pub bitmaps: Option<Directory>,
    /// Whether it has no features but those that are known.
    pub is_known: bool,
}

/// All files of an image, the image itself first.
pub(super) struct Chain {
    pub links: Arc<[Arc<Link>]>,
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
    bitmaps: Option<Directory>,
}

/// A chain that is put together.
#[derive(Default)]
struct Links {
    links: Vec<Arc<Link>>,
    needs_qemu: bool,
}

/// Finds and opens all files of an image.
pub(super) fn open(path: &Path, file: File) -> Result<Chain, ReadError> {
    let mut chain = Links::default();
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
    Ok(Chain {
        links: chain.links.into(),
        needs_qemu: chain.needs_qemu,
    })
}

impl Chain {
    /// Of a file whose bytes are taken as they lie.
    pub fn raw(path: &Path, file: &File) -> Result<Self, ReadError> {
        let io = |e| ReadError::io(path, 0, e);
        let link = Link::new(path, file.try_clone().map_err(io)?, Format::Raw)?;
        Ok(Self {
            links: Arc::new([Arc::new(link)]),
            needs_qemu: false,
        })
    }
}

impl Links {
    /// Adds a file; returns the one behind it.
    fn push(
        &mut self,
        path: PathBuf,
        file: File,
        format: Option<Format>,
    ) -> Result<Option<(PathBuf, File, Option<Format>)>, ReadError> {
        let io = |e| ReadError::io(&path, 0, e);
        let format = match format {
            Some(format) => format,
            None => Probe::read(&file, file.metadata().map_err(io)?.len())
                .map_err(io)?
                .format(),
        };
        let mut link = Link::new(&path, file, format)?;
        let mut behind = None;
        match format {
            Format::Raw | Format::Device => {}
            Format::Qcow2 => {
                let header = Header::read(&link)?;
                self.check(&link, &header)?;
                if let Some(name) = &header.data_file {
                    let path = resolve(&link, name, "external data")?;
                    link.data = Some(DataFile::open(path)?);
                }
                link.check_complete(&header)?;
                link.facts = Some(Facts {
                    tables: header.tables,
                    bitmaps: header.bitmaps,
                    is_known: header.is_known(),
                });
                if let Some(name) = &header.backing {
                    let format = Self::backing_format(header.backing_format.as_deref());
                    let path = resolve(&link, name, "backing")?;
                    behind = Some((path.clone(), open_file(&path)?, format));
                }
            }
            _ => self.needs_qemu = true,
        }
        self.links.push(Arc::new(link));
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
    fn new(path: &Path, file: File, format: Format) -> Result<Self, ReadError> {
        let (stamp, device) = identify(path, &file)?;
        Ok(Self {
            path: path.into(),
            file,
            stamp,
            device,
            format,
            data: None,
            facts: None,
        })
    }

    /// Another handle of its file.
    pub fn try_clone(&self) -> Result<File, ReadError> {
        self.file
            .try_clone()
            .map_err(|e| ReadError::io(&self.path, 0, e))
    }

    /// Whether its files are regular ones, whose times tell of changes.
    pub fn is_regular(&self) -> Result<bool, ReadError> {
        let data = self.data.as_ref();
        Ok(is_regular(&self.path, &self.file)?
            && data.map_or(Ok(true), |data| is_regular(&data.path, &data.file))?)
    }

    /// Compares its files with what they were; devices tell nothing.
    pub fn check_unchanged(&self) -> Result<(), ReadError> {
        let check = |stamp: &Fingerprint, path: &Path, file: &File| {
            if is_regular(path, file)? {
                stamp.check(path, file)
            } else {
                Ok(())
            }
        };
        check(&self.stamp, &self.path, &self.file)?;
        self.data
            .iter()
            .try_for_each(|data| check(&data.stamp, &data.path, &data.file))
    }

    /// Length of the disk that it holds.
    pub fn disk_len(&self) -> u64 {
        self.facts
            .map_or(self.stamp.size(), |facts| facts.tables.disk)
    }

    /// Checks that nothing of an image is missing at the end.
    fn check_complete(&self, header: &Header) -> Result<(), ReadError> {
        if !header.is_known() {
            // Its tables may mean anything; QEMU knows them, or refuses.
            return Ok(());
        }
        let data = self.data.as_ref();
        let data = data.map(|data| (data.path.as_path(), &data.file));
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

fn open_file(path: &Path) -> Result<File, ReadError> {
    let open = || {
        // Never wait for a pipe: a header may name anything.
        let flags =
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
        let file = File::from(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?);
        let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
        if !kind.is_file() && !kind.is_block_device() {
            return Err(std::io::Error::other("neither a regular file nor a device"));
        }
        Ok(file)
    };
    open().map_err(|e| ReadError::io(path, 0, e))
}

fn is_regular(path: &Path, file: &File) -> Result<bool, ReadError> {
    let metadata = file.metadata().map_err(|e| ReadError::io(path, 0, e))?;
    Ok(metadata.is_file())
}

/// What tells that a file was changed, and the device that it is on.
fn identify(path: &Path, file: &File) -> Result<(Fingerprint, u64), ReadError> {
    let stat = rustix::fs::fstat(file).map_err(|e| ReadError::io(path, 0, e.into()))?;
    Ok((Fingerprint::of(&stat), stat.st_dev))
}

impl DataFile {
    fn open(path: PathBuf) -> Result<Self, ReadError> {
        let file = open_file(&path)?;
        let (stamp, device) = identify(&path, &file)?;
        Ok(Self {
            path,
            file,
            stamp,
            device,
        })
    }
}

impl Header {
    /// Whether its features are all known.
    fn is_known(&self) -> bool {
        self.features & !KNOWN_FEATURES == 0
    }

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
        let autoclear = if version == 2 { 0 } else { u64_at(88)? };
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
                BITMAPS if len >= BITMAPS_LEN => {
                    header.bitmaps = Some(Directory {
                        count: u32_at(at + 8)?,
                        len: u64_at(at + 16)?,
                        at: u64_at(at + 24)?,
                        is_consistent: autoclear & BITMAPS_KEPT != 0,
                    })
                }
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(header)
    }
}
