//! Inodes, directory entries and the tree that they form.
//!
//! **Invariant:** every inode is counted once; links are counted from the entries, never believed.

use std::collections::{BTreeMap, BTreeSet};

use super::Findings;
use crate::ROOT_INO;
use crate::meta::{InodeRecord, Snapshot, StoreError};
use crate::proto::FileKind;

/// What the entries say about an inode, beside what it says itself.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) kind: FileKind,
    pub(super) blocks: u64,
    nlink: u32,
    parent: u64,
    entries: u64,
    next_cookie: u64,
    links: u64,
    subdirs: u64,
    entries_seen: u64,
}

pub(super) type Nodes = BTreeMap<u64, Node>;

pub(super) fn check(snapshot: &Snapshot, findings: &mut Findings) -> Result<Nodes, StoreError> {
    let mut nodes = Nodes::new();
    let mut with_xattrs = super::xattrs::Expected::new();
    snapshot.each_inode(|ino, inode| {
        check_inode(ino, &inode, findings);
        if inode.xattrs > 0 {
            with_xattrs.insert(ino, (inode.kind(), inode.mode, inode.xattrs));
        }
        nodes.insert(ino, node_of(&inode));
        Ok(())
    })?;
    super::xattrs::check(snapshot, &with_xattrs, findings)?;
    check_counters(snapshot, &nodes, findings)?;
    check_entries(snapshot, &mut nodes, findings)?;
    check_cookies(snapshot, findings)?;
    let orphans: BTreeSet<u64> = snapshot.orphans()?.into_iter().collect();
    check_links(&nodes, &orphans, findings);
    check_ways_up(&nodes, &orphans, findings);
    findings.report.inodes = nodes.len() as u64;
    findings.report.directories = nodes.values().filter(|n| n.kind == FileKind::Directory).count() as u64;
    findings.report.orphans = orphans.len() as u64;
    Ok(nodes)
}

fn node_of(inode: &InodeRecord) -> Node {
    Node {
        kind: inode.kind(),
        blocks: inode.blocks,
        nlink: inode.nlink,
        parent: inode.parent,
        entries: inode.entries,
        next_cookie: inode.next_cookie,
        links: 0,
        subdirs: 0,
        entries_seen: 0,
    }
}

fn check_inode(ino: u64, inode: &InodeRecord, findings: &mut Findings) {
    if inode.kind() == FileKind::Unknown {
        findings.problem(ino, "an inode of no kind");
    }
    if inode.kind() == FileKind::Symlink && inode.target.len() as u64 != inode.size_bytes {
        findings.problem(ino, "the size of a symlink is not the length of its target");
    }
}

fn check_counters(snapshot: &Snapshot, nodes: &Nodes, findings: &mut Findings) -> Result<(), StoreError> {
    let Ok(globals) = snapshot.globals() else {
        findings.problem(0, "the counters of inodes cannot be read");
        return Ok(());
    };
    if let Some((&highest, _)) = nodes.last_key_value().filter(|(ino, _)| **ino >= globals.next_ino) {
        findings.problem(highest, format!("the next inode number, {}, is in use", globals.next_ino));
    }
    if globals.inodes != nodes.len() as u64 {
        findings.problem(0, format!("{} inodes are counted, {} are there", globals.inodes, nodes.len()));
    }
    Ok(())
}

fn check_entries(snapshot: &Snapshot, nodes: &mut Nodes, findings: &mut Findings) -> Result<(), StoreError> {
    snapshot.each_dirent(|parent, name, dirent| {
        let told = String::from_utf8_lossy(name).into_owned();
        match nodes.get_mut(&parent) {
            Some(dir) if dir.kind == FileKind::Directory => {
                dir.entries_seen += 1;
                dir.subdirs += u64::from(dirent.kind == FileKind::Directory);
                if dirent.cookie >= dir.next_cookie {
                    findings.problem(parent, format!("the cookie of '{told}' is ahead of its directory"));
                }
            }
            _ => findings.problem(parent, format!("entry '{told}' is in what is no directory")),
        }
        match nodes.get_mut(&dirent.ino) {
            Some(node) => {
                node.links += 1;
                if node.kind != dirent.kind {
                    findings.problem(dirent.ino, format!("entry '{told}' has another kind than its inode"));
                }
                if node.kind == FileKind::Directory && node.parent != parent {
                    findings.problem(dirent.ino, format!("directory '{told}' names another parent"));
                }
            }
            None => findings.problem(dirent.ino, format!("entry '{told}' names a missing inode")),
        }
        let listed = match dirent.cookie.checked_sub(1) {
            Some(before) => snapshot.list(parent, before, 1)?.pop(),
            None => None,
        };
        if listed.is_none_or(|l| l.cookie != dirent.cookie || l.name != name || l.ino != dirent.ino) {
            findings.problem(parent, format!("entry '{told}' is not in the order of its directory"));
        }
        Ok(())
    })
}

fn check_cookies(snapshot: &Snapshot, findings: &mut Findings) -> Result<(), StoreError> {
    snapshot.each_cookie(|parent, listed| {
        let entry = snapshot.dirent(parent, &listed.name)?;
        if entry.is_none_or(|e| e.cookie != listed.cookie || e.ino != listed.ino || e.kind != listed.kind) {
            let told = String::from_utf8_lossy(&listed.name).into_owned();
            findings.problem(parent, format!("'{told}' is listed, but is no entry"));
        }
        Ok(())
    })
}

fn check_links(nodes: &Nodes, orphans: &BTreeSet<u64>, findings: &mut Findings) {
    for orphan in orphans.iter().filter(|ino| !nodes.contains_key(ino)) {
        findings.problem(*orphan, "an orphan without an inode");
    }
    for (&ino, node) in nodes {
        let is_dir = node.kind == FileKind::Directory;
        let names = if is_dir { u64::from(ino != ROOT_INO) } else { u64::from(node.nlink) };
        let orphan = orphans.contains(&ino);
        if orphan != (node.nlink == 0) {
            findings.problem(ino, format!("{} links, orphan: {orphan}", node.nlink));
        }
        if !orphan && node.links != names {
            findings.problem(ino, format!("{names} names are counted, {} are there", node.links));
        }
        if orphan && node.links > 0 {
            findings.problem(ino, "an orphan with a name");
        }
        if is_dir && !orphan && u64::from(node.nlink) != 2 + node.subdirs {
            findings.problem(ino, format!("{} links with {} subdirectories", node.nlink, node.subdirs));
        }
        if is_dir && node.entries != node.entries_seen {
            findings.problem(ino, format!("{} entries counted, {} there", node.entries, node.entries_seen));
        }
    }
}

/// Every directory must lead to the root.
fn check_ways_up(nodes: &Nodes, orphans: &BTreeSet<u64>, findings: &mut Findings) {
    if nodes.get(&ROOT_INO).is_none_or(|root| root.kind != FileKind::Directory) {
        findings.problem(ROOT_INO, "there is no root directory");
    }
    let mut good: BTreeSet<u64> = [ROOT_INO].into();
    let dirs = nodes.iter().filter(|(ino, n)| n.kind == FileKind::Directory && !orphans.contains(ino));
    for (&start, _) in dirs {
        let (mut way, mut at) = (Vec::new(), start);
        let mut seen = BTreeSet::new();
        while !good.contains(&at) && seen.insert(at) {
            way.push(at);
            match nodes.get(&at) {
                Some(node) => at = node.parent,
                None => break,
            }
        }
        if good.contains(&at) {
            good.extend(way);
        } else {
            findings.problem(start, "this directory does not lead to the root");
        }
    }
}
