//! The three checksums of partition tables and ext4. All are reflected, and take and give the bare register, so that
//! they can be continued.

/// CRC-32C (Castagnoli): ext4's `metadata_csum`.
pub(super) fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = table(0x82f6_3b78);
    update(&TABLE, crc, bytes)
}

/// CRC-32 (IEEE 802.3), from its start to its end: GPT.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = table(0xedb8_8320);
    !update(&TABLE, !0, bytes)
}

/// CRC-16 (polynomial 0x8005): ext4's `uninit_bg`.
pub(super) fn crc16(crc: u16, bytes: &[u8]) -> u16 {
    const TABLE: [u32; 256] = table(0xa001);
    update(&TABLE, crc.into(), bytes) as u16
}

const fn table(polynomial: u32) -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ polynomial
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

fn update(table: &[u32; 256], crc: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(crc, |crc, byte| {
        table[(crc as u8 ^ byte) as usize] ^ crc >> 8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    // The check values of the catalogue of parametrised CRC algorithms (CRC-32/ISCSI, CRC-32/ISO-HDLC, CRC-16/MODBUS).
    #[test]
    fn the_check_values_are_met() {
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(crc16(!0, b"123456789"), 0x4b37);
        assert_eq!(crc32c(crc32c(!0, b"1234"), b"56789"), !0xe306_9283);
    }
}
