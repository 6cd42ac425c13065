//! A node of the embedded cluster, from outside: waiting for it, and what is left of it when it is gone.

use std::path::Path;

use api::Error;
use api::config::NodeConfig;
use api::pb::WaitRequest;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::folder::{Folder, Plan, PlannedNode};
use super::process;
use crate::files::cannot;

/// Longest time that a cluster may take until it is healthy.
pub(crate) const HEALTHY_WITHIN_MS: u64 = 60_000;

/// Waits until the node sees `nodes_up` members and has `volumes` mounted.
pub(crate) async fn wait(config: &NodeConfig, nodes_up: usize, volumes: &[String]) -> Result<(), Error> {
    let request = WaitRequest {
        timeout_ms: HEALTHY_WITHIN_MS,
        nodes_up: u32::try_from(nodes_up).unwrap_or(u32::MAX),
        volumes: volumes.to_vec(),
    };
    process::await_ready(config, request).await.map_err(|error| {
        if error.hint.is_empty() {
            error.hint(format!("its log is {}", config.log_file().display()))
        } else {
            error
        }
    })
}

/// The planned node of that name.
pub(crate) fn named<'a>(plan: &'a Plan, name: &str) -> Result<&'a PlannedNode, Error> {
    plan.nodes.iter().find(|node| node.name == name).ok_or_else(|| {
        let names: Vec<_> = plan.nodes.iter().map(|node| node.name.as_str()).collect();
        Error::not_found(format!("there is no node {name}"))
            .hint(format!("the nodes are {}", names.join(", ")))
    })
}

/// Detaches the mounts that a killed daemon left behind.
pub(crate) fn unmount_leftovers(folder: &Folder, plan: &Plan, node: &PlannedNode) -> Result<(), Error> {
    let config = folder.node_config(plan, node);
    let mnt = config.dir.join("mnt");
    for target in mounts_below(&mnt)? {
        match unmount(&target, UnmountFlags::DETACH) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => return Err(cannot("unmount", Path::new(&target), &error.into())),
        }
    }
    Ok(())
}

/// Removes the sockets of a node that has ended, and the configurations and sockets of its VMs' processes. What they have
/// logged stays, and so does the pid file, which proves to others that the node has ended.
pub(crate) fn remove_leftovers(config: &NodeConfig) -> Result<(), Error> {
    let mut files = vec![config.admin_socket(), config.node_socket()];
    let of_vms = std::fs::read_dir(config.vm_dir()).into_iter().flatten().flatten().map(|entry| entry.path());
    files.extend(of_vms.filter(|path| path.extension().is_some_and(|kind| kind == "sock" || kind == "json")));
    for file in files {
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(cannot("remove", &file, &error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Mount points below `dir`, the innermost first.
fn mounts_below(dir: &Path) -> Result<Vec<String>, Error> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| cannot("read", Path::new("/proc/self/mountinfo"), &error))?;
    let mut found: Vec<_> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescape)
        .filter(|target| Path::new(target).starts_with(dir))
        .collect();
    found.reverse();
    Ok(found)
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> String {
    field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}
