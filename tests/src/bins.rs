//! Where the project's own programs are.

use std::path::PathBuf;

/// The built program `name`, in the same profile as the running one.
///
/// # Panics
/// When it was not built: `cargo xtask test` builds all programs before it runs the tests.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let me = std::env::current_exe().expect("a process knows its own program");
    // Tests lie in `deps`, programs one folder above.
    let found = me.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not built: run `cargo build --workspace --bins` first"))
}
