//! What the tests share: files, foreign tools, patterns.
#![expect(dead_code, reason = "every test program uses another part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use blockio::{BlockDevice, FileDevice, ImageFile, MemoryDevice, OpenOptions};
use vhdx::{Builder, ChildSpec, Disk, Image, ParentResolver, Report, Spec, create, create_child};

pub(crate) const MIB: u64 = 1 << 20;

/// Opens a file for image I/O.
pub(crate) fn image_file(path: &Path) -> Arc<dyn ImageFile> {
    Arc::new(FileDevice::open(path, OpenOptions::buffered()).expect("the image file opens"))
}

/// A new empty file for image I/O.
pub(crate) fn new_file(path: &Path) -> Arc<dyn ImageFile> {
    std::fs::File::create(path).expect("the test folder is writable");
    image_file(path)
}

/// Unpacks a sample into a folder.
pub(crate) fn unpack(name: &str, into: &Path) -> PathBuf {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(format!("{name}.gz.gz"));
    let target = into.join(name);
    let mut outer =
        Command::new("gzip").arg("-dc").arg(packed).stdout(Stdio::piped()).spawn().expect("gzip runs");
    let inner = Command::new("gzip")
        .arg("-dc")
        .stdin(outer.stdout.take().expect("piped"))
        .stdout(std::fs::File::create(&target).expect("the test folder is writable"))
        .status();
    assert!(inner.expect("gzip runs").success() && outer.wait().expect("gzip ends").success());
    target
}

/// Converts an image to raw and hashes it.
pub(crate) fn content_hash(image: &Image, folder: &Path) -> String {
    let path = folder.join("content.raw");
    vhdx::to_raw(image, &*new_file(&path), &mut |_| ()).expect("the image is readable");
    let hash = sha256(&path);
    std::fs::remove_file(&path).expect("it was just written");
    hash
}

/// SHA-256 of a file.
pub(crate) fn sha256(path: &Path) -> String {
    run(Command::new("sha256sum").arg(path))
        .split(' ')
        .next()
        .expect("sha256sum prints the hash first")
        .to_owned()
}

/// Runs a tool that must succeed; its output.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| {
        panic!("{command:?} does not start ({error}); these tests need qemu-utils and coreutils")
    });
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?} failed:\n{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// `qemu-img ARGS`.
pub(crate) fn qemu_img(args: &[&str]) -> String {
    run(Command::new("qemu-img").args(args))
}

/// A path as text.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Our own check finds nothing.
pub(crate) fn assert_sound(file: &Arc<dyn ImageFile>) -> Report {
    let report = vhdx::check(file);
    assert!(report.is_sound(), "the image is not sound: {:?}", report.errors);
    report
}

/// Opens for reading.
pub(crate) fn read_only(file: &Arc<dyn ImageFile>) -> Image {
    Builder::open(Arc::clone(file)).read_only().expect("the image opens")
}

/// The bytes of a range.
pub(crate) fn bytes_at(device: &dyn BlockDevice, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    device.read_at(offset, &mut bytes).expect("the range is readable");
    bytes
}

/// A small generator of pseudo-random numbers; the seed reproduces the run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A folder in memory.
#[derive(Clone, Default)]
pub(crate) struct Folder(pub(crate) BTreeMap<String, Arc<dyn ImageFile>>);

impl Folder {
    pub(crate) fn add(&mut self, name: &str) -> Arc<dyn ImageFile> {
        let file: Arc<dyn ImageFile> = Arc::new(MemoryDevice::new(0));
        self.0.insert(path(name), Arc::clone(&file));
        file
    }

    pub(crate) fn resolver(&self) -> ParentResolver {
        ParentResolver::new(Arc::new(self.0.clone())).root("/vms")
    }

    pub(crate) fn open(&self, name: &str) -> Builder {
        Builder::open(Arc::clone(&self.0[&path(name)])).parents(self.resolver(), &path(name))
    }

    pub(crate) fn image(&self, name: &str) -> Image {
        self.open(name).read_only().expect("it opens")
    }

    pub(crate) fn disk(&self, name: &str) -> Disk {
        self.open(name).growth_bytes(2 * MIB).writable().expect("it opens for writing")
    }

    pub(crate) fn base(&mut self, name: &str, spec: &Spec) {
        create(&self.add(name), spec).expect("it is created");
    }

    pub(crate) fn child(&mut self, name: &str, parent: &str, change: impl FnOnce(&mut ChildSpec)) {
        let paths = self.resolver().paths(&path(name), &path(parent)).expect("both are paths");
        let mut spec = ChildSpec { block_bytes: MIB, ..ChildSpec::new(paths) };
        change(&mut spec);
        let parent = self.image(parent);
        create_child(&self.add(name), &parent, &spec).expect("it is created");
    }
}

/// Where [`Folder`] keeps a file.
pub(crate) fn path(name: &str) -> String {
    format!("/vms/{name}")
}
