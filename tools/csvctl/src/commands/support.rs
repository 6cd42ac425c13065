//! `csvctl support`.
//!
//! The bundle is a tar archive: what the cluster says of itself, as `--json` prints it, and the logs of all nodes. It holds no
//! key and nothing that a guest has written.

use std::io::Write;
use std::path::PathBuf;

use api::pb::{
    ClusterShowRequest, EventsRequest, HealthRequest, SettingsRequest, TopRequest, VmListRequest,
    VolumeListRequest, VolumeStateRequest,
};
use api::{Client, Error};
use clap::{Args, Subcommand};
use serde::Serialize;

use super::log::logs;
use crate::context::Context;
use crate::files::cannot;

/// Unit of a tar archive.
const RECORD_BYTES: usize = 512;

#[derive(Debug, Subcommand)]
pub(crate) enum SupportCommand {
    /// Write state and logs of all nodes into one file, a tar archive
    Bundle(Bundle),
}

impl SupportCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Bundle(command) => command.run(context).await,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Bundle {
    /// The file
    file: PathBuf,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Bundled {
    file: PathBuf,
    entries: usize,
    bytes: usize,
    missing: Vec<String>,
}

impl Bundle {
    async fn run(self, context: &Context) -> Result<(), Error> {
        let mut client = context.client().await?;
        let spinner = context.ui.spinner("asking the cluster for its state");
        let mut entries = state(&mut client).await?;
        let (logs, missing) =
            logs(&mut client, |node| spinner.step(&format!("reading the logs of {node}"))).await?;
        entries.extend(logs.into_iter().map(|log| (format!("{}/{}", log.node, log.name), log.text)));
        drop(spinner);
        let archive = tar(&entries)?;
        let mut file =
            std::fs::File::create(&self.file).map_err(|error| cannot("make", &self.file, &error))?;
        file.write_all(&archive)
            .and_then(|()| file.sync_all())
            .map_err(|error| cannot("write", &self.file, &error))?;
        let bundled = Bundled { file: self.file, entries: entries.len(), bytes: archive.len(), missing };
        context.ui.show(&bundled, |it| {
            let missing: String = it.missing.iter().map(|why| format!("\nmissing: {why}")).collect();
            format!("{} files in {}{missing}", it.entries, it.file.display())
        })
    }
}

/// What the cluster says of itself.
async fn state(client: &mut Client) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let mut events = Vec::new();
    let mut stream = client.events(EventsRequest { follow: false, since_ms: 0 }).await?.into_inner();
    while let Some(event) = stream.message().await? {
        events.push(event);
    }
    Ok(vec![
        document("cluster", &client.cluster_show(ClusterShowRequest {}).await?.into_inner())?,
        document("health", &client.health(HealthRequest {}).await?.into_inner())?,
        document("settings", &client.settings(SettingsRequest {}).await?.into_inner())?,
        document("volumes", &client.volume_list(VolumeListRequest {}).await?.into_inner())?,
        document("volume-state", &client.volume_state(VolumeStateRequest::default()).await?.into_inner())?,
        document("vms", &client.vm_list(VmListRequest {}).await?.into_inner())?,
        document("top", &client.top(TopRequest {}).await?.into_inner())?,
        document("events", &events)?,
    ])
}

fn document(name: &str, value: &impl Serialize) -> Result<(String, Vec<u8>), Error> {
    let text = serde_json::to_vec_pretty(value).map_err(Error::failed)?;
    Ok((format!("{name}.json"), text))
}

/// A POSIX tar archive of plain files.
fn tar(entries: &[(String, Vec<u8>)]) -> Result<Vec<u8>, Error> {
    let mut archive = Vec::new();
    for (name, content) in entries {
        archive.extend(header(name, content.len())?);
        archive.extend(content);
        archive.resize(archive.len().next_multiple_of(RECORD_BYTES), 0);
    }
    // Two empty records are its end.
    archive.resize(archive.len() + 2 * RECORD_BYTES, 0);
    Ok(archive)
}

fn header(name: &str, bytes: usize) -> Result<[u8; RECORD_BYTES], Error> {
    let mut header = [0; RECORD_BYTES];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    if name.len() > 100 || bytes >= 1 << 33 {
        return Err(Error::failed(format!("{name} does not fit into a tar archive")));
    }
    put(0, name);
    put(100, "0000600\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{bytes:011o}\0"));
    put(136, "00000000000\0");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\0");
    put(263, "00");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_whole_records_and_each_header_sums_up() {
        let entries = [("a.json".to_owned(), vec![7; 700]), ("n1/csvd.log".to_owned(), Vec::new())];
        let archive = tar(&entries).expect("they fit");
        assert_eq!(archive.len(), RECORD_BYTES * (1 + 2 + 1 + 2));
        for at in [0, 3] {
            let record = &archive[at * RECORD_BYTES..][..RECORD_BYTES];
            let stored = std::str::from_utf8(&record[148..154]).expect("digits");
            let blank = record.iter().enumerate().map(|(at, byte)| match at {
                148..156 => u32::from(b' '),
                _ => u32::from(*byte),
            });
            assert_eq!(u32::from_str_radix(stored, 8), Ok(blank.sum()));
        }
        assert!(tar(&[("x".repeat(101), Vec::new())]).is_err());
    }
}
