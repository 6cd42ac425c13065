//! The scenario of every test run: real machines and a real reservation, as few and as short as it can be.
//!
//! ```text
//!   node1 + the witness beside it --.                 node2: the coordinator; its daemon is stopped under load
//!         takes over, fences -------+--iSCSI--> SAN <-- its machine's writes are refused by the LUN
//! ```

use crate::cluster::{BLOCKS, SanCluster, check};
use crate::tool::LabError;

const FIRST: &str = "first";
const SECOND: &str = "second";

/// A coordinator that hangs is fenced by a reservation: the LUN refuses its machine's writes, and the node that is left reads
/// what was acknowledged and goes on (A1, A2, A7).
pub(super) fn run() -> Result<(), LabError> {
    super::in_folder(|folder| {
        let mut lab = SanCluster::start_small(folder)?;
        lab.ctl(1, "volume move vol1 --to node2")?;
        lab.write(2, FIRST)?;
        lab.check_taken_by_lun(2)?;
        lab.write_for_ever(2, FIRST)?;
        lab.until_rounds(2, 1)?;
        lab.stop_daemon(2)?;
        lab.until_node(1, 2, "fenced")?;
        let events = lab.events(1)?;
        check(events.contains("the LUNs refuse its writes"), "a fence by the LUN", &events.into())?;
        lab.check_refused_by_lun(2)?;
        lab.check_content(1, FIRST)?;
        lab.write(1, SECOND)?;
        lab.check_lun(FIRST, 0)?;
        lab.check_lun(SECOND, BLOCKS)?;
        lab.check_volume(1)
    })
}
