//! The formats are what they were: committed bytes decode to values written here, and those encode to the same bytes.
//!
//! A vector changes only with its format's version. `UPDATE_GOLDEN=1 cargo test -p capsule-proto --test golden` writes them
//! anew. The worked examples in `proto/docs` are held to the vectors too.

mod samples;

use std::path::Path;

use samples::{Case, Encoding, all, golden_path, read_golden};

/// Bytes in a line of a golden file.
const LINE: usize = 32;

#[test]
fn golden_vectors_decode_to_their_values() {
    for case in all() {
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            write(&*case);
        }
        case.assert_decodes(&case.golden());
    }
}

#[test]
fn values_encode_to_their_golden_vectors() {
    for case in all() {
        let encoded = case.encode();
        // How pages compress is the compressor's business; what they decode to is not.
        if case.encoding() == Encoding::Free {
            case.assert_decodes(&encoded);
        } else {
            assert_eq!(encoded, case.golden(), "{}", case.file());
        }
    }
}

#[test]
fn every_golden_file_belongs_to_a_value() {
    let cases = all();
    for file in std::fs::read_dir(golden_path("")).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        assert!(
            cases.iter().any(|case| case.file() == name),
            "{name} is no value's"
        );
    }
}

// A fenced block that begins with "```golden FILE" holds the file's bytes in hex, with comments behind two blanks.
#[test]
fn examples_in_the_docs_are_the_golden_vectors() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let mut examples = 0;
    for doc in std::fs::read_dir(docs).unwrap() {
        let text = std::fs::read_to_string(doc.unwrap().path()).unwrap();
        for block in text.split("```golden ").skip(1) {
            let (file, rest) = block.split_once('\n').unwrap();
            let block = rest.split("```").next().unwrap();
            let hex: String = block
                .lines()
                .map(|line| line.split("  ").next().unwrap().replace(' ', ""))
                .collect();
            let bytes = if file.ends_with(".txt") {
                hex.into_bytes()
            } else {
                unhex(&hex, file)
            };
            assert_eq!(
                bytes,
                read_golden(file),
                "the example of {file} in the docs"
            );
            examples += 1;
        }
    }
    assert!(examples >= 7, "each format has an example: {examples}");
}

fn unhex(hex: &str, file: &str) -> Vec<u8> {
    data_encoding::HEXLOWER
        .decode(hex.as_bytes())
        .unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn write(case: &dyn Case) {
    let encoded = case.encode();
    let text = if case.file().ends_with(".txt") {
        String::from_utf8(encoded).unwrap() + "\n"
    } else {
        encoded
            .chunks(LINE)
            .map(|line| data_encoding::HEXLOWER.encode(line) + "\n")
            .collect()
    };
    std::fs::write(golden_path(case.file()), text).unwrap();
}
