//! Readers that have nothing in common with us or qemu read our images as we do: 7-Zip, libvhdi, dissect.hypervisor.
//!
//! | reader | here asked for | not asked, because it is wrong there |
//! |---|---|---|
//! | 7-Zip | dynamic, fixed, 4 KiB sectors, chains | disks of odd size; dirty logs |
//! | libvhdi | dynamic, fixed, 4 KiB sectors | ZERO and UNMAPPED blocks of children (it shows the parent) |
//! | dissect | dynamic, fixed, 4 KiB sectors, chains of two | reads that begin within a block of a chain |

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};

use blockio::{BlockDevice, ImageFile, IoOp};
use common::{MIB, Random, content_hash, image_file, new_file, read_only, run, text, unpack};
use vhdx::{Builder, Spec};

/// The Python packages, in a folder of their own below the build's.
fn packages() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vhdx-oracles-1");
        if !folder.join("complete").exists() {
            let mut pip = Command::new("python3");
            pip.args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-input",
                "--upgrade",
                "--target",
                text(&folder),
            ]);
            run(pip.args(["libvhdi-python==20260901", "dissect.hypervisor==3.21"]));
            std::fs::write(folder.join("complete"), "").expect("the build folder is writable");
        }
        folder
    })
}

fn python_hash(tool: &str, images: &[&Path]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracles/read.py");
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", packages()).arg(script).arg(tool).args(images);
    run(&mut command).trim().to_owned()
}

fn seven_zip_hash(image: &Path) -> String {
    let mut unpacker = Command::new("7zz")
        .args(["x", "-so", "-tvhdx", text(image)])
        .stdout(Stdio::piped())
        .spawn()
        .expect("7zz starts; these tests need the package 7zip");
    let output = unpacker.stdout.take().expect("piped");
    let hash = run(Command::new("sha256sum").stdin(output));
    assert!(unpacker.wait().expect("7zz ends").success(), "7zz complains of {}", image.display());
    hash.split(' ').next().expect("sha256sum prints the hash first").to_owned()
}

/// An image in which every kind of block occurs, closed in order.
fn image(path: &Path, spec: &Spec, seed: u64) -> Arc<dyn ImageFile> {
    vhdx::create(&*new_file(path), spec).expect("it is created");
    let disk = Builder::open(image_file(path)).writable().expect("it opens for writing");
    let (mut random, sector) = (Random(seed), u64::from(spec.logical_sector));
    for round in 0..40_u8 {
        let at = random.below(spec.size_bytes / sector) * sector;
        let len = ((random.below(64) + 1) * sector).min(spec.size_bytes - at);
        let bytes = vec![round + 1; usize::try_from(len).expect("small")];
        disk.write_at(at, &bytes).expect("it is writable");
    }
    for (block, op) in [(1, true), (2, false)] {
        let (offset, len) = (block * spec.block_bytes, spec.block_bytes);
        if offset + len <= spec.size_bytes {
            disk.run(match op {
                true => IoOp::Discard { offset, len },
                false => IoOp::WriteZeroes { offset, len, may_unmap: true },
            })
            .expect("it takes discards");
        }
    }
    disk.close().expect("it closes");
    drop(disk);
    image_file(path)
}

fn all_agree(spec: &Spec, seed: u64) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("disk.vhdx");
    let ours = content_hash(&read_only(&image(&path, spec, seed)), folder.path());
    assert_eq!(python_hash("libvhdi", &[&path]), ours, "libvhdi, {spec:?}");
    assert_eq!(python_hash("dissect", &[&path]), ours, "dissect, {spec:?}");
    if spec.size_bytes.is_multiple_of(MIB) {
        assert_eq!(seven_zip_hash(&path), ours, "7-Zip, {spec:?}");
    }
}

#[test]
fn dynamic_images_are_read_alike_by_all() {
    all_agree(&Spec { block_bytes: MIB, ..Spec::dynamic(24 * MIB) }, 1);
    all_agree(&Spec { block_bytes: 2 * MIB, physical_sector: 512, ..Spec::dynamic(23 * MIB + 512) }, 2);
    all_agree(&Spec { block_bytes: 256 * MIB, ..Spec::dynamic(40 * MIB) }, 3);
    all_agree(&Spec::dynamic(100 * MIB), 4);
}

#[test]
fn fixed_images_are_read_alike_by_all() {
    all_agree(&Spec { block_bytes: 2 * MIB, ..Spec::fixed(20 * MIB) }, 5);
}

#[test]
fn images_with_4096_byte_sectors_are_read_alike_by_all() {
    let spec = Spec { logical_sector: 4096, block_bytes: MIB, ..Spec::dynamic(24 * MIB) };
    all_agree(&spec, 6);
    all_agree(&Spec { size_bytes: 23 * MIB + 4096, ..spec }, 7);
}

#[test]
fn the_samples_are_read_by_others_as_expected() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let parent = unpack("syn-parent.vhdx", folder.path());
    let child = unpack("syn-child.avhdx", folder.path());
    let expected = "d18586bbe25e891b3a70ce2372861080cf356ed9ddedeae274b0a1b26c7b8e6c";
    assert_eq!(seven_zip_hash(&child), expected, "7-Zip through a chain");
    assert_eq!(python_hash("dissect", &[&child]), expected, "dissect through a chain");
    let expected = "0ecb56fb46fddbd1645b9224a1a04f1301f133e60846c89532a87374b1350c57";
    assert_eq!(python_hash("libvhdi", &[&parent]), expected, "libvhdi");
}
