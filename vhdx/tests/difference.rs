//! A disk as a child of another one: what differs is written, by several workers at once, and nothing else.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};

use blockio::{BlockDevice, FaultDevice, MemoryDevice, OpKind};
use common::{Folder, MIB, Random, assert_sound, bytes_at, path};
use vhdx::{ErrorKind, Progress, Spec, write_difference};

const SIZE: u64 = 24 * MIB;

fn index(value: u64) -> usize {
    usize::try_from(value).expect("small")
}

/// A parent with some content, and a source that has other content here and there.
fn differing_disks(folder: &mut Folder, source_bytes: u64) -> Vec<u8> {
    folder.base("base", &Spec { block_bytes: MIB, ..Spec::dynamic(SIZE) });
    let (mut model, mut random) = (vec![0; index(SIZE)], Random(5));
    let disk = folder.disk("base");
    for _ in 0..40 {
        let (sector, value) =
            (random.below(SIZE / 512 - 300), u8::try_from(random.below(255) + 1).expect("small"));
        let range = index(sector * 512)..index(sector * 512 + 300 * 512);
        disk.write_at(sector * 512, &vec![value; range.len()]).expect("it is writable");
        model[range].fill(value);
    }
    disk.close().expect("it closes");
    for _ in 0..20 {
        let sector = random.below(SIZE / 512 - 9);
        let value = u8::try_from(random.below(4)).expect("small");
        model[index(sector * 512)..index((sector + 9) * 512)].fill(value);
    }
    model.truncate(index(source_bytes));
    model
}

#[test]
fn a_child_made_of_a_difference_reads_as_the_source_and_holds_little_else() {
    for source_bytes in [SIZE, SIZE - 5 * MIB - 512] {
        let mut folder = Folder::default();
        let model = differing_disks(&mut folder, source_bytes);
        let source = MemoryDevice::new(source_bytes);
        source.write_at(0, &model).expect("it is writable");
        folder.child("child", "base", |_| ());
        let (disk, parent) = (folder.disk("child"), folder.image("base"));
        let mut told = Vec::new();
        let done = write_difference(&source, &parent, &disk, &mut |progress| told.push(progress))
            .expect("it is written");
        disk.close().expect("it closes");
        drop(disk);
        let wanted = [model, vec![0; index(SIZE - source_bytes)]].concat();
        assert!(bytes_at(&folder.image("child"), 0, index(SIZE)) == wanted);
        assert_sound(&folder.0[&path("child")]);
        assert!(done.data_bytes > 0 && done.data_bytes < SIZE / 2, "{done:?}");
        assert_eq!(told.last(), Some(&done));
        assert!(told.is_sorted_by_key(|progress: &Progress| progress.done_bytes), "it never goes back");
    }
}

#[test]
fn a_source_that_fails_ends_the_work_and_nothing_is_written_after_that() {
    let mut folder = Folder::default();
    let model = differing_disks(&mut folder, SIZE);
    let memory = MemoryDevice::new(SIZE);
    memory.write_at(0, &model).expect("it is writable");
    let source = FaultDevice::new(memory);
    source.fail(OpKind::Read, 3, 5);
    folder.child("child", "base", |_| ());
    let (disk, parent) = (folder.disk("child"), folder.image("base"));
    let told = AtomicU64::new(0);
    let error = write_difference(&source, &parent, &disk, &mut |_| {
        told.fetch_add(1, Ordering::SeqCst);
    });
    assert_eq!(error.expect_err("it failed").kind(), ErrorKind::Io);
    assert!(told.load(Ordering::SeqCst) < SIZE / (2 * MIB), "it did not go on to the end");
    disk.close().expect("the child is whole, as far as it came");
    assert_sound(&folder.0[&path("child")]);
}
