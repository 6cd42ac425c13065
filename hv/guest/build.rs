//! Builds the bare-metal guest with the system's C compiler and linker; the Rust toolchain needs no extra target.

use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCES: [&str; 18] = [
    // What all share.
    "entry.S",
    "processor.S",
    "boot.c",
    "console.c",
    "disk.c",
    "interrupts.c",
    "main.c",
    "record.c",
    // The roles.
    "sector_writer.c",
    "dirtier.c",
    "clock.c",
    "reader.c",
    "ping_pong.c",
    "listener.c",
    "balloon.c",
    "echo.c",
    "registers.c",
    "hold.S",
];

fn main() {
    let sources = Path::new("image");
    println!("cargo::rerun-if-changed=image");
    let image = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("guest.elf");
    let mut build = compiler();
    let objects = build.files(SOURCES.map(|name| sources.join(name))).compile_intermediates();
    link(build.get_compiler().to_command(), &sources.join("link.ld"), &objects, &image);
}

/// No floating point (a small KVM has no SSE), no red zone (interrupts use the same stack), nothing of a C library.
fn compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build.pic(false).opt_level(2).debug(false).warnings(true).extra_warnings(true).cargo_warnings(true);
    for flag in [
        "-std=gnu11",
        "-ffreestanding",
        "-mgeneral-regs-only",
        "-mno-red-zone",
        "-fno-stack-protector",
        "-fno-asynchronous-unwind-tables",
        "-fcf-protection=none",
        "-fno-tree-loop-distribute-patterns",
        "-fno-strict-aliasing",
        "-fno-pie",
    ] {
        build.flag(flag);
    }
    build
}

fn link(mut compiler: Command, script: &Path, objects: &[PathBuf], image: &Path) {
    compiler
        .args(["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,max-page-size=4096"])
        .args(["-Wl,-z,noexecstack", "-Wl,--no-warn-rwx-segments"])
        .arg(format!("-Wl,-T,{}", script.display()))
        .arg("-o")
        .arg(image)
        .args(objects);
    let status = compiler.status().expect("the C compiler that built the objects also links them");
    assert!(status.success(), "linking the guest failed: {compiler:?}");
}
