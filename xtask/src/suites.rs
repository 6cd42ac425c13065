//! Suites of others that tests run on mounts: programs from the package registry, built once into `target/suites`.

use crate::run::{cargo, target_dir};

/// Names and versions; another version may ask for something else.
const SUITES: &[(&str, &str)] = &[("pjdfstest", "0.2.2"), ("fsx", "0.3.2")];

/// Builds what is missing. What cannot be had is named: what is ours is tested all the same.
pub(crate) fn ensure() -> Vec<&'static str> {
    let folder = target_dir().join("suites");
    let missing = SUITES.iter().filter(|(name, _)| !folder.join("bin").join(name).is_file());
    let failed = missing.filter(|(name, version)| {
        println!("xtask: building {name} {version}");
        let (place, wanted) = (folder.to_string_lossy(), format!("{name}@{version}"));
        cargo(&["install", "--quiet", "--locked", "--root", &place, &wanted]).is_err()
    });
    failed.map(|(name, _)| *name).collect()
}
