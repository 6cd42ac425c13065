//! The harness of the whole-system tests and of the demo: an embedded cluster of real processes, driven only through
//! `csvctl`, as a script of an administrator would.
//!
//! **Invariant:** whatever happens, nothing stays behind: a dropped [`Cluster`] has no process, mount or folder left.
#![expect(clippy::disallowed_methods, reason = "a harness bounds its waits and reports how long things took")]

mod bins;
mod cluster;
mod ctl;
pub mod fire;
mod follower;
mod guest;
mod hosts;
mod image;
mod moves;
mod wait;

pub use bins::binary;
pub use cluster::Cluster;
pub use ctl::{Ctl, CtlError};
pub use follower::Follower;
pub use guest::Guest;
pub use hosts::Host;
pub use image::{ExtImage, run_tool, sha256_of};
pub use moves::{MovesUnderLoad, move_under_load};
pub use wait::{PATIENCE, until};
