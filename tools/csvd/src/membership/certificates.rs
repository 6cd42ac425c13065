//! This node's certificate: issued anew at each start, and whenever the cluster renews all of them.
//!
//! ```text
//!   rotate: records say "issued before T is old, and refused from T + grace on"
//!   each node: issues itself a newer one -> files -> shown by new connections, lanes are made anew beside the old ones
//!              from T + grace on, by its own clock: refuses what was issued before T
//! ```
//! Every member holds the key of the authority (it can let others join), so it needs nobody for that, and a node that was off
//! during a renewal comes back with a certificate of its start. A certificate that was stolen without that key is worthless
//! after the next renewal.
//!
//! **Invariant:** key and certificate on disk belong together, or are made anew at the next start.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api::config::NodeConfig;
use api::{Error, pb};
use lockmgr::cluster::{Command, Renewal};
use wire::Identity;
use wire::authority::{self, Issued};

use crate::core::Core;
use crate::volumes::status::unix_ms;

/// Shortest time in which all members renew theirs.
const GRACE_MS_MIN: u64 = 1_000;
/// Longest: a day.
const GRACE_MS_MAX: u64 = 24 * 3_600_000;
/// Pause before another attempt, when a certificate could not be issued.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// The identity of a node that starts: a new certificate where the authority's key is here, otherwise the one in the files.
pub(crate) fn at_start(config: &NodeConfig) -> Result<Identity, Error> {
    match authority_of(config)? {
        Some(ca) => issue(config, &ca, unix_ms()),
        None => Identity::load(&config.tls.cert, &config.tls.key, &config.tls.ca)
            .map_err(|error| unusable(error.explain())),
    }
}

fn unusable(why: String) -> Error {
    Error::failed(why).hint("check the files named in the configuration")
}

/// The authority with its key, on a node that holds it.
fn authority_of(config: &NodeConfig) -> Result<Option<Issued>, Error> {
    // An administrator may have taken the key away.
    let Some(key) = config.tls.ca_key.as_ref().filter(|key| key.exists()) else { return Ok(None) };
    let read = |path: &Path| {
        fs::read_to_string(path).map_err(|error| unusable(format!("read {}: {error}", path.display())))
    };
    Ok(Some(Issued { cert_pem: read(&config.tls.ca)?, key_pem: read(key)? }))
}

/// Issues this node a certificate, and puts it into its files.
fn issue(config: &NodeConfig, ca: &Issued, issued_ms: u64) -> Result<Identity, Error> {
    let issued = authority::issue_at(ca, config.id, issued_ms).map_err(|error| unusable(error.explain()))?;
    let identity = Identity::from_pem(&issued.cert_pem, &issued.key_pem, &ca.cert_pem)
        .map_err(|error| unusable(error.explain()))?;
    replace(&config.tls.key, &issued.key_pem)?;
    replace(&config.tls.cert, &issued.cert_pem)?;
    Ok(identity)
}

/// Puts a file in the place of another, whole or not at all, readable by its owner only.
fn replace(path: &Path, text: &str) -> Result<(), Error> {
    let beside = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file: File =
            File::options().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|error| Error::failed(format!("write {}: {error}", path.display())))
}

/// Has all members renew their certificates.
pub(crate) async fn rotate(core: &Arc<Core>, grace_ms: u64) -> Result<pb::CertificatesRenewed, Error> {
    if !(GRACE_MS_MIN..=GRACE_MS_MAX).contains(&grace_ms) {
        return Err(Error::usage("the grace is at least a second and at most a day"));
    }
    if core.config.tls.ca_key.is_none() {
        return Err(Error::conflict("this node does not hold the key of the cluster's authority")
            .hint("ask a node that was set up by `cluster create` or `node join`"));
    }
    core.all_speak(2, "a renewal of certificates")?;
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let before_ms = unix_ms().max(state.renewal.before_ms + 1);
    let to = Renewal { before_ms, refused_from_ms: before_ms.saturating_add(grace_ms) };
    let command = Command::RenewCertificates { expect_before_ms: state.renewal.before_ms, to };
    core.propose(command).await?;
    Ok(pb::CertificatesRenewed { before_ms, refused_from_ms: to.refused_from_ms })
}

/// Renews this node's certificate when the records ask for it, and refuses older ones of others when the time has come.
pub(crate) async fn follow(core: Arc<Core>) {
    let mut records = core.cluster.watch();
    loop {
        let renewal = records.borrow_and_update().renewal;
        let wait = obey(&core, renewal);
        tokio::select! {
            () = core.done.cancelled() => return,
            changed = records.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(wait.unwrap_or(Duration::MAX)), if wait.is_some() => {}
        }
    }
}

/// Does what a renewal asks for now; gives when there will be more to do.
fn obey(core: &Arc<Core>, renewal: Renewal) -> Option<Duration> {
    if renewal == Renewal::default() {
        return None;
    }
    let endpoint = core.mesh.endpoint();
    if endpoint.identity().issued_ms() < renewal.before_ms
        && let Err(error) = renew(core, renewal.before_ms)
    {
        tracing::error!(%error, "this node's certificate is not renewed: it will be refused");
        return Some(AGAIN_AFTER);
    }
    let left_ms = renewal.refused_from_ms.saturating_sub(unix_ms());
    if left_ms > 0 {
        return Some(Duration::from_millis(left_ms));
    }
    endpoint.refuse_issued_before(renewal.before_ms);
    None
}

fn renew(core: &Arc<Core>, before_ms: u64) -> Result<(), Error> {
    let ca = authority_of(&core.config)?
        .ok_or_else(|| Error::conflict("this node does not hold the key of the cluster's authority"))?;
    let identity = issue(&core.config, &ca, unix_ms().max(before_ms))?;
    core.mesh.endpoint().renew(identity).map_err(|error| unusable(error.explain()))?;
    let text = format!("node {} shows a new certificate", core.config.name);
    core.note("node.certificate", &core.config.name, text);
    Ok(())
}
