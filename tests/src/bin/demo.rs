//! The main job, told as a timeline: an image from another tool becomes a VM's disk on a shared LUN, the coordinator
//! moves while the VM writes, the VM moves between nodes without its disk being copied, and everything is there at the
//! end.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people at a terminal")]
#![expect(clippy::disallowed_methods, reason = "the timeline shows how long each step took")]

#[path = "../demo/story.rs"]
mod story;
#[path = "../demo/timeline.rs"]
mod timeline;

use std::process::ExitCode;

fn main() -> ExitCode {
    let keep = std::env::args().any(|argument| argument == "--keep");
    match std::panic::catch_unwind(|| story::tell(keep)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => {
            eprintln!("the demo failed; run it with KEEP_CLUSTER=1 to keep its folder and the nodes' logs");
            ExitCode::FAILURE
        }
    }
}
