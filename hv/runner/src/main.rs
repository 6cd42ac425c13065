//! The hv process: wires a VM to its disks on a cluster volume.
fn main() {}
