//! The daemon's log: one line per change of state, in `log/csvd.log`.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Mutex;

use api::Error;
use tracing_subscriber::EnvFilter;

/// Starts logging to `path`. `CSVD_LOG` chooses what, in the syntax of `tracing`.
pub(crate) fn start(path: &Path) -> Result<(), Error> {
    let cannot = |error: &dyn std::fmt::Display| Error::failed(format!("log to {}: {error}", path.display()));
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(|error| cannot(&error))?;
    }
    let file = OpenOptions::new().create(true).append(true).open(path).map_err(|error| cannot(&error))?;
    let filter = EnvFilter::try_from_env("CSVD_LOG")
        .unwrap_or_else(|_| EnvFilter::new(format!("info,{}", lockmgr::cluster::LOG_FILTER)));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(Mutex::new(file))
        .try_init()
        .map_err(|error| cannot(&error))
}
