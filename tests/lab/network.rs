//! The network between machines: a bridge in a namespace of its own, a tap for each machine.
//!
//! Taking a tap down cuts one machine off; the host's network is never touched.

use crate::tool::{LabError, run};

const BRIDGE: &str = "br0";

/// A namespace with a bridge. All of it goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Network {
    namespace: String,
}

impl Network {
    pub(crate) fn new() -> Result<Self, LabError> {
        let network = Self { namespace: format!("lab{}", std::process::id()) };
        run("ip", &["netns", "add", &network.namespace])?;
        network.ip(&["link", "set", "lo", "up"])?;
        network.ip(&["link", "add", BRIDGE, "type", "bridge"])?;
        network.ip(&["link", "set", BRIDGE, "up"])?;
        Ok(network)
    }

    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// A tap on the bridge for machine `number`; gives its name.
    pub(crate) fn add_tap(&self, number: u8) -> Result<String, LabError> {
        let tap = tap_of(number);
        self.ip(&["tuntap", "add", &tap, "mode", "tap"])?;
        self.ip(&["link", "set", &tap, "master", BRIDGE])?;
        self.set_link(number, true)?;
        Ok(tap)
    }

    /// Takes a machine's tap away, once the machine is gone.
    pub(crate) fn remove_tap(&self, number: u8) {
        drop(self.ip(&["link", "delete", &tap_of(number)]));
    }

    /// Plugs the cable of a machine in or out.
    pub(crate) fn set_link(&self, number: u8, up: bool) -> Result<(), LabError> {
        self.ip(&["link", "set", &tap_of(number), if up { "up" } else { "down" }])
    }

    fn ip(&self, arguments: &[&str]) -> Result<(), LabError> {
        run("ip", &[&["-n", &self.namespace], arguments].concat()).map(drop)
    }
}

fn tap_of(number: u8) -> String {
    format!("tap{number}")
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Err(error) = run("ip", &["netns", "delete", &self.namespace]) {
            eprintln!("lab: the network namespace stays behind: {error}");
        }
    }
}
