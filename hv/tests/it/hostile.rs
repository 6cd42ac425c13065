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
fn tables_that_do_not_fit_ram_are_refused() {
    let machine = SavedMachine { version: 1, memory_bytes: 4 << 20, ..SavedMachine::default() };
    let image = |present: Vec<u8>, sums: usize| SavedImage {
        machine: Some(machine.clone()),
        present,
        sums: vec![0; sums],
        ..SavedImage::default()
    };
    let some = |pages: &[usize]| {
        let mut bits = vec![0; 128];
        pages.iter().for_each(|page| bits[page / 8] |= 1 << (page % 8));
        bits
    };
    for (present, sums) in
        [(vec![], 0), (vec![0; 127], 0), (vec![0; 136], 0), (some(&[0]), 0), (some(&[0]), 5), (some(&[]), 4)]
    {
        let bad = image(present, sums);
        assert!(snapshot::check_contents(&bad, 4 << 20).is_err(), "{} {sums}", bad.present.len());
    }
    snapshot::check_contents(&image(some(&[0, 1023]), 8), 4 << 20).unwrap();
}
