//! The test guest as the scenarios use it: a VM with a disk that is only read and one that it writes.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use hv_guest::{Ack, Layout, Report, last_ack, verify_image};

use crate::{Cluster, Ctl, PATIENCE, run_tool};

/// A VM that runs the sector writer.
#[derive(Clone, Debug)]
pub struct Guest {
    name: String,
    layout: Layout,
}

impl Guest {
    /// Defines and starts the VM on node 1. Both disks are images on the volume, named below its root.
    ///
    /// # Panics
    /// When it is refused.
    #[must_use]
    pub fn start(cluster: &Cluster, name: &str, read_disk: &str, written_disk: &str, range: u64) -> Self {
        Self::start_with(cluster, name, read_disk, written_disk, range, &[])
    }

    /// The same with further options of `vm create`.
    ///
    /// # Panics
    /// When it is refused.
    #[must_use]
    pub fn start_with(
        cluster: &Cluster,
        name: &str,
        read_disk: &str,
        written_disk: &str,
        range: u64,
        options: &[&str],
    ) -> Self {
        let layout = Layout { range, sectors: 1, seed: 7 };
        Self::start_laid_out(cluster, name, (read_disk, written_disk), layout, options)
    }

    /// One that writes its records as fast as it can, so that it soon needs space that the volume does not have.
    ///
    /// # Panics
    /// When it is refused.
    #[must_use]
    pub fn start_greedy(cluster: &Cluster, name: &str, disks: (&str, &str), layout: Layout) -> Self {
        Self::start_laid_out(cluster, name, disks, layout, &[])
    }

    fn start_laid_out(
        cluster: &Cluster,
        name: &str,
        (read_disk, written_disk): (&str, &str),
        layout: Layout,
        options: &[&str],
    ) -> Self {
        let Layout { range, sectors, seed } = layout;
        // Small records are for a guest that lives beside others.
        let pace = if sectors == 1 { "" } else { " pace=0" };
        let disk = |image: &str| cluster.mount(1).join(image).to_str().expect("a UTF-8 path").to_owned();
        let cmdline =
            format!("verify=0 write=1 range={range} sectors={sectors} batch=8 pages=256 seed={seed}{pace}");
        let (read_disk, written_disk) = (disk(read_disk), disk(written_disk));
        let ctl = cluster.ctl(1);
        let disks = ["--disk", &read_disk, "--disk", &written_disk];
        let create = ["vm", "create", name, "--memory", "64M", "--cmdline", &cmdline];
        ctl.must(&[&create[..], &disks, options].concat());
        ctl.must(&["vm", "start", name]);
        Self { name: name.into(), layout }
    }

    /// Waits, asking node `node`, until the guest has acknowledged more than `floor` records.
    ///
    /// # Panics
    /// When it does not within the limit, or found an error itself.
    #[must_use]
    pub fn progress(&self, cluster: &Cluster, node: usize, floor: u64) -> Ack {
        let console = cluster.console(node, &self.name, PATIENCE, |console| {
            assert!(!console.contains("FAIL"), "the guest found an error: {console}");
            last_ack(console.as_bytes()).is_some_and(|ack| ack.sequence > floor)
        });
        last_ack(console.as_bytes()).expect("just seen")
    }

    /// Converts the written disk with qemu-img through node 3's mount and checks it against an acknowledgement.
    ///
    /// # Panics
    /// When anything that was acknowledged is missing, or anything is torn.
    pub fn verify(&self, cluster: &Cluster, written_disk: &str, acked: Ack, folder: &Path) -> Report {
        let raw = folder.join(format!("{}-written.raw", self.name));
        let image = cluster.mount(3).join(written_disk);
        let text = |path: &Path| path.to_str().expect("a UTF-8 path").to_owned();
        run_tool("qemu-img", &["convert", "-f", "vhdx", "-O", "raw", &text(&image), &text(&raw)]);
        self.check(&raw, acked)
    }

    /// The same for a chain, which qemu-img cannot read: by `csvctl vhdx convert`.
    ///
    /// # Panics
    /// When anything that was acknowledged is missing, or anything is torn.
    pub fn verify_ours(&self, cluster: &Cluster, written_disk: &str, acked: Ack, folder: &Path) -> Report {
        self.verify_crashed(cluster, written_disk, acked, folder)
    }

    /// The same after the VM's node has died: the image was not closed, so its log is replayed by `csvctl vhdx convert`.
    ///
    /// # Panics
    /// When anything that was acknowledged is missing, or anything is torn.
    pub fn verify_crashed(&self, cluster: &Cluster, written_disk: &str, acked: Ack, folder: &Path) -> Report {
        let raw = folder.join(format!("{}-crashed.raw", self.name));
        let image = cluster.mount(3).join(written_disk);
        let text = |path: &Path| path.to_str().expect("a UTF-8 path").to_owned();
        Ctl::local().must(&["vhdx", "convert", &text(&image), &text(&raw), "--to", "raw"]);
        self.check(&raw, acked)
    }

    fn check(&self, raw: &Path, acked: Ack) -> Report {
        let reader = BufReader::new(File::open(raw).expect("the converted image"));
        let report = verify_image(reader, self.layout, acked).expect("a readable image");
        assert!(report.is_clean() && report.records_promised > 0, "the disk lost data: {report:?}");
        report
    }
}
