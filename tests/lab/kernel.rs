//! The stock Debian kernel: its package is downloaded and unpacked, never installed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::tool::{Doing, LabError, run, run_in, text};

/// The package that always names the newest one.
const META_PACKAGE: &str = "linux-image-amd64";
/// A network that does not answer is none.
const APT_OPTIONS: [&str; 4] = ["-o", "Acquire::http::Timeout=60", "-o", "Acquire::Retries=1"];
/// There once the unpacked kernel is whole.
const WHOLE: &str = "unpacked";

/// An unpacked kernel with its modules.
#[derive(Debug)]
pub(crate) struct Kernel {
    folder: PathBuf,
    pub(crate) version: String,
    /// Module to its file, and the files that it needs, in the order of `modules.dep`.
    modules: BTreeMap<String, (String, Vec<String>)>,
}

impl Kernel {
    /// Gets the kernel into `cache`, unless it is there already.
    pub(crate) fn get(cache: &Path) -> Result<Self, LabError> {
        Self::get_known(cache).or_else(|_| {
            // The lists of packages may be too old, or not there at all.
            run("apt-get", &[&APT_OPTIONS[..], &["update", "-qq"]].concat())?;
            Self::get_known(cache)
        })
    }

    fn get_known(cache: &Path) -> Result<Self, LabError> {
        let package = newest_package()?;
        let version = package.trim_start_matches("linux-image-").to_owned();
        let folder = cache.join(&package);
        if !folder.join(WHOLE).exists() {
            drop(fs::remove_dir_all(&folder));
            fs::create_dir_all(&folder).doing("making a folder for the kernel")?;
            // apt's own user for downloads may not write here, which is a warning and no harm.
            run_in(&folder, "apt-get", &[&APT_OPTIONS[..], &["download", "-qq", &package]].concat())?;
            let archive = only_file(&folder, ".deb")?;
            run("dpkg-deb", &["-x", text(&archive), text(&folder)])?;
            fs::remove_file(&archive).doing("removing the package's file")?;
            run("depmod", &["-b", text(&folder), &version])?;
            fs::write(folder.join(WHOLE), "").doing("marking the kernel as whole")?;
        }
        let modules = read_dependencies(&folder.join("lib/modules").join(&version))?;
        Ok(Self { folder, version, modules })
    }

    /// The image that a loader takes.
    pub(crate) fn image(&self) -> PathBuf {
        self.folder.join("boot").join(format!("vmlinuz-{}", self.version))
    }

    /// Files of the named modules and of all that they need, in the order in which they must be loaded.
    pub(crate) fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>, LabError> {
        let mut order: Vec<&str> = Vec::new();
        for name in names {
            let (file, needs) = self
                .modules
                .get(*name)
                .ok_or_else(|| LabError::new(format!("kernel {} has no module {name}", self.version)))?;
            for file in needs.iter().rev().chain([file]) {
                if !order.contains(&file.as_str()) {
                    order.push(file);
                }
            }
        }
        let base = self.folder.join("lib/modules").join(&self.version);
        Ok(order.into_iter().map(|file| base.join(file)).collect())
    }
}

fn newest_package() -> Result<String, LabError> {
    let depends = run("apt-cache", &["depends", "--important", META_PACKAGE])?;
    let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    package.map(str::to_owned).ok_or_else(|| {
        LabError::new(format!(
            "apt does not know {META_PACKAGE}: run `apt-get update`, or add Debian's main archive"
        ))
    })
}

fn only_file(folder: &Path, ending: &str) -> Result<PathBuf, LabError> {
    let entries = fs::read_dir(folder).doing("reading the kernel's folder")?;
    let found = entries.flatten().map(|entry| entry.path()).find(|path| text(path).ends_with(ending));
    found.ok_or_else(|| LabError::new(format!("no {ending} file was downloaded")))
}

fn read_dependencies(folder: &Path) -> Result<BTreeMap<String, (String, Vec<String>)>, LabError> {
    let list = fs::read_to_string(folder.join("modules.dep")).doing("reading modules.dep")?;
    let parse = |line: &str| {
        let (file, needs) = line.split_once(':')?;
        let name = file.rsplit('/').next()?.split('.').next()?;
        Some((name.to_owned(), (file.to_owned(), needs.split_whitespace().map(str::to_owned).collect())))
    };
    Ok(list.lines().filter_map(parse).collect())
}
