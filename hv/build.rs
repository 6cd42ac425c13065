//! Generates the messages of `hv.proto` and `state.proto`.

fn main() {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["proto/hv.proto", "proto/state.proto"], ["proto"])
        .expect("the .proto files are valid");
    prost_build::Config::new().compile_fds(files).expect("code generation writes to OUT_DIR");
}
