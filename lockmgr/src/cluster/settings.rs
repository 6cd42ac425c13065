//! Settings of the whole cluster: names and values that every node reads from the records. What they mean is not known here.

use super::apply::{Applied, Line, check_name, check_text, invalid};
use super::command::{Given, Rejection};
use super::records::ClusterState;

/// Settings that differ from their defaults.
pub const SETTINGS_MAX: usize = 64;

impl ClusterState {
    pub(super) fn set(&mut self, name: String, value: Option<String>) -> Applied {
        let text = match value {
            None => {
                self.settings.remove(&name);
                format!("{name} has its default again")
            }
            Some(_) if self.settings.len() >= SETTINGS_MAX && !self.settings.contains_key(&name) => {
                return Err(invalid(format!("{SETTINGS_MAX} settings are changed already")));
            }
            Some(value) => {
                let text = format!("{name} is {value} from now on");
                self.settings.insert(name.clone(), value);
                text
            }
        };
        Ok((Given::Nothing, Line { kind: "cluster.setting", subject: name, text }))
    }
}

pub(super) fn check_size(name: &str, value: Option<&str>) -> Result<(), Rejection> {
    check_name("setting", name)?;
    check_text("value", value.unwrap_or_default())
}
