//! House rules that a program can check, so that review is about design.
//!
//! Each rule is one test with the rule as its name. The tables below are the single place where an exception is argued.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What each crate may import of ours. Arrows point down; see "Code map" in ARCHITECTURE.md.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("csvfs/threads", &[]),
    ("csvfs/blockio", &["threads"]),
    ("lockmgr/wire", &["threads"]),
    ("lockmgr", &["blockio", "threads", "wire"]),
    ("csvfs", &["blockio", "lockmgr", "threads"]),
    ("csvfs/fuse", &["blockio", "csvfs", "threads"]),
    ("vhdx", &["blockio", "threads"]),
    ("hv", &["blockio", "threads"]),
    ("hv/guest", &[]),
    ("hv/runner", &["blockio", "csvfs", "hv", "hv-guest", "lockmgr", "threads", "vhdx", "wire"]),
    ("migrator", &["lockmgr", "hv"]),
    ("tools/api", &[]),
    ("xtask", &[]),
];

/// Our crates, by the name that a manifest uses.
const OURS: &[&str] = &[
    "threads",
    "blockio",
    "wire",
    "lockmgr",
    "csvfs",
    "csvfs-fuse",
    "vhdx",
    "hv",
    "hv-guest",
    "hv-runner",
    "migrator",
    "api",
    "csvd",
    "csvctl",
    "cluster-tests",
    "benchmarks",
    "xtask",
];

/// The only files that may contain unsafe code, each with its reason.
const UNSAFE_FILES: &[(&str, &str)] = &[
    ("csvfs/blockio/src/buffer.rs", "aligned allocations for O_DIRECT, and memory that a device writes into"),
    (
        "csvfs/blockio/src/nbd/socket.rs",
        "the kernel moves bytes between a socket and buffers that a message keeps alive",
    ),
    (
        "csvfs/blockio/src/pool.rs",
        "system calls on buffers that a request keeps alive, where io_uring is refused",
    ),
    (
        "csvfs/blockio/src/reserve/kernel.rs",
        "the kernel reads and fills the structures of reservation commands",
    ),
    ("csvfs/fuse/src/wire/channel.rs", "one ioctl, which clones a FUSE connection for a further reader"),
    (
        "csvfs/fuse/src/wire/ring/memory.rs",
        "memory that the kernel fills with a FUSE request, and takes the answer from",
    ),
    ("csvfs/fuse/src/wire/ring/mod.rs", "calls of a FUSE ring, which point to memory that its entries hold"),
    ("csvfs/blockio/src/uring.rs", "the kernel reads and writes buffers that a ring entry points to"),
    ("csvfs/threads/src/prompt.rs", "how a thread is scheduled, which no crate tells or sets"),
    ("hv/runner/src/privileges.rs", "a thread leaves what it shares with others"),
    ("hv/runner/src/sandbox/tests.rs", "makes the calls that are forbidden"),
    ("hv/runner/src/sandbox/trap.rs", "a signal handler, which tells of a forbidden call"),
    ("hv/runner/src/tap.rs", "a tap is configured by an ioctl"),
    ("hv/src/kvm/chips.rs", "reads the union in which KVM returns an interrupt controller"),
    ("hv/src/kvm/dirty.rs", "clears a part of KVM's log of written pages"),
    ("hv/src/kvm/mod.rs", "maps guest RAM into a virtual machine"),
    ("hv/src/lazy.rs", "the kernel fills guest RAM by ioctls of userfaultfd"),
    ("hv/src/kvm/processor.rs", "KVM's extended state has a size that only the kernel knows"),
    ("hv/src/memory.rs", "guest RAM as buffers of I/O requests"),
    ("hv/src/memory/bulk.rs", "copies of pages that the guest may write meanwhile"),
    ("hv/src/vcpu.rs", "the signal handler writes into the page that KVM shares with a vCPU"),
    ("lockmgr/src/lease/page.rs", "one page of shared memory between the daemon and its VMs"),
];

/// Files of deciding code: no clock, socket, thread or file inside.
const PURE_FILES: &[&str] = &[
    "lockmgr/src/engine.rs",
    "lockmgr/src/resource.rs",
    "lockmgr/src/range/mod.rs",
    "lockmgr/src/range/held.rs",
    "lockmgr/src/detector.rs",
    "csvfs/src/extents.rs",
    "migrator/src/phase.rs",
    "migrator/src/handoff.rs",
    "migrator/src/precopy.rs",
    "migrator/src/target.rs",
    "lockmgr/src/cluster/drain.rs",
    "tools/csvd/src/drain/plan.rs",
    "tools/csvd/src/volumes/balance.rs",
];

/// What pure files must not mention.
const IMPURE: &[&str] = &[
    "std::time::Instant",
    "SystemTime",
    "std::net",
    "std::thread",
    "thread_local!",
    "std::fs",
    "std::env",
    "tokio::",
    "Instant::now",
];

/// Foreign engines and the folders that may name them: no foreign type in a public signature or on disk.
const FENCED_IN: &[(&str, &[&str])] = &[
    ("redb::", &["csvfs/src/meta/", "lockmgr/src/cluster/"]),
    ("openraft::", &["lockmgr/src/cluster/"]),
    ("io_uring::", &["csvfs/blockio/src/", "csvfs/fuse/src/wire/ring/"]),
    ("kvm_ioctls::", &["hv/src/"]),
    ("kvm_bindings::", &["hv/src/"]),
];

/// Lines in a file, beyond which it surely holds more than one idea.
const FILE_LINES_MAX: usize = 800;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies inside the workspace").to_owned()
}

/// Every file of the project with one of these endings, as (path below the root, content).
fn files(endings: &[&str]) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    collect(&root(), endings, &mut found);
    assert!(found.len() > 1, "the walk found nothing: {endings:?}");
    found
}

fn collect(folder: &Path, endings: &[&str], found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && (!name.starts_with('.') || name == ".ci") {
                collect(&path, endings, found);
            }
        } else if endings.iter().any(|ending| name.ends_with(ending)) {
            let below = path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
            found.insert(below, fs::read_to_string(&path).expect("UTF-8 text"));
        }
    }
}

fn report(rule: &str, offences: &[String]) {
    assert!(offences.is_empty(), "{rule}:\n  {}", offences.join("\n  "));
}

/// The names in `[dependencies]` and `[build-dependencies]` of a manifest; tests may import more.
fn imports(manifest: &str) -> Vec<String> {
    let mut section = "";
    let mut names = Vec::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            section = line.trim();
        } else if matches!(section, "[dependencies]" | "[build-dependencies]")
            && let Some((name, _)) = line.split_once(['.', ' ', '='])
        {
            names.push(name.to_owned());
        }
    }
    names
}

#[test]
fn nothing_imports_upwards() {
    let mut offences = Vec::new();
    for (folder, allowed) in MAY_IMPORT {
        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).expect("a manifest");
        for name in imports(&manifest) {
            if OURS.contains(&name.as_str()) && !allowed.contains(&name.as_str()) {
                offences.push(format!("{folder} imports {name}, which lies above or beside it"));
            }
        }
    }
    report(
        "csvfs, vhdx and hv do not know each other; nothing imports tools, tests or benchmarks",
        &offences,
    );
}

#[test]
fn every_dependency_has_its_reason() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("the root manifest");
    let section = manifest.split("[workspace.dependencies]").nth(1).expect("the dependencies");
    let section = section.split("\n[").next().expect("the section");
    let offences: Vec<_> = section
        .lines()
        .filter(|line| line.contains(" = ") && !line.contains("path = ") && !line.contains("# "))
        .map(|line| format!("no reason beside: {line}"))
        .collect();
    report("each dependency has a reason in the root manifest", &offences);
}

#[test]
fn every_source_file_says_what_it_is_for() {
    let offences: Vec<_> = files(&[".rs"])
        .iter()
        .filter(|(_, text)| !text.starts_with("//!"))
        .map(|(path, _)| format!("{path} does not open with //!"))
        .collect();
    report("the first thing in a file says what it is for", &offences);
}

/// Whether a source has unsafe code: a block, function, implementation or trait outside of comments.
fn has_unsafe_code(text: &str) -> bool {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.into_iter().any(|line| {
        ["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern"]
            .iter()
            .any(|form| line.contains(form))
    })
}

#[test]
fn unsafe_code_stays_in_the_listed_files() {
    let offences: Vec<_> = files(&[".rs"])
        .iter()
        .filter(|(path, text)| path.as_str() != "tests/tidy.rs" && has_unsafe_code(text))
        .filter(|(path, _)| !UNSAFE_FILES.iter().any(|(listed, _)| listed == path))
        .map(|(path, _)| format!("{path} has unsafe code but is not in UNSAFE_FILES of tests/tidy.rs"))
        .collect();
    report("unsafe only in the modules the table names", &offences);
}

#[test]
fn the_unsafe_table_has_no_stale_rows() {
    let files = files(&[".rs"]);
    let offences: Vec<_> = UNSAFE_FILES
        .iter()
        .filter(|(path, _)| !files.get(*path).is_some_and(|text| has_unsafe_code(text)))
        .map(|(path, reason)| format!("{path} ({reason}) has no unsafe code any more"))
        .collect();
    report("a row of UNSAFE_FILES is argued by code", &offences);
}

#[test]
fn engines_read_no_clock_socket_or_thread() {
    let mut offences = Vec::new();
    for path in PURE_FILES {
        let text = fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
        let code = text.split("#[cfg(test)]").next().expect("the part before the tests");
        offences.extend(
            IMPURE.iter().filter(|word| code.contains(*word)).map(|word| format!("{path} mentions {word}")),
        );
    }
    report("deciding code is pure: events in, actions out", &offences);
}

#[test]
fn foreign_engines_stay_behind_one_module_each() {
    let mut offences = Vec::new();
    for (path, text) in files(&[".rs"]) {
        for (engine, folders) in FENCED_IN {
            if text.contains(engine)
                && path != "tests/tidy.rs"
                && !folders.iter().any(|folder| path.starts_with(folder))
            {
                offences.push(format!("{path} names {engine} outside {folders:?}"));
            }
        }
    }
    report("each outside engine stays behind one module of ours", &offences);
}

#[test]
fn files_hold_one_idea() {
    let offences: Vec<_> = files(&[".rs"])
        .iter()
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > FILE_LINES_MAX)
        .map(|(path, lines)| format!("{path} has {lines} lines"))
        .collect();
    report("one idea per file", &offences);
}

#[test]
fn nothing_is_left_for_later() {
    let words = ["todo!(", "unimplemented!(", "FIXME", "XXX", "dbg!("];
    let mut offences = Vec::new();
    for (path, text) in files(&[".rs", ".c", ".proto", ".S"]) {
        if path != "tests/tidy.rs" {
            offences.extend(
                words
                    .iter()
                    .filter(|word| text.contains(*word))
                    .map(|word| format!("{path} contains {word}")),
            );
        }
    }
    report("what cannot be done well is said in the documents, not in the code", &offences);
}

#[test]
fn nobody_sleeps_to_wait() {
    let offences: Vec<_> = files(&[".rs"])
        .iter()
        .filter(|(path, text)| path.as_str() != "tests/tidy.rs" && text.contains("thread::sleep("))
        .map(|(path, _)| format!("{path} sleeps"))
        .collect();
    report("wait for the event, not for time", &offences);
}

#[test]
fn the_documents_name_files_that_exist() {
    let mut offences = Vec::new();
    for (path, text) in files(&[".md"]) {
        let folder = Path::new(&path).parent().expect("a folder").to_owned();
        for target in links(&text) {
            if !root().join(&folder).join(&target).exists() {
                offences.push(format!("{path} links to {target}, which does not exist"));
            }
        }
    }
    report("documents are true", &offences);
}

/// Targets of Markdown links to files of the project.
fn links(text: &str) -> Vec<String> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter(|target| !target.contains("://") && !target.starts_with('#'))
        .map(|target| target.split('#').next().unwrap_or_default().to_owned())
        .collect()
}

/// The table "Invariants and their tests" in ARCHITECTURE.md names a test for each line; the test must exist.
#[test]
fn each_listed_invariant_has_its_test() {
    let architecture = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let table = architecture.split("## Invariants and their tests").nth(1).expect("the table of invariants");
    let table = table.split("\n## ").next().expect("the section");
    let sources: String = files(&[".rs"]).into_values().collect();
    let mut rows = 0;
    let mut offences = Vec::new();
    for line in table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| line")) {
        for test in line.split('`').skip(1).step_by(2) {
            rows += 1;
            if !sources.contains(&format!("fn {test}(")) {
                offences.push(format!("{test} is named in ARCHITECTURE.md and does not exist"));
            }
        }
    }
    assert!(rows > 10, "the table of invariants has only {rows} tests");
    report("each invariant that the documents claim has its test", &offences);
}
