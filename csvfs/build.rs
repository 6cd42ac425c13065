//! Generates the messages between clients and coordinator from `proto/csvfs.proto`, without an installed protoc.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto/csvfs.proto");
    let files = protox::compile(["proto/csvfs.proto"], ["proto"])?;
    prost_build::Config::new().bytes(["."]).skip_protoc_run().compile_fds(files)?;
    Ok(())
}
