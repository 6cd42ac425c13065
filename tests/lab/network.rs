//! The network between machines: a bridge and a tap for each machine, in the namespace that a scenario runs in (enclosure.rs),
//! with which they go.
//!
//! Taking a tap down cuts one machine off; the host's network is never touched.

use crate::tool::{LabError, run};

const BRIDGE: &str = "br0";

/// The bridge.
#[derive(Debug)]
pub(crate) struct Network(());

impl Network {
    pub(crate) fn new() -> Result<Self, LabError> {
        ip(&["link", "add", BRIDGE, "type", "bridge"])?;
        ip(&["link", "set", BRIDGE, "up"])?;
        Ok(Self(()))
    }

    /// A tap on the bridge for machine `number`; gives its name.
    pub(crate) fn add_tap(&self, number: u8) -> Result<String, LabError> {
        let tap = tap_of(number);
        ip(&["tuntap", "add", &tap, "mode", "tap"])?;
        ip(&["link", "set", &tap, "master", BRIDGE])?;
        self.set_link(number, true)?;
        Ok(tap)
    }

    /// Takes a machine's tap away, once the machine is gone.
    pub(crate) fn remove_tap(&self, number: u8) {
        drop(ip(&["link", "delete", &tap_of(number)]));
    }

    /// Plugs the cable of a machine in or out.
    pub(crate) fn set_link(&self, number: u8, up: bool) -> Result<(), LabError> {
        ip(&["link", "set", &tap_of(number), if up { "up" } else { "down" }])
    }
}

fn ip(arguments: &[&str]) -> Result<(), LabError> {
    run("ip", arguments).map(drop)
}

fn tap_of(number: u8) -> String {
    format!("tap{number}")
}
