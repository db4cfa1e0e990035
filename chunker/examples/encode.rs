//! Encodes a file or directory into nothing, and prints what the stages did.
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use capsule_chunker::content::*;
use capsule_chunker::layer::encode::*;
use capsule_proto::manifest::ComponentKind;

struct Files { files: Vec<(PathBuf, u64, u64)>, len: u64, parts: bool }
impl Content for Files {
    fn len(&self) -> u64 { self.len }
    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> Result<(), ReadError> {
        let mut i = self.files.partition_point(|f| f.1 + f.2 <= offset);
        while !buf.is_empty() {
            let (path, start, len) = &self.files[i];
            let n = (start + len - offset).min(buf.len() as u64) as usize;
            let (now, rest) = buf.split_at_mut(n);
            if n > 0 { File::open(path).and_then(|f| f.read_exact_at(now, offset - start)).map_err(|e| ReadError::io(path, 0, e))?; }
            offset += n as u64; buf = rest; i += 1;
        }
        Ok(())
    }
}
impl Source for Files {
    fn extents(&self) -> Extents<'_> { Box::new(std::iter::once(Ok(Extent { range: 0..self.len, zero: false }))) }
    fn parts(&self) -> Option<Parts<'_>> { self.parts.then(|| Box::new(self.files.iter().map(|f| f.2)) as Parts) }
    fn check_unchanged(&self) -> Result<(), ReadError> { Ok(()) }
}
fn walk(p: &Path, out: &mut Vec<(PathBuf, u64, u64)>, at: &mut u64) {
    let m = std::fs::symlink_metadata(p).unwrap();
    if m.is_file() { out.push((p.into(), *at, m.len())); *at += m.len(); }
    else if m.is_dir() {
        let mut e: Vec<_> = std::fs::read_dir(p).unwrap().map(|e| e.unwrap().path()).collect();
        e.sort();
        e.iter().for_each(|e| walk(e, out, at));
    }
}
fn main() {
    let mut args = std::env::args().skip(1);
    let path = PathBuf::from(args.next().unwrap());
    let kind = args.next().unwrap();
    let effort = match args.next().unwrap().as_str() { "fast" => Effort::Fast, "max" => Effort::Max, _ => Effort::Default };
    let mut files = vec![]; let mut len = 0;
    walk(&path, &mut files, &mut len);
    let src = Files { files, len, parts: path.is_dir() };
    let mut o = EncodeOptions::new(match kind.as_str() { "disk" => ComponentKind::Disk, _ => ComponentKind::File }, effort);
    if let Some(m) = args.next() { o.frame_max = m.parse::<u32>().unwrap() << 10 }
    if let Some(m) = args.next() { o.threads = m.parse().unwrap() }
    let started = Instant::now();
    let mut pack = File::create("/tmp/lyr/pack").unwrap();
    let e = encode(&src, &o, Outputs { pack: &mut pack, pack_outboard: Vec::new(), content_outboard: Vec::new() }, &()).unwrap();
    println!("frame_max {} K: {:.2} s, {}", o.frame_max >> 10, started.elapsed().as_secs_f64(), e.stats);
    let (packr, root) = (e.pack.root, match &e.content { ContentHashes::Stream(t, _) => t.root, ContentHashes::Parts(p) => p[0] });
    let index = e.into_index(root);
    println!("index {} bytes; {packr} {root}", index.len());
    std::fs::write("/tmp/lyr/index", &index).unwrap();
}
