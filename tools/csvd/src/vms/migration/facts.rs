//! What this node is and has, for a VM that may come.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::sync::Arc;

use api::{Error, pb};
use lockmgr::NodeId;
use migrator::PROTOCOL_VERSION;
use migrator::preflight::{self, Facts, Needs};

use crate::core::Core;
use crate::vms::processor;

/// From this version of the protocol between nodes on, memory streams have pages as differences.
const DELTAS_SINCE: u32 = 2;

/// From this version of the protocol between nodes on, drivers of a VM may find more than the first release's devices offer.
const DEVICES_SINCE: u32 = 2;

/// Version of the devices that drivers can find here.
fn devices() -> u32 {
    if wire::spoken_max() >= DEVICES_SINCE { hv::DEVICES_VERSION } else { 0 }
}

/// Version of the devices that drivers of a VM which boots now find: it can go to every node that can be reached (G4).
pub(crate) fn devices_of_all(core: &Core) -> u32 {
    if core.all_speak(DEVICES_SINCE, "newer devices").is_ok() { devices() } else { 0 }
}

/// Whether this node sends and takes pages as differences: one that keeps to an older version does as its release did.
pub(super) fn has_deltas() -> bool {
    wire::spoken_max() >= DELTAS_SINCE
}

/// What a VM of this node needs elsewhere.
pub(super) fn needs(core: &Core, spec: &pb::VmSpec, to: NodeId) -> Result<Needs, Error> {
    let given = processor::baseline(&core.state(), spec.baseline)?;
    Ok(Needs {
        from: core.me,
        to,
        memory_bytes: spec.memory_bytes,
        cpus: spec.cpus,
        paths: paths(spec),
        // Without a baseline it was given all that this node has.
        devices: spec.devices,
        cpu: given.or_else(|| core.vms.processors.here()).unwrap_or_default(),
    })
}

/// Refuses to go on here with a guest that was given what this node does not have.
pub(crate) async fn refuse_guest(core: &Arc<Core>, spec: &pb::VmSpec) -> Result<(), Error> {
    // Without a baseline it is not known what it was given, before its state is loaded.
    let given = processor::baseline(&core.state(), spec.baseline)?;
    let here = gather(core, Vec::new()).await;
    let problems = preflight::check_guest(spec.devices, given.as_ref(), &here);
    if problems.is_empty() {
        return Ok(());
    }
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    let node = &core.config.name;
    Err(Error::conflict(format!("node {node} cannot go on with that guest: {}", problems.join("; "))).hint(
        "move the VM to a node that has this (`csvctl vm migrate`), or start it there if it is stopped, and try again",
    ))
}

/// The files that a VM needs.
pub(super) fn paths(spec: &pb::VmSpec) -> Vec<(String, String)> {
    spec.disks.iter().map(|disk| (disk.volume.clone(), disk.path.clone())).collect()
}

/// What this node offers; `paths` are the files that are asked for.
pub(super) async fn gather(core: &Arc<Core>, paths: Vec<(String, String)>) -> Facts {
    let state = core.state();
    let mounted = state
        .volumes
        .values()
        .filter(|record| core.volumes.get(record.id).is_some_and(|volume| volume.node().is_some()));
    let volumes = mounted.map(|record| record.name.clone()).collect();
    let mut found = BTreeMap::new();
    for (volume, path) in paths {
        let problem = problem_with(core, &volume, &path).await;
        found.insert((volume, path), problem);
    }
    Facts {
        kvm_problem: kvm_problem(),
        memory_available_bytes: memory_available_bytes(),
        cpus: std::thread::available_parallelism()
            .map_or(1, |cpus| u32::try_from(cpus.get()).unwrap_or(u32::MAX)),
        volumes,
        paths: found,
        version_min: PROTOCOL_VERSION,
        version_max: PROTOCOL_VERSION,
        cpu: core.vms.processors.here().unwrap_or_default(),
        takes_deltas: has_deltas(),
        devices: devices(),
    }
}

/// Why a file cannot be a disk here, if so.
async fn problem_with(core: &Arc<Core>, volume: &str, path: &str) -> Option<String> {
    let record = core.state().volumes.get(volume)?.id;
    let node = core.volumes.get(record)?.node()?;
    let path = path.to_owned();
    match tokio::task::spawn_blocking(move || node.resolve(&path)).await {
        Ok(Ok(_)) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(error) => Some(error.to_string()),
    }
}

fn kvm_problem() -> Option<String> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").err().map(|error| format!("/dev/kvm: {error}"))
}

/// What the kernel says could be given to a new program without swapping.
pub(super) fn memory_available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok()).unwrap_or(0);
    kib.saturating_mul(1024)
}
