//! What the guest in a checkpoint's memory was given when it booted: its processor and the version of its devices.
//!
//! ```text
//!   boot: baseline 1 --checkpoint a: memory, 1--> boot: baseline 2 --restore a--> baseline 1, as that memory has it
//! ```
//! **Invariant:** of a VM that goes on from a memory the record says what that memory was given, whatever it booted with since.

use api::pb;

/// The checkpoint, with what the guest was given if it keeps its memory. One that boots is given what there is then.
pub(super) fn keep(checkpoint: pb::VmCheckpoint, spec: &pb::VmSpec) -> pb::VmCheckpoint {
    if checkpoint.state.is_empty() {
        return checkpoint;
    }
    pb::VmCheckpoint { baseline: Some(spec.baseline), devices: Some(spec.devices), ..checkpoint }
}

/// The VM as the checkpoint's guest has it. Of a checkpoint that does not say so the record's own words are the best there are.
pub(super) fn put_back(spec: pb::VmSpec, checkpoint: &pb::VmCheckpoint) -> pb::VmSpec {
    pb::VmSpec {
        baseline: checkpoint.baseline.unwrap_or(spec.baseline),
        devices: checkpoint.devices.unwrap_or(spec.devices),
        ..spec
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    fn given(baseline: u32, devices: u32) -> pb::VmSpec {
        pb::VmSpec { baseline, devices, ..pb::VmSpec::default() }
    }

    fn with_memory() -> pb::VmCheckpoint {
        pb::VmCheckpoint { state: "vol1:/.vm.checkpoint".into(), ..pb::VmCheckpoint::default() }
    }

    #[test]
    fn a_vm_that_returns_to_a_memory_has_what_that_was_given_and_not_what_it_booted_with_since() {
        for (then, since) in
            [(given(1, 0), given(2, 1)), (given(3, 1), given(1, 0)), (given(0, 0), given(1, 1))]
        {
            assert_eq!(put_back(since, &keep(with_memory(), &then)), then);
        }
    }

    #[test]
    fn a_checkpoint_without_memory_keeps_nothing_of_a_guest() {
        let kept = keep(pb::VmCheckpoint::default(), &given(1, 1));
        assert_eq!(kept, pb::VmCheckpoint::default());
        assert_eq!(put_back(given(2, 0), &kept), given(2, 0));
    }

    // Invariant G4
    #[test]
    fn a_checkpoint_of_a_release_that_kept_nothing_of_a_guest_changes_nothing_of_the_vm() {
        // Name `a` and state `v:/m`, as they were written before there was more.
        let written = b"\x0a\x01a\x22\x04v:/m";
        let old = pb::VmCheckpoint::decode(&written[..]).expect("it is still read");
        assert_eq!((old.name.as_str(), old.state.as_str()), ("a", "v:/m"));
        assert_eq!(put_back(given(2, 1), &old), given(2, 1));
        assert_eq!(old.encode_to_vec(), written);
    }
}
