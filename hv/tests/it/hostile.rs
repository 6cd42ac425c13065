//! A saved state from an enemy is refused or harmless, never a panic (H7).

use blockio::MemoryDevice;
use blockio::{BlockDevice, ImageFile};
use hv::snapshot;
use hv::state::{SavedImage, SavedMachine};
use prost::Message;

use crate::support::{Disks, empty, kvm_is_here, wait_ack_beyond, writer};

/// The same in every run; a failure names its round.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn saved() -> SavedMachine {
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    vm.resume().unwrap();
    wait_ack_beyond(&vm, 0);
    vm.pause().unwrap();
    vm.save_state().unwrap()
}

#[test]
fn a_state_with_damaged_bytes_is_refused_or_harmless() {
    if !kvm_is_here() {
        return;
    }
    let good = saved().encode_to_vec();
    let disks = Disks::new();
    let mut noise = Noise(0x1234_5678_9abc_def1);
    let mut decoded = 0;
    for _ in 0..150 {
        let mut bad = good.clone();
        for _ in 0..=noise.next() % 4 {
            let at = usize::try_from(noise.next() % good.len() as u64).unwrap();
            bad[at] = noise.next().to_le_bytes()[0];
        }
        if let Ok(machine) = SavedMachine::decode(&*bad) {
            decoded += 1;
            let target = empty(disks.configs(false));
            // Either way is fine; neither may panic or touch what is not the target's.
            drop(target.restore_state(&machine));
        }
    }
    assert!(decoded > 20, "only {decoded} states got as far as the VM");
}

#[test]
fn a_file_of_noise_is_no_saved_vm() {
    let file = MemoryDevice::new(4 << 20);
    let mut noise = Noise(99);
    for at in (0..4 << 20).step_by(4096) {
        let page: Vec<u8> = (0..512).flat_map(|_| noise.next().to_le_bytes()).collect();
        file.write_at(at, &page).unwrap();
    }
    assert!(snapshot::read_contents(&file).is_err());
    file.set_len(0).unwrap();
    assert!(snapshot::read_contents(&file).is_err());
}

#[test]
fn a_table_of_runs_that_leaves_ram_is_refused() {
    use hv::state::Run;
    let machine = SavedMachine { version: 1, memory_bytes: 4 << 20, ..SavedMachine::default() };
    let run = |offset, bytes| Run { offset, bytes, crc32c: 0 };
    for runs in [
        vec![run(4 << 20, 4096)],
        vec![run(0, 0)],
        vec![run(0, 100)],
        vec![run(7, 4096)],
        vec![run(u64::MAX - 4095, 8192)],
        vec![run(0, 2 << 20)],
        vec![run(8192, 4096), run(0, 4096)],
        vec![run(0, 8192), run(4096, 4096)],
    ] {
        let image =
            SavedImage { machine: Some(machine.clone()), runs: runs.clone(), vm: vec![], vm_epoch: 0 };
        assert!(snapshot::check_contents(&image, 4 << 20).is_err(), "{runs:?}");
    }
    let sound = SavedImage { machine: Some(machine), runs: vec![run(0, 4096)], vm: vec![], vm_epoch: 0 };
    snapshot::check_contents(&sound, 4 << 20).unwrap();
}
