//! What the guests do: the same image and command line under both.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use crate::Failure;

/// A load: RAM that cannot be compressed, and pages of it that are written at a set rate.
pub(crate) struct Load {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) memory_mib: u64,
    /// Filled by the loader, as an initial RAM disk.
    pub(crate) module_mib: u64,
    /// Written in turn.
    set_mib: u64,
    /// In percent of what the link carries.
    rate_percent: u64,
}

pub(crate) const LOADS: &[Load] = &[
    Load { name: "idle", title: "idle", memory_mib: 256, module_mib: 192, set_mib: 1, rate_percent: 0 },
    Load {
        name: "ten",
        title: "10 % of the link's rate written",
        memory_mib: 256,
        module_mib: 192,
        set_mib: 128,
        rate_percent: 10,
    },
    Load {
        name: "half",
        title: "50 % of the link's rate written",
        memory_mib: 256,
        module_mib: 192,
        set_mib: 128,
        rate_percent: 50,
    },
    Load {
        name: "gib",
        title: "idle, 1 GiB",
        memory_mib: 1024,
        module_mib: 900,
        set_mib: 1,
        rate_percent: 0,
    },
];

/// A guest as both sides start it.
pub(crate) struct Guest {
    pub(crate) memory_mib: u64,
    pub(crate) module: PathBuf,
    pub(crate) cmdline: String,
}

impl Load {
    /// The initial RAM disk, made anew.
    pub(crate) fn noise(&self, folder: &Path) -> Result<PathBuf, Failure> {
        let path = folder.join(format!("noise-{}", self.module_mib));
        if !path.exists() {
            let mut noise = File::open("/dev/urandom")?.take(self.module_mib << 20);
            std::io::copy(&mut noise, &mut File::create(&path)?)?;
        }
        Ok(path)
    }

    /// What is written, at 4 KiB a page: a page is written when a word of it is.
    pub(crate) fn rate_kib(&self, link_mbit: u64) -> u64 {
        // A rate of 0 would mean unbounded.
        (link_mbit * 1_000_000 / 8 / 1024 * self.rate_percent / 100).max(1)
    }

    pub(crate) fn guest(&self, rate_kib: u64, module: PathBuf) -> Guest {
        let cmdline = format!("role=dirtier module=1 set={} rate={rate_kib}", self.set_mib);
        Guest { memory_mib: self.memory_mib, module, cmdline }
    }
}

/// The guest's image as a file.
pub(crate) fn image(folder: &Path) -> Result<PathBuf, Failure> {
    let path = folder.join("guest.elf");
    File::create(&path)?.write_all(hv_guest::IMAGE)?;
    Ok(path)
}
