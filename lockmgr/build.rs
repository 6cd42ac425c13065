//! Compiles the cluster's messages.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["cluster.proto"], ["proto"])?;
    prost_build::Config::new().bytes(["."]).skip_protoc_run().compile_fds(descriptors)?;
    Ok(())
}
