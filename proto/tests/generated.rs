//! The committed prost code is what the schema generates. `UPDATE=1 cargo test -p capsule-proto` renews it.

use std::path::Path;

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let schema = root.join("schema");
    let files =
        protox::compile([schema.join("wire.proto")], [&schema]).expect("the schema compiles");
    let out = tempfile::tempdir().unwrap();
    prost_build::Config::new()
        .out_dir(out.path())
        .compile_fds(files)
        .unwrap();
    let fresh = std::fs::read_to_string(out.path().join("capsule.wire.rs")).unwrap();
    let committed = root.join("src/wire/generated.rs");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&committed, &fresh).unwrap();
    }
    let current = std::fs::read_to_string(&committed).unwrap_or_default();
    assert!(
        current == fresh,
        "src/wire/generated.rs is not current: run `UPDATE=1 cargo test -p capsule-proto`"
    );
}
