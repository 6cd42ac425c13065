//! `csvctl volume cache`.

use api::Error;
use api::pb::{VolumeCacheRequest, VolumeCaches};
use clap::Args;

use crate::context::Context;
use crate::{ui, units};

#[derive(Debug, Args)]
pub(crate) struct Cache {
    /// Name of the volume
    name: String,
    /// How much memory each node may take, such as 512M; the cache is on from now on
    #[arg(long, value_parser = units::parse_size, conflicts_with = "off")]
    size: Option<u64>,
    /// Turn the cache off and give its memory back
    #[arg(long)]
    off: bool,
    /// How many files that nobody uses each node remembers, so that asking again takes no message; each takes up to 1 KiB
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    files: Option<u64>,
    /// Only on this node; without it on every node that is up
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
}

impl Cache {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let size_bytes = if self.off { Some(0) } else { self.size };
        let (name, node, files_max) = (self.name, self.node.unwrap_or_default(), self.files);
        let request = VolumeCacheRequest { name, node, size_bytes, files_max };
        let caches = context.client().await?.volume_cache(request).await?.into_inner();
        context.ui.show(&caches, text)
    }
}

fn text(caches: &VolumeCaches) -> String {
    let rows = caches.caches.iter().map(|row| {
        let size = if row.size_bytes == 0 { "off".to_owned() } else { units::size(row.size_bytes) };
        [
            row.node.clone(),
            size,
            units::size(row.used_bytes),
            row.hits.to_string(),
            row.misses.to_string(),
            format!("{:.1} %", 100.0 * row.hit_rate),
            format!("{} of {}", row.files, row.files_max),
        ]
    });
    ui::table(["node", "size", "used", "hits", "misses", "hit rate", "files"], rows)
}
