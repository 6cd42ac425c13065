//! The cluster node daemon.
fn main() {}
