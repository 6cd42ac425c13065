//! A node's own part of `cluster validate`: its lease, its paths, and its fence.

use std::sync::Arc;

use api::config::FenceConfig;
use api::pb;
use blockio::{BlockDevice, IoError};
use csvfs::format::layout;
use lockmgr::cluster::{ClusterState, FenceKind, VolumeRecord};
use lockmgr::fence::{Standing, standing};
use tokio::time::Instant;

use super::{Outcome, check, trial};
use crate::core::Core;
use crate::volumes::LocalVolume;
use crate::volumes::status::unix_ms;

/// Requests that are timed.
const SAMPLES: usize = 16;
pub(super) const BLOCK: usize = 4096;

pub(super) type Found = (Outcome, String);

/// This node's checks.
pub(crate) async fn here(core: &Arc<Core>, request: pb::ValidateRequest) -> pb::ValidationOfNode {
    let clock_ms = unix_ms();
    if request.clock_only {
        return pb::ValidationOfNode { clock_ms, checks: Vec::new() };
    }
    let me = &core.config.name;
    let mut checks = vec![check("lease", me, "", lease(core))];
    let state = core.state();
    let volumes = state.volumes.values().filter(|_| !core.config.witness);
    for record in volumes {
        let Some(volume) = core.volumes.get(record.id) else {
            let found = (Outcome::Failed, "the volume is not open".to_owned());
            checks.push(check("path", me, &record.name, found));
            continue;
        };
        checks.extend(path(core, record, &volume).await);
        checks.push(check("fence", me, &record.name, fence(core, &state, record, &volume, request).await));
    }
    pb::ValidationOfNode { clock_ms, checks }
}

fn lease(core: &Core) -> Found {
    if core.membership.lease.is_held() {
        (Outcome::Ok, format!("held, {} ms at a time", core.timing.lease_ms))
    } else {
        (Outcome::Failed, "it has run out: the node's I/O waits for a majority".to_owned())
    }
}

async fn path(
    core: &Arc<Core>,
    record: &VolumeRecord,
    volume: &Arc<LocalVolume>,
) -> Vec<pb::ValidationCheck> {
    let (me, name) = (&core.config.name, &record.name);
    let road = volume.road();
    let (lease_ms, slot) = (core.timing.lease_ms, u64::from(core.me.0 - 1));
    let timing = tokio::task::spawn_blocking(move || -> Result<_, String> {
        let device = road.ok_or("the LUN is not open")?.direct_for_peers()?;
        let reads = timed(lease_ms, || device.read_at(layout::SUPERBLOCK_OFFSETS[0], &mut [0; BLOCK]));
        Ok((reads, written(&*device, slot, lease_ms), timed(lease_ms, || device.flush())))
    });
    match timing.await.unwrap_or_else(|error| Err(error.to_string())) {
        Ok((reads, written, flushes)) => vec![
            check("path", me, name, (Outcome::Ok, "direct".to_owned())),
            check("read", me, name, reads),
            check("write", me, name, written),
            check("flush", me, name, flushes),
        ],
        Err(why) => vec![check("path", me, name, (Outcome::Failed, why))],
    }
}

/// Writes the node's own trial block, and reads it back.
fn written(device: &dyn BlockDevice, slot: u64, lease_ms: u64) -> Found {
    let at = layout::TRIAL_OFFSET + slot * layout::BLOCK_BYTES;
    let mut pattern = [0; BLOCK];
    for (place, byte) in pattern.iter_mut().zip(unix_ms().to_le_bytes().into_iter().cycle()) {
        *place = byte;
    }
    let found = timed(lease_ms, || device.write_at(at, &pattern));
    let mut back = [0; BLOCK];
    match device.read_at(at, &mut back) {
        Ok(()) if back == pattern => found,
        Ok(()) => (Outcome::Failed, "what was written was not read back".to_owned()),
        Err(error) => (Outcome::Failed, error.to_string()),
    }
}

/// Median and longest of some requests. One that takes as long as a lease would cost the node its lease (B5).
fn timed(lease_ms: u64, mut request: impl FnMut() -> Result<(), IoError>) -> Found {
    let mut took_us = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        let begun = Instant::now();
        if let Err(error) = request() {
            return (Outcome::Failed, error.to_string());
        }
        took_us.push(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX));
    }
    took_us.sort_unstable();
    judged(lease_ms, took_us[SAMPLES / 2], took_us[SAMPLES - 1])
}

fn judged(lease_ms: u64, median_us: u64, longest_us: u64) -> Found {
    let text = format!("median {median_us} us, longest {longest_us} us of {SAMPLES}");
    let limit_us = lease_ms * 1000;
    if longest_us >= limit_us {
        (Outcome::Failed, format!("{text}: longer than the lease, {lease_ms} ms"))
    } else if longest_us >= limit_us / 4 {
        (Outcome::Warning, format!("{text}: more than a quarter of the lease, {lease_ms} ms"))
    } else {
        (Outcome::Ok, text)
    }
}

async fn fence(
    core: &Arc<Core>,
    state: &ClusterState,
    record: &VolumeRecord,
    volume: &Arc<LocalVolume>,
    request: pb::ValidateRequest,
) -> Found {
    match record.fence_kind {
        FenceKind::Agent => agent(&core.config.fence),
        FenceKind::Lease => {
            let wait_ms = core.timing.taker_start_ms(core.timing.lease_ms);
            let io_ms = core.timing.max_io_ms;
            (Outcome::Ok, format!("lease: others wait {wait_ms} ms, {io_ms} ms of it for I/O under way"))
        }
        FenceKind::Reservation if request.without_trial => registered(volume).await,
        FenceKind::Reservation => trial::run(core, state, record, volume).await,
    }
}

fn agent(config: &FenceConfig) -> Found {
    use std::os::unix::fs::PermissionsExt;
    match config {
        FenceConfig::Operator => {
            (Outcome::Warning, "agent: none is configured, an operator confirms deaths".to_owned())
        }
        FenceConfig::LocalKill => (Outcome::Ok, "agent: the node's processes are killed".to_owned()),
        FenceConfig::Agent { program, .. } => {
            let runs = |about: std::fs::Metadata| about.is_file() && about.permissions().mode() & 0o111 != 0;
            let name = program.display();
            if std::fs::metadata(program).is_ok_and(runs) {
                (Outcome::Ok, format!("agent: {name} is there; only a real fence shows that it works"))
            } else {
                (Outcome::Failed, format!("agent: {name} is not a program on this node"))
            }
        }
    }
}

async fn registered(volume: &Arc<LocalVolume>) -> Found {
    let road = volume.road();
    let asked = tokio::task::spawn_blocking(move || {
        let (key, hand) = road.ok_or("the LUN is not open")?.reservations()?;
        standing(&*hand, key).map_err(|error| error.to_string())
    });
    match asked.await.unwrap_or_else(|error| Err(error.to_string())) {
        Ok(Standing::Good) => (
            Outcome::Ok,
            "reservation: this node is registered, others are refused (not tried out)".to_owned(),
        ),
        Ok(other) => (Outcome::Failed, format!("reservation: {other:?}")),
        Err(why) => (Outcome::Failed, format!("reservation: {why}")),
    }
}

#[cfg(test)]
mod tests {
    use blockio::{FaultDevice, MemoryDevice, OpKind};

    use super::*;

    // Invariant B5
    #[test]
    fn io_that_takes_a_good_part_of_a_lease_is_named() {
        assert_eq!(judged(2000, 100, 499_999).0, Outcome::Ok);
        assert_eq!(judged(2000, 100, 500_000).0, Outcome::Warning);
        assert_eq!(judged(2000, 100, 2_000_000).0, Outcome::Failed);
    }

    #[test]
    fn a_path_that_fails_or_forgets_is_found() {
        let device = FaultDevice::new(MemoryDevice::new(64 << 20));
        assert_eq!(written(&device, 3, 60_000).0, Outcome::Ok);
        device.fail(OpKind::Write, 0, rustix::io::Errno::IO.raw_os_error());
        assert_eq!(written(&device, 3, 60_000).0, Outcome::Failed);
    }

    #[test]
    fn an_agent_that_is_no_program_is_found() {
        let config = |program: &str| FenceConfig::Agent { program: program.into(), timeout_ms: 1 };
        assert_eq!(agent(&config("/bin/sh")).0, Outcome::Ok);
        assert_eq!(agent(&config("/etc/passwd")).0, Outcome::Failed);
        assert_eq!(agent(&FenceConfig::Operator).0, Outcome::Warning);
    }
}
