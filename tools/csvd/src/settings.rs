//! Settings of the whole cluster: their names, defaults and meaning. The values are in the records, so every node has the same.

use std::sync::Arc;

use api::{Error, pb};
use lockmgr::cluster::{ClusterState, Command};

use crate::core::Core;

/// A switch of the whole cluster.
#[derive(Debug)]
pub(crate) struct Switch {
    name: &'static str,
    /// What it is while nobody has said otherwise.
    default: bool,
    about: &'static str,
}

/// Whether coordinators move by themselves to nodes with less to do.
pub(crate) const BALANCE_VOLUMES: Switch = Switch {
    name: "balance.volumes",
    default: true,
    about: "move coordinators of volumes from nodes that have much to do to nodes that have little",
};

const ALL: &[Switch] = &[BALANCE_VOLUMES];

impl Switch {
    pub(crate) fn is_on(&self, state: &ClusterState) -> bool {
        state.settings.get(self.name).map_or(self.default, |value| value == word(true))
    }

    fn shown(&self, state: &ClusterState) -> pb::Setting {
        pb::Setting {
            name: self.name.to_owned(),
            value: word(self.is_on(state)).to_owned(),
            is_default: !state.settings.contains_key(self.name),
            about: self.about.to_owned(),
        }
    }
}

fn word(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// All settings, with their values.
pub(crate) fn list(core: &Core) -> pb::SettingList {
    let state = core.state();
    pb::SettingList { settings: ALL.iter().map(|switch| switch.shown(&state)).collect() }
}

/// Changes one; without a value it has its default again.
pub(crate) async fn set(core: &Arc<Core>, request: pb::SetRequest) -> Result<pb::Setting, Error> {
    let names: Vec<_> = ALL.iter().map(|switch| switch.name).collect();
    let switch = ALL.iter().find(|switch| switch.name == request.name).ok_or_else(|| {
        Error::not_found(format!("there is no setting {}", request.name))
            .hint(format!("there are {}", names.join(", ")))
    })?;
    if let Some(value) = &request.value
        && value != word(true)
        && value != word(false)
    {
        return Err(Error::usage(format!("{}: `{value}` is no value of it", request.name))
            .hint("it can be on or off"));
    }
    core.all_speak(2, "a setting")?;
    core.propose(Command::Set { name: request.name, value: request.value }).await?;
    Ok(switch.shown(&core.state()))
}
