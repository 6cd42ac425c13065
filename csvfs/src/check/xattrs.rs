//! Extended attributes: every one has an inode that counts it, and lists agree with modes.

use std::collections::BTreeMap;

use super::Findings;
use crate::acl::{ACCESS, Acl, DEFAULT};
use crate::meta::{Snapshot, StoreError};
use crate::proto::FileKind;

/// What the inodes say: kind, mode, number of attributes.
pub(super) type Expected = BTreeMap<u64, (FileKind, u32, u64)>;

/// `expected` has the inodes that say that they have attributes.
pub(super) fn check(
    snapshot: &Snapshot,
    expected: &Expected,
    findings: &mut Findings,
) -> Result<(), StoreError> {
    let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
    snapshot.each_xattr(|ino, name, value| {
        *seen.entry(ino).or_insert(0) += 1;
        match expected.get(&ino) {
            Some((kind, mode, _)) => check_list(ino, (*kind, *mode), (name, value), findings),
            None => findings.problem(ino, "an attribute of an inode that counts none, or is not there"),
        }
        Ok(())
    })?;
    for (&ino, &(.., counted)) in expected {
        let there = seen.get(&ino).copied().unwrap_or(0);
        if there != counted {
            findings.problem(ino, format!("{counted} attributes are counted, {there} are there"));
        }
    }
    findings.report.xattrs = seen.values().sum();
    Ok(())
}

fn check_list(
    ino: u64,
    (kind, mode): (FileKind, u32),
    (name, value): (&[u8], &[u8]),
    findings: &mut Findings,
) {
    if name != ACCESS && name != DEFAULT {
        return;
    }
    match Acl::parse(value) {
        None => findings.problem(ino, "an access control list that is none"),
        Some(acl) if name == ACCESS && acl.mode() != mode & 0o777 => {
            findings.problem(ino, format!("mode {:o}, access control list {:o}", mode & 0o777, acl.mode()));
        }
        Some(_) if name == DEFAULT && kind != FileKind::Directory => {
            findings.problem(ino, "a default access control list of what is no directory");
        }
        Some(_) => {}
    }
}
