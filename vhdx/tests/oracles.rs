//! Readers that have nothing in common with us or qemu read our images as we do: 7-Zip, libvhdi, dissect.hypervisor.
//!
//! | reader | here asked for | not asked, because it is wrong there |
//! |---|---|---|
//! | 7-Zip | dynamic, fixed, 4 KiB sectors, chains, of the samples and of ours | disks of odd size; dirty logs |
//! | libvhdi | dynamic, fixed, 4 KiB sectors | ZERO and UNMAPPED blocks of children (it shows the parent) |
//! | dissect | dynamic, fixed, 4 KiB sectors, chains of two | reads that begin within a block of a chain |
//! | qemu-img | the base of a chain, after a merge | children |

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};

use blockio::{BlockDevice, ImageFile, IoOp};
use common::{MIB, Random, content_hash, image_file, new_file, read_only, run, text, unpack};
use vhdx::{Builder, ChildSpec, Disk, HostFiles, ParentResolver, Spec};

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

/// A chain in a folder: `0.vhdx` <- `1.avhdx` <- ..., each written by a guest that also zeroes and discards.
struct Chain {
    folder: PathBuf,
    size_bytes: u64,
    sector: u64,
}

impl Chain {
    fn begin(folder: &Path, spec: &Spec) -> Self {
        // As the resolver names it.
        let folder = std::fs::canonicalize(folder).expect("it exists");
        let chain = Self { folder, size_bytes: spec.size_bytes, sector: spec.logical_sector.into() };
        vhdx::create(&*new_file(&chain.path(0)), spec).expect("it is created");
        chain.write(0);
        chain
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number}.{}", if number == 0 { "vhdx" } else { "avhdx" }))
    }

    fn open(&self, number: u64) -> Builder {
        let resolver = ParentResolver::new(Arc::new(HostFiles::default())).root(text(&self.folder));
        Builder::open(image_file(&self.path(number))).parents(resolver, text(&self.path(number)))
    }

    /// Adds a child to number - 1, with blocks of this size.
    fn child(&self, number: u64, block_bytes: u64) {
        let resolver = ParentResolver::new(Arc::new(HostFiles::default())).root(text(&self.folder));
        let (child, parent) = (self.path(number), self.path(number - 1));
        let paths = resolver.paths(text(&child), text(&parent)).expect("both are paths");
        let parent = self.open(number - 1).read_only().expect("it opens");
        let spec = ChildSpec { block_bytes, ..ChildSpec::new(paths) };
        vhdx::create_child(&*new_file(&child), &parent, &spec).expect("it is created");
        self.write(number);
    }

    /// Adds one as a guest gets it that goes on writing.
    fn snapshot(&self, number: u64) {
        let disk = self.open(number - 1).writable().expect("it opens for writing");
        let file: Arc<dyn ImageFile> = new_file(&self.path(number));
        disk.snapshot(&file, text(&self.path(number))).expect("it forks");
        self.write_to(&disk, number);
        disk.close().expect("it closes");
    }

    fn write(&self, number: u64) {
        let disk = self.open(number).writable().expect("it opens for writing");
        self.write_to(&disk, number);
        disk.close().expect("it closes");
    }

    fn write_to(&self, disk: &Disk, number: u64) {
        let mut random = Random(number + 77);
        for round in 0..60_u8 {
            let at = random.below(self.size_bytes / self.sector) * self.sector;
            let len = ((random.below(48) + 1) * self.sector).min(self.size_bytes - at);
            let op = match round % 12 {
                10 => IoOp::WriteZeroes { offset: at, len, may_unmap: true },
                11 => IoOp::Discard { offset: at / (4 * MIB) * 4 * MIB, len: 4 * MIB },
                _ => {
                    let value = round + 1 + u8::try_from(number).expect("few") * 64;
                    let bytes = vec![value; usize::try_from(len).expect("small")];
                    disk.write_at(at, &bytes).expect("it is writable");
                    continue;
                }
            };
            disk.run(op).expect("it zeroes and discards");
        }
    }

    fn ours(&self, number: u64) -> String {
        content_hash(&self.open(number).read_only().expect("it opens"), &self.folder)
    }
}

#[test]
fn chains_of_ours_are_read_alike_by_seven_zip_and_by_dissect() {
    for logical_sector in [512, 4096] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let spec = Spec { logical_sector, block_bytes: 4 * MIB, ..Spec::dynamic(40 * MIB) };
        let chain = Chain::begin(folder.path(), &spec);
        // Blocks of the size of a step: dissect reads partly present ones right only from their start.
        chain.child(1, MIB);
        assert_eq!(python_hash("dissect", &[&chain.path(1)]), chain.ours(1), "dissect, {logical_sector}");
        chain.snapshot(2);
        chain.child(3, 32 * MIB);
        for number in 0..4 {
            let image = chain.path(number);
            assert_eq!(seven_zip_hash(&image), chain.ours(number), "7-Zip, {number} of {logical_sector}");
        }
    }
}

// What a merge leaves is a chain like any other.
#[test]
fn a_chain_of_ours_is_read_alike_by_seven_zip_after_a_merge() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let chain = Chain::begin(folder.path(), &Spec { block_bytes: 4 * MIB, ..Spec::dynamic(40 * MIB) });
    chain.child(1, 2 * MIB);
    chain.child(2, 2 * MIB);
    let before = chain.ours(2);
    let disk = chain.open(2).writable().expect("it opens for writing");
    let handle = |number| -> Arc<dyn ImageFile> { image_file(&chain.path(number)) };
    disk.merge_parent(&handle(1), &handle(0), &mut |_| ()).expect("it merges");
    disk.close().expect("it closes");
    std::fs::remove_file(chain.path(1)).expect("nobody needs it");
    assert_eq!(chain.ours(2), before);
    assert_eq!(seven_zip_hash(&chain.path(2)), before, "7-Zip");
    assert_eq!(qemu_hash(&chain.path(0), folder.path()), chain.ours(0), "qemu-img reads the base");
}

fn qemu_hash(path: &Path, folder: &Path) -> String {
    common::qemu_img(&["check", "-f", "vhdx", text(path)]);
    let raw = folder.join("base.raw");
    common::qemu_img(&["convert", "-f", "vhdx", "-O", "raw", text(path), text(&raw)]);
    let hash = run(Command::new("sha256sum").arg(&raw));
    hash.split(' ').next().expect("sha256sum prints the hash first").to_owned()
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
