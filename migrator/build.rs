//! Generates the messages between source and target from `proto/migrator.proto`, without an installed protoc.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto/migrator.proto");
    let files = protox::compile(["proto/migrator.proto"], ["proto"])?;
    prost_build::Config::new().skip_protoc_run().compile_fds(files)?;
    Ok(())
}
