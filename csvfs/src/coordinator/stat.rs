//! Numbers of the volume, and its check while it is in use.
//!
//! **Invariant:** a check reads one committed moment of the store; it holds nobody up.

use std::sync::atomic::Ordering;

use lockmgr::ClientId;

use super::core::Core;
use super::mailbox::Asker;
use super::pools::Pool;
use super::repair::Unreadable;
use crate::check;
use crate::format::layout::BLOCK_BYTES;
use crate::meta::{Store, guarded};
use crate::proto::{CheckProblem, Failure, FailureKind, VolumeStat, reply};
use crate::refusal::{OpError, failure};

impl Core {
    /// Tells of what is free when all is freed that can be: who has removed something looks here for it.
    pub(super) fn stat_fs(&self, client: ClientId) -> Result<reply::Result, OpError> {
        if !self.reclaimable.is_empty() {
            return Err(OpError::Later);
        }
        Ok(reply::Result::VolumeStat(VolumeStat {
            block_bytes: BLOCK_BYTES,
            blocks: self.lun_bytes / BLOCK_BYTES,
            blocks_free: self.alloc.available() + self.alloc.pending() + self.pools.blocks(),
            inodes: self.globals.inodes,
            pooled: self.pools.of(client).map_or(0, Pool::blocks),
        }))
    }

    /// Checks the volume as of now, on a thread of its own.
    pub(super) fn start_check(&self, store: &mut Store, done: Asker) {
        if self.checking.swap(true, Ordering::SeqCst) {
            let busy = Failure {
                kind: FailureKind::Errno.into(),
                errno: libc::EBUSY,
                message: "the volume is being checked already".into(),
            };
            return done.answer(reply::Result::Failure(busy));
        }
        let snapshot = match store.snapshot() {
            Ok(snapshot) => snapshot.passing_over_damage(),
            Err(error) => {
                self.checking.store(false, Ordering::SeqCst);
                let refusal = failure(FailureKind::Stopped, error.to_string());
                return done.answer(reply::Result::Failure(refusal));
            }
        };
        let (device, volume, lun_bytes) = (self.device.clone(), self.volume, self.lun_bytes);
        let chunks = store.chunks();
        let unreadable: Vec<CheckProblem> = self
            .unreadable
            .iter()
            .map(|(client, Unreadable { why, .. })| CheckProblem {
                what: format!(
                    "client {client} has ended and its intent log cannot be read ({why}): what it held stays locked; \
                     csvctl volume give-up-log gives the log up"
                ),
                ino: 0,
            })
            .collect();
        let checking = self.checking.clone();
        let job = move || {
            let tables =
                guarded("a page that cannot be read", || check::check_tables(&snapshot, lun_bytes, &chunks));
            let report = tables
                .and_then(|report| report)
                .map(|report| check::with_fixed_areas(report, device.as_ref(), volume))
                .map(|mut report| {
                    report.problems.extend(unreadable);
                    report
                });
            drop(snapshot);
            checking.store(false, Ordering::SeqCst);
            done.answer(match report {
                Ok(report) => reply::Result::CheckReport(report),
                Err(error) => reply::Result::Failure(failure(FailureKind::Stopped, error.to_string())),
            });
        };
        let spawned = std::thread::Builder::new().name("csvfs-check".into()).spawn(job);
        if let Err(error) = spawned {
            // The job is gone, and its asker was told so.
            self.checking.store(false, Ordering::SeqCst);
            tracing::warn!(%error, "no thread for a check");
        }
    }
}
