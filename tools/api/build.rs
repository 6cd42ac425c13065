//! Generates the admin API from `proto/admin.proto`, without an installed protoc.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["admin.proto"], ["proto"])?;
    tonic_prost_build::configure()
        // The messages are what `--json` prints.
        .type_attribute(".", "#[derive(serde::Serialize)]")
        .compile_fds(descriptors)?;
    Ok(())
}
