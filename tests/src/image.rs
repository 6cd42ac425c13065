//! Disk images made and judged by programs that are not ours.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a program that must succeed, and gives what it printed.
///
/// # Panics
/// With the program's output when it fails.
pub fn run_tool(program: &str, arguments: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).output();
    let output = output.unwrap_or_else(|error| panic!("{program} could not be started: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?} ended with {}: {text}{errors}", output.status);
    text
}

/// SHA-256 of a file, as `sha256sum` computes it.
///
/// # Panics
/// When the file cannot be read.
#[must_use]
pub fn sha256_of(path: &Path) -> String {
    let out = run_tool("sha256sum", &["--", path.to_str().expect("a UTF-8 path")]);
    out.split_whitespace().next().expect("a digest").to_owned()
}

/// An ext4 filesystem with known files, made by mke2fs.
#[derive(Debug)]
pub struct ExtImage {
    files: PathBuf,
    /// The filesystem, raw.
    pub raw: PathBuf,
}

impl ExtImage {
    /// Makes `count` files of growing sizes and a filesystem of `size_mib` that holds them.
    ///
    /// # Panics
    /// When the folder cannot be written, or mke2fs fails.
    #[must_use]
    pub fn create(folder: &Path, count: u32, size_mib: u32) -> Self {
        let files = folder.join("files");
        fs::create_dir_all(files.join("nested/deeper")).expect("folders for the files");
        for number in 0..count {
            let place = if number % 3 == 0 { "nested/deeper" } else { "." };
            let path = files.join(place).join(format!("file-{number:03}"));
            fs::write(path, known_bytes(number)).expect("a file");
        }
        let raw = folder.join("ext4.raw");
        let text = |path: &Path| path.to_str().expect("a UTF-8 path").to_owned();
        run_tool(
            "mke2fs",
            &["-q", "-F", "-t", "ext4", "-d", &text(&files), &text(&raw), &format!("{size_mib}M")],
        );
        Self { files, raw }
    }

    /// Checks that `raw` is clean and holds the same files. Gives how many were compared.
    ///
    /// # Panics
    /// When e2fsck finds anything, or a file differs.
    pub fn verify(&self, raw: &Path, scratch: &Path) -> usize {
        let image = raw.to_str().expect("a UTF-8 path");
        run_tool("e2fsck", &["-f", "-n", image]);
        fs::create_dir_all(scratch).expect("a folder for the extracted files");
        run_tool("debugfs", &["-R", &format!("rdump / {}", scratch.display()), image]);
        compare_trees(&self.files, scratch)
    }
}

/// Content of file `number`: text lines that name their own place, so that a shifted block is seen at once.
fn known_bytes(number: u32) -> Vec<u8> {
    let lines = 10 + number * 37;
    (0..lines)
        .flat_map(|line| {
            format!("file {number} line {line} {:08x}\n", line.wrapping_mul(2_654_435_761)).into_bytes()
        })
        .collect()
}

fn compare_trees(expected: &Path, found: &Path) -> usize {
    let mut compared = 0;
    for entry in fs::read_dir(expected).expect("the expected folder") {
        let entry = entry.expect("an entry");
        let twin = found.join(entry.file_name());
        if entry.path().is_dir() {
            compared += compare_trees(&entry.path(), &twin);
        } else {
            let same = fs::read(entry.path()).expect("the original") == fs::read(&twin).unwrap_or_default();
            assert!(same, "{} differs from the original", twin.display());
            compared += 1;
        }
    }
    compared
}
