//! LZMA as codecs use it: one raw stream behind its properties byte, without header, length, end marker or checksum.
//!
//! Smaller than zstd, as each bit is coded by what came of the same bit before, and where the content stops being what the
//! dictionary has, the dictionary's next byte foretells the content's. Decoding is several times as slow.

use std::io::{self, Read, Write};

use lzma_rust2::{EncodeMode, LzmaOptions, LzmaReader, LzmaWriter, MfType};

use super::FrameFault;

/// Most bits that a literal's model may hang on: so the model fits in 50 KiB.
const MAX_LITERAL_BITS: u8 = 4;
/// Shortest dictionary that there is.
const MIN_DICTIONARY: usize = 4096;

/// Compresses content that goes on where a dictionary ends.
pub(super) fn encode(content: &[u8], dictionary: &[u8]) -> Result<Vec<u8>, FrameFault> {
    let options = LzmaOptions {
        dict_size: dictionary_len(dictionary, content.len()),
        lc: LzmaOptions::LC_DEFAULT,
        lp: LzmaOptions::LP_DEFAULT,
        pb: LzmaOptions::PB_DEFAULT,
        mode: EncodeMode::Normal,
        nice_len: LzmaOptions::NICE_LEN_MAX,
        mf: MfType::Bt4,
        depth_limit: 0,
        preset_dict: (!dictionary.is_empty()).then(|| dictionary.to_vec()),
    };
    LzmaWriter::new_no_header(vec![options.get_props()], &options, false)
        .and_then(|mut writer| {
            writer.write_all(content)?;
            writer.finish()
        })
        .map_err(fault)
}

/// Makes exactly `len` bytes, in memory for them and the dictionary, whatever the stream says.
pub(super) fn decode(packed: &[u8], dictionary: &[u8], len: usize) -> Result<Vec<u8>, FrameFault> {
    let Some((&properties, stream)) = packed.split_first() else {
        return Err(FrameFault::Lzma("it is empty".into()));
    };
    if properties % 9 + properties / 9 % 5 > MAX_LITERAL_BITS {
        return Err(FrameFault::Lzma("its model is too large".into()));
    }
    let window = dictionary_len(dictionary, len);
    let dictionary = (!dictionary.is_empty()).then_some(dictionary);
    let mut reader = LzmaReader::new_with_props(stream, len as u64, properties, window, dictionary)
        .map_err(fault)?;
    // A stream that would go on behind the content is not one that was written for it.
    reader.set_relaxed_end_condition(false);
    let mut content = vec![0; len];
    reader.read_exact(&mut content).map_err(fault)?;
    let (unread, unused) = reader.into_parts();
    match unread.len() + unused.len() {
        0 => Ok(content),
        rest => Err(FrameFault::Trailing {
            packed: packed.len(),
            used: packed.len() - rest,
        }),
    }
}

/// All of both, so that nothing is out of reach: what the index bounds, not the stream.
fn dictionary_len(dictionary: &[u8], len: usize) -> u32 {
    (dictionary.len() + len).max(MIN_DICTIONARY) as u32
}

fn fault(error: io::Error) -> FrameFault {
    FrameFault::Lzma(error.to_string())
}
