//! The slow reader's log: every sector of the ring is tried as an entry, every entry as the start of a run, the best wins.

use blockio::ImageFile;

use super::{MIB, Outcome, id_at, raw, sealed, small, u32_at, u64_at};

const SECTOR: u64 = 4096;

/// A change that the log makes: bytes, or zeros.
pub(crate) enum Patch {
    Page { offset: u64, bytes: Vec<u8> },
    Zero { offset: u64, len: u64 },
}

/// What the active run does.
pub(crate) struct Replay {
    pub(crate) patches: Vec<Patch>,
    pub(crate) last_file_bytes: u64,
}

/// A valid entry.
struct Entry {
    at: u64,
    bytes: Vec<u8>,
}

impl Entry {
    fn len(&self) -> u64 {
        u64::from(u32_at(&self.bytes, 8))
    }

    fn tail(&self) -> u64 {
        u64::from(u32_at(&self.bytes, 12))
    }

    fn sequence(&self) -> u64 {
        u64_at(&self.bytes, 16)
    }

    fn descriptors(&self) -> u64 {
        u64::from(u32_at(&self.bytes, 24))
    }

    fn data_start(&self) -> u64 {
        (self.descriptors() + 2).div_ceil(128) * SECTOR
    }

    fn patches(&self) -> Option<Vec<Patch>> {
        let mut patches = Vec::new();
        let mut data = self.bytes.get(small(self.data_start())..)?.chunks_exact(small(SECTOR));
        for number in 0..self.descriptors() {
            let descriptor = &self.bytes[small(64 + number * 32)..][..32];
            let offset = u64_at(descriptor, 16);
            if u64_at(descriptor, 24) != self.sequence() || !offset.is_multiple_of(SECTOR) {
                return None;
            }
            patches.push(match &descriptor[..4] {
                b"zero" => Patch::Zero { offset, len: u64_at(descriptor, 8) },
                b"desc" => Patch::Page { offset, bytes: self.page(descriptor, data.next()?)? },
                _ => return None,
            });
        }
        data.next().is_none().then_some(patches)
    }

    fn page(&self, descriptor: &[u8], data: &[u8]) -> Option<Vec<u8>> {
        let sequence = u64::from(u32_at(data, 4)) << 32 | u64::from(u32_at(data, 4092));
        let right = data.starts_with(b"data") && sequence == self.sequence();
        right.then(|| [&descriptor[8..16], &data[8..4092], &descriptor[4..8]].concat())
    }
}

/// Reads the log that the header names.
pub(super) fn read(file: &dyn ImageFile, header: &[u8]) -> Outcome<Option<Replay>> {
    let id = id_at(header, 48);
    if id == [0; 16] {
        return Ok(None);
    }
    let ring = raw(file, u64_at(header, 72), u64::from(u32_at(header, 68)));
    let entries: Vec<Option<Entry>> =
        (0..ring.len() as u64 / SECTOR).map(|number| entry(&ring, &id, number * SECTOR)).collect();
    let runs = (0..entries.len()).map(|start| run(&entries, start));
    let whole = runs.filter_map(|run| {
        let head = run.last()?;
        let tail = run.iter().position(|entry| entry.at == head.tail())?;
        Some((head.sequence(), tail, run))
    });
    // The first of equals: a run and its own later part have the same head, and the tail cuts both alike.
    let best = whole.fold(None, |best: Option<(u64, usize, Vec<&Entry>)>, next| match best {
        Some(best) if best.0 >= next.0 => Some(best),
        _ => Some(next),
    });
    let Some((_, tail, run)) = best else {
        // An id without a run promises nothing: the file is read as it lies there.
        return Ok(None);
    };
    let head = run.last().expect("it has a head");
    if u64_at(&head.bytes, 48) > file.geometry().size_bytes {
        return Err("the file was cut short".to_owned());
    }
    let last_file_bytes = u64_at(&head.bytes, 56);
    let patches = run[tail..].iter().flat_map(|entry| entry.patches().expect("checked")).collect();
    Ok(Some(Replay { patches, last_file_bytes }))
}

fn run(entries: &[Option<Entry>], start: usize) -> Vec<&Entry> {
    let mut run: Vec<&Entry> = Vec::new();
    let (mut at, mut room) = (start, entries.len());
    while let Some(entry) = &entries[at] {
        let sectors = small(entry.len() / SECTOR);
        let follows = run.last().is_none_or(|last| last.sequence().checked_add(1) == Some(entry.sequence()));
        if sectors > room || !follows {
            break;
        }
        room -= sectors;
        at = (at + sectors) % entries.len();
        run.push(entry);
        if room == 0 {
            break;
        }
    }
    run
}

fn entry(ring: &[u8], id: &[u8; 16], at: u64) -> Option<Entry> {
    let head = &ring[small(at)..][..64];
    let (len, tail) = (u64::from(u32_at(head, 8)), u64::from(u32_at(head, 12)));
    let file_sizes = [u64_at(head, 48), u64_at(head, 56)];
    let plausible = head.starts_with(b"loge")
        && file_sizes.iter().all(|size| size.is_multiple_of(MIB))
        && id_at(head, 32) == *id
        && u64_at(head, 16) > 0
        && len >= SECTOR
        && len.is_multiple_of(SECTOR)
        && len <= ring.len() as u64
        && tail.is_multiple_of(SECTOR)
        && tail < ring.len() as u64;
    if !plausible {
        return None;
    }
    let (first, second) = (&ring[small(at)..], &ring[..small(at)]);
    let bytes = match small(len).checked_sub(first.len()) {
        None => first[..small(len)].to_vec(),
        Some(wrapped) => [first, &second[..wrapped]].concat(),
    };
    let entry = Entry { at, bytes };
    (sealed(&entry.bytes) && entry.data_start() <= len && entry.patches().is_some()).then_some(entry)
}

impl Patch {
    /// Puts the part of the change that lies in `offset ..` over `content`.
    pub(super) fn lay_over(&self, offset: u64, content: &mut [u8]) {
        let (start, len) = match self {
            Self::Page { offset, bytes } => (*offset, bytes.len() as u64),
            Self::Zero { offset, len } => (*offset, *len),
        };
        let from = start.max(offset);
        let to = start.saturating_add(len).min(offset + content.len() as u64);
        if from >= to {
            return;
        }
        let target = &mut content[small(from - offset)..small(to - offset)];
        match self {
            Self::Page { bytes, .. } => {
                target.copy_from_slice(&bytes[small(from - start)..small(to - start)]);
            }
            Self::Zero { .. } => target.fill(0),
        }
    }
}
