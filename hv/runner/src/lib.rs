//! The hv process as a library: what a supervisor needs to start one and to talk to it, and the process itself.

pub mod config;
mod failure;

pub use failure::Failure;
