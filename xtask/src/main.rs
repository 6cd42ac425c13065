//! Sets up the machine, runs the demo and the tests.
fn main() {}
