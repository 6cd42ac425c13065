//! Power that fails: of the SAN, of the coordinator, of everything; and a path that is lost.

use crate::cluster::{BLOCKS, CONTESTED, MOUNT, SanCluster, check};
use crate::tool::LabError;

const LOAD: &str = "load";
const LATER: &str = "later";

/// All nodes lose the LUN at once: nobody is fenced, and everything goes on when it is back.
pub(super) fn san_power_cut() -> Result<(), LabError> {
    super::in_folder(|folder| {
        let mut lab = SanCluster::start(folder, 3)?;
        lab.write_for_ever(2, LOAD)?;
        lab.until_rounds(2, 2)?;
        lab.cut_power_of_san();
        lab.until(1, "volume state vol1 --node node2", "node2 waits for the LUN", |rows| {
            rows["states"][0]["state"] == "paused"
        })?;
        lab.boot_san()?;
        lab.until_direct(1, 3)?;
        lab.until_rounds(2, 2)?;
        let events = lab.events(1)?;
        check(!events.contains("node.fencing"), "events without a fence", &events.clone().into())?;
        check(!events.contains("volume.cut-off"), "events without a lost key", &events.into())?;
        lab.write(1, LATER)?;
        lab.check_volume(3)
    })
}

/// The coordinator loses its power while another node writes: that one sees a pause and no error.
pub(super) fn coordinator_power_cut() -> Result<(), LabError> {
    super::in_folder(|folder| {
        let mut lab = SanCluster::start(folder, 3)?;
        lab.write(1, LOAD)?;
        lab.ctl(1, "volume move vol1 --to node3")?;
        lab.write_for_ever(2, LOAD)?;
        lab.until_rounds(2, 2)?;
        lab.cut_power(3);
        lab.run(1, &format!("touch {MOUNT}/made-by-the-next-coordinator"))?;
        lab.until_node(1, 3, "fenced")?;
        lab.until_rounds(2, 2)?;
        lab.check_lun(LOAD, BLOCKS)?;
        lab.check_volume(1)?;
        lab.boot(3)?;
        lab.until_whole(&[1, 2, 3])?;
        lab.run(3, &format!("ls {MOUNT}/made-by-the-next-coordinator"))?;
        lab.check_volume(3)
    })
}

/// One node loses its path to the SAN alone: it goes on through a peer, and returns by itself.
pub(super) fn path_loss() -> Result<(), LabError> {
    super::in_folder(|folder| {
        let mut lab = SanCluster::start(folder, 3)?;
        lab.write_for_ever(2, LOAD)?;
        lab.until_rounds(2, 2)?;
        lab.set_path(2, false)?;
        let row = |rows: &serde_json::Value, state: &str| rows["states"][0]["state"] == state;
        let question = "volume state vol1 --node node2";
        lab.until(1, question, "node2 goes through a peer", |rows| row(rows, "redirected_block"))?;
        lab.until_rounds(2, 2)?;
        lab.set_path(2, true)?;
        lab.until(1, question, "node2 reaches the LUN directly again", |rows| row(rows, "direct"))?;
        lab.until_rounds(2, 2)?;
        let events = lab.events(1)?;
        check(!events.contains("node.fencing"), "events without a fence", &events.into())?;
        lab.check_volume(1)
    })
}

/// Everything loses its power; what was acknowledged is there when it is back, without hands.
pub(super) fn cluster_power_cut() -> Result<(), LabError> {
    super::in_folder(|folder| {
        let mut lab = SanCluster::start(folder, 3)?;
        lab.write(2, LOAD)?;
        for number in 1..=3 {
            lab.cut_power(number);
        }
        lab.cut_power_of_san();
        lab.boot_san()?;
        for number in 1..=3 {
            lab.boot(number)?;
        }
        lab.until_whole(&[1, 2, 3])?;
        lab.check_lun(LOAD, BLOCKS)?;
        lab.run(3, &format!("head -c 4 {CONTESTED} | grep -q {LOAD}"))?;
        lab.check_volume(1)
    })
}
