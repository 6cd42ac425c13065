//! An initial RAM disk: busybox, kernel modules in their order, programs with the libraries that they need.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::kernel::Kernel;
use crate::tool::{Doing, LabError, run, run_in, text};

/// What every init does first; the words of its own follow. What it says goes where commands are given, not where the kernel writes.
const INIT_HEAD: &str = "#!/bin/busybox sh
export PATH=/bin:/sbin HOME=/
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /sbin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
exec < /dev/ttyS0 > /dev/ttyS0 2>&1
for module in $(cat /modules.order); do insmod /modules/$module || echo \"module $module: not loaded\"; done
word() { sed -n \"s/.*\\b$1=\\([^ ]*\\).*/\\1/p\" /proc/cmdline; }
";

/// A root filesystem under construction. The folder goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Tree {
    folder: tempfile::TempDir,
}

impl Tree {
    /// A tree with busybox and an init that does what `init` says after the usual beginning.
    pub(crate) fn new(init: &str) -> Result<Self, LabError> {
        let tree = Self { folder: tempfile::tempdir().doing("making a temporary folder")? };
        tree.add_file(Path::new("/bin/busybox"), "bin/busybox", 0o755)?;
        tree.add_text("init", &format!("{INIT_HEAD}{init}"), 0o755)?;
        tree.add_text("modules.order", "", 0o644)?;
        Ok(tree)
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn add_text(&self, at: &str, content: &str, mode: u32) -> Result<(), LabError> {
        let to = self.place(at)?;
        fs::write(&to, content).doing(format_args!("writing {at}"))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode))
            .doing(format_args!("setting the mode of {at}"))
    }

    pub(crate) fn add_file(&self, from: &Path, at: &str, mode: u32) -> Result<(), LabError> {
        let to = self.place(at)?;
        fs::copy(from, &to).doing(format_args!("copying {}", from.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode))
            .doing(format_args!("setting the mode of {at}"))
    }

    /// A program in `/bin`, with its libraries at their own places.
    pub(crate) fn add_program(&self, program: &Path) -> Result<(), LabError> {
        let name = program.file_name().and_then(|name| name.to_str()).expect("a program has a name");
        self.add_file(program, &format!("bin/{name}"), 0o755)?;
        // What only a debugger reads would take minutes to unpack in emulation, and most of the machine's memory.
        run("strip", &["--strip-debug", text(&self.path().join("bin").join(name))])?;
        for library in libraries(program)? {
            let at = text(&library).trim_start_matches('/').to_owned();
            if !self.path().join(&at).exists() {
                self.add_file(&library, &at, 0o755)?;
            }
        }
        Ok(())
    }

    /// Modules with all that they need; the init loads them in this order.
    pub(crate) fn add_modules(&self, kernel: &Kernel, names: &[&str]) -> Result<(), LabError> {
        let mut order = String::new();
        for file in kernel.modules(names)? {
            let name = file.file_name().and_then(|name| name.to_str()).expect("a module has a name");
            self.add_file(&file, &format!("modules/{name}"), 0o644)?;
            order += &format!("{name}\n");
        }
        self.add_text("modules.order", &order, 0o644)
    }

    /// Packs everything into `image`.
    pub(crate) fn pack(&self, image: &Path) -> Result<(), LabError> {
        let command = format!("find . | cpio --quiet -o -H newc | gzip -1 > '{}'", text(image));
        run_in(self.path(), "sh", &["-c", &command]).map(drop)
    }

    fn place(&self, at: &str) -> Result<PathBuf, LabError> {
        let to = self.path().join(at);
        fs::create_dir_all(to.parent().expect("below the root"))
            .doing(format_args!("making folders for {at}"))?;
        Ok(to)
    }
}

/// What the dynamic linker would load; nothing for a static program.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, LabError> {
    let Ok(list) = run("ldd", &[text(program)]) else { return Ok(Vec::new()) };
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(list.lines().filter_map(path).collect())
}
