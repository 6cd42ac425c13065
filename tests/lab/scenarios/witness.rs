//! Two nodes and a witness that reaches no LUN: either node may hang, and the fence of each is tried out while in use.

use crate::cluster::{BLOCKS, Kit, SanCluster, check};
use crate::tool::LabError;

const FIRST: &str = "first";
const SECOND: &str = "second";

pub(super) fn two_nodes() -> Result<(), LabError> {
    super::in_folder(|folder| {
        let mut lab = SanCluster::start_with_witness(folder, &Kit::PLAIN)?;
        let report = lab.ctl(1, "cluster validate")?;
        let tried = report["checks"].as_array().is_some_and(|checks| {
            let fences = checks.iter().filter(|check| check["what"] == "fence");
            fences.clone().count() == 2
                && fences.into_iter().all(|check| check["detail"].to_string().contains("the LUN refused"))
        });
        check(tried, "two fences that were tried out on the LUN", &report)?;
        lab.say("the fence of each node was tried out");
        lab.write(1, FIRST)?;
        lab.ctl(1, "volume move vol1 --to node2")?;
        lab.write_for_ever(2, FIRST)?;
        lab.until_rounds(2, 2)?;
        lab.freeze(2)?;
        lab.until_node(1, 2, "fenced")?;
        lab.write(1, SECOND)?;
        lab.thaw(2)?;
        lab.until_anew(1, 2)?;
        lab.check_lun(FIRST, 0)?;
        lab.check_lun(SECOND, BLOCKS)?;
        lab.ctl(2, "cluster wait --nodes 3 --volume vol1 --timeout 200")?;
        lab.check_volume(1)
    })
}
