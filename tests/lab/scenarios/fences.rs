//! A node that hangs or is cut off loses its right to write, on a real SAN, and comes back as a new incarnation,
//! also when the SAN was restarted meanwhile.

use crate::cluster::{BLOCKS, CONTESTED, SanCluster, check};
use crate::tool::LabError;

const SLEEPER: &str = "sleeper";
const HEIR: &str = "heir";

/// A whole machine is stopped, fenced, and goes on: not one of its writes lands (A1, A2, B3).
pub(super) fn hung() -> Result<(), LabError> {
    taken_over(SanCluster::freeze, SanCluster::thaw)
}

/// The daemon alone is stopped: the LUN refuses its machine's writes whoever asks for them, and what the daemon had before it
/// finds no way when it goes on (A1, A2, B3).
pub(super) fn stopped() -> Result<(), LabError> {
    taken_over(SanCluster::stop_daemon, |lab, node| {
        lab.check_refused_by_lun(node)?;
        lab.continue_daemon(node)
    })
}

/// A machine loses the network, to its peers and to the SAN alike (A1, A2, A7). When it is back, the LUN refuses its writes
/// until it has begun anew.
pub(super) fn cut() -> Result<(), LabError> {
    taken_over(
        |lab, node| lab.plug(node, false),
        |lab, node| {
            lab.stop_daemon(node)?;
            lab.plug(node, true)?;
            lab.check_refused_by_lun(node)?;
            lab.continue_daemon(node)
        },
    )
}

/// The SAN loses its power and boots again while a fenced machine is stopped, with what it had before it in its kernel (A6).
pub(super) fn san_restarted() -> Result<(), LabError> {
    taken_over(SanCluster::freeze, |lab, node| {
        lab.cut_power_of_san();
        lab.boot_san()?;
        lab.until_direct(1, 2)?;
        let events = lab.events(1)?;
        check(!events.contains("volume.cut-off"), "events without a lost key", &events.into())?;
        lab.thaw(node)
    })
}

/// The same, and the SAN has forgotten all keys: those who were in good standing begin anew, and from then on the LUN refuses
/// the writes of the fenced machine again, whoever asks for them there.
pub(super) fn san_forgot() -> Result<(), LabError> {
    taken_over(SanCluster::stop_daemon, |lab, node| {
        lab.cut_power_of_san();
        lab.boot_san_that_forgets()?;
        lab.until_itself_anew(1)?;
        lab.until_itself_anew(2)?;
        lab.until_direct(1, 2)?;
        lab.check_refused_by_lun(node)?;
        lab.continue_daemon(node)
    })
}

type Fault = fn(&mut SanCluster, u8) -> Result<(), LabError>;

fn taken_over(fail: Fault, heal: Fault) -> Result<(), LabError> {
    super::in_folder(|folder| {
        let mut lab = SanCluster::start(folder, 3)?;
        lab.write(1, SLEEPER)?;
        // The coordinator itself.
        lab.ctl(1, "volume move vol1 --to node3")?;
        lab.check_taken_by_lun(3)?;
        lab.write_for_ever(3, SLEEPER)?;
        lab.until_rounds(3, 2)?;
        fail(&mut lab, 3)?;
        lab.until_node(1, 3, "fenced")?;
        let events = lab.events(1)?;
        check(events.contains("the LUNs refuse its writes"), "a fence by the LUN", &events.into())?;
        lab.write(1, HEIR)?;
        lab.check_lun(SLEEPER, 0)?;
        lab.check_lun(HEIR, BLOCKS)?;
        lab.say("another node has taken over and written");
        heal(&mut lab, 3)?;
        lab.until_anew(1, 3)?;
        lab.check_lun(SLEEPER, 0)?;
        lab.check_lun(HEIR, BLOCKS)?;
        lab.say("no write of the node that was cut off has landed");
        lab.until_whole(&[1, 2, 3])?;
        lab.run(3, &format!("head -c 4 {CONTESTED} | grep -q {HEIR}"))?;
        lab.check_volume(2)
    })
}
