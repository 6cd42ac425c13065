//! `passthrough_hp`: built from Debian's source of libfuse, mounted over a folder.
//!
//! It passes `O_DIRECT` on to its own files, but the data of a write lies behind the request's header in its memory, where direct
//! I/O cannot take it from. So its writes go through a library that copies them to an aligned place; splicing, which has the same
//! trouble and no such remedy, is off.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Fetches the source without touching the machine's own lists, and compiles the example against the installed library.
const BUILD: &str = r#"
set -eu
mkdir -p lists/partial
echo "deb-src http://deb.debian.org/debian $(. /etc/os-release; echo "$VERSION_CODENAME") main" > debsrc.list
apt="-o Dir::Etc::sourcelist=$PWD/debsrc.list -o Dir::Etc::sourceparts=- -o Dir::State::lists=$PWD/lists"
apt-get -qq $apt update
apt-get -qq $apt source --download-only fuse3
rm -rf source && dpkg-source -x fuse3_*.dsc source
g++ -O2 -std=c++17 -D_FILE_OFFSET_BITS=64 -Isource/include -o passthrough_hp source/example/passthrough_hp.cc \
    $(pkg-config fuse3 --cflags --libs)
cat > align.c <<'END'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
ssize_t pwrite64(int fd, const void *from, size_t len, off_t at) {
    static ssize_t (*next)(int, const void *, size_t, off_t);
    static __thread void *copy;
    if (!next) next = dlsym(RTLD_NEXT, "pwrite64");
    if (((unsigned long)from & 4095) == 0 || len > (1 << 20)) return next(fd, from, len, at);
    if (!copy && posix_memalign(&copy, 4096, 1 << 20)) _exit(1);
    memcpy(copy, from, len);
    return next(fd, copy, len, at);
}
END
cc -O2 -shared -fPIC -o align.so align.c -ldl
"#;

/// A mount, gone when dropped.
pub(crate) struct Passthrough {
    mount: PathBuf,
    server: std::process::Child,
}

impl Passthrough {
    /// None where it cannot be built or mounted.
    pub(crate) fn start(folder: &Path) -> Option<Self> {
        let program = program()?;
        let (source, mount) = (folder.join("passthrough-source"), folder.join("passthrough"));
        std::fs::create_dir(&source).ok()?;
        std::fs::create_dir(&mount).ok()?;
        let mut command = Command::new(&program);
        command.args(["--foreground", "--nosplice"]).arg(&source).arg(&mount);
        command.env("LD_PRELOAD", program.with_file_name("align.so"));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let server = command.spawn().ok()?;
        let mut new = Self { mount, server };
        new.wait_until_mounted().then_some(new)
    }

    /// It is mounted when the mountpoint is on another device than its folder.
    fn wait_until_mounted(&mut self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let device = |path: &Path| std::fs::metadata(path).map(|about| about.dev()).ok();
        let outside = self.mount.parent().and_then(device);
        while self.server.try_wait().is_ok_and(|ended| ended.is_none()) {
            if device(&self.mount) != outside {
                return true;
            }
            std::thread::yield_now();
        }
        false
    }

    pub(crate) fn mount(&self) -> &Path {
        &self.mount
    }
}

impl Drop for Passthrough {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.mount).status().is_ok_and(|status| status.success());
        if !unmounted {
            drop(self.server.kill());
        }
        drop(self.server.wait());
    }
}

/// Builds it, unless that was done before.
pub(crate) fn program() -> Option<PathBuf> {
    let folder = std::env::current_exe().ok()?.parent()?.parent()?.join("suites/fuse3");
    let program = folder.join("passthrough_hp");
    if !program.is_file() || !folder.join("align.so").is_file() {
        std::fs::create_dir_all(&folder).ok()?;
        let built = Command::new("sh").arg("-c").arg(BUILD).current_dir(&folder).status().ok()?;
        built.success().then_some(())?;
    }
    Some(program)
}
