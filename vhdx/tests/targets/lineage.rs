//! Parent locators and chains that were shaped to do harm.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use blockio::{BlockDevice, ImageFile, MemoryDevice};
use vhdx::{Builder, ChildSpec, OpenFailure, ParentFiles, ParentResolver, Spec, create, create_child};

use super::feed::Feed;
use super::images::{put, seal};
use crate::common::{MIB, bytes_at};

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
/// Entry of the locator in the metadata table: parameters, size, two sector sizes and the disk id come before it.
const LOCATOR_ENTRY: u64 = 2 * MIB + 32 + 5 * 32;
const LOCATOR: u64 = 2 * MIB + (64 << 10) + 40;
const SIZE: u64 = 4 * MIB;
/// Files that one open of a chain may ask for: three ways for each of 64 parents.
const OPENS_MAX: usize = 3 * 65;

/// A folder that proves what is asked of it.
struct Guarded {
    files: BTreeMap<String, Arc<dyn ImageFile>>,
    opens: AtomicUsize,
    asked: Mutex<Vec<String>>,
}

impl ParentFiles for Guarded {
    fn open(&self, root: &str, below: &str) -> Result<Arc<dyn ImageFile>, OpenFailure> {
        assert_eq!(root, "/vms", "only the allowed folder is ever looked into");
        let parts: Vec<&str> = below.split('/').collect();
        let harmless =
            |part: &&str| !part.is_empty() && *part != "." && *part != ".." && !part.contains(['\0', '\\']);
        assert!(parts.iter().all(harmless), "{below:?} was asked for");
        let opens = self.opens.fetch_add(1, Ordering::SeqCst);
        assert!(opens < OPENS_MAX, "there is no end to it: {:?}", self.asked.lock());
        self.asked.lock().expect("nobody panics with it").push(below.to_owned());
        self.files.get(&format!("/vms/{below}")).cloned().ok_or(OpenFailure::NotFound)
    }
}

fn resolver(files: &BTreeMap<String, Arc<dyn ImageFile>>) -> ParentResolver {
    let guarded = Guarded { files: files.clone(), opens: AtomicUsize::new(0), asked: Mutex::default() };
    ParentResolver::new(Arc::new(guarded))
        .root("/vms")
        .map(r"C:\ClusterStorage\Volume1", "/vms")
        .map(r"D:\", "/etc")
}

/// A copy of the three images.
fn family() -> Vec<(&'static str, MemoryDevice)> {
    static FAMILY: OnceLock<Vec<(&'static str, MemoryDevice)>> = OnceLock::new();
    FAMILY.get_or_init(made_family).iter().map(|(name, image)| (*name, image.fork())).collect()
}

/// Three images: `/vms/0`, its child `/vms/a/1`, and the child of that, `/vms/2`.
fn made_family() -> Vec<(&'static str, MemoryDevice)> {
    let names = ["/vms/0", "/vms/a/1", "/vms/2"];
    let mut files: BTreeMap<String, Arc<dyn ImageFile>> = BTreeMap::new();
    let mut family = Vec::new();
    for (number, name) in names.into_iter().enumerate() {
        let file = Arc::new(MemoryDevice::with_block_bytes(0, 1));
        match number.checked_sub(1).map(|below| names[below]) {
            None => create(&*file, &Spec { block_bytes: MIB, ..Spec::dynamic(SIZE) }).expect("it is created"),
            Some(parent) => {
                let paths = resolver(&files).paths(name, parent).expect("both are paths");
                let spec = ChildSpec { block_bytes: MIB, ..ChildSpec::new(paths) };
                let below = Builder::open(Arc::clone(&files[parent])).parents(resolver(&files), parent);
                create_child(&*file, &below.read_only().expect("it opens"), &spec).expect("it is created");
            }
        }
        files.insert(name.to_owned(), Arc::clone(&file) as Arc<dyn ImageFile>);
        family.push((name, file.fork()));
    }
    family
}

fn files_of(family: &[(&'static str, MemoryDevice)]) -> BTreeMap<String, Arc<dyn ImageFile>> {
    let file = |(name, image): &(&'static str, MemoryDevice)| {
        ((*name).to_owned(), Arc::new(image.fork()) as Arc<dyn ImageFile>)
    };
    family.iter().map(file).collect()
}

/// Opens the top in each way; nothing but a named error or a readable disk may come of it, and no byte changes.
fn try_chain(family: &[(&'static str, MemoryDevice)], why: &str) {
    let (files, top) = (files_of(family), "/vms/2");
    let open = || Builder::open(Arc::clone(&files[top])).parents(resolver(&files), top);
    drop(vhdx::info(&files[top]));
    drop(vhdx::check(&files[top]));
    drop(open().children());
    if let Ok(image) = open().read_only() {
        let len = usize::try_from(image.geometry().size_bytes.min(SIZE)).expect("small") / 4096 * 4096;
        image.read_at(0, &mut vec![0; len]).unwrap_or_else(|error| panic!("{why}: {error}"));
        assert!(image.parents() <= 64, "{why}");
    }
    drop(open().inactive());
    for ((name, image), file) in family.iter().zip(family.iter().map(|(name, _)| &files[*name])) {
        let size = image.geometry().size_bytes;
        assert_eq!(file.geometry().size_bytes, size, "{why}: {name} changed its size");
        let len = usize::try_from(size).expect("small");
        assert!(bytes_at(file, 0, len) == bytes_at(image, 0, len), "{why}: reading wrote to {name}");
    }
    if let Ok(disk) = open().writable() {
        drop(disk.write_at(0, &[1; 4096]));
        drop(disk.close());
    }
    for (name, image) in &family[..2] {
        let len = usize::try_from(image.geometry().size_bytes).expect("small");
        assert!(bytes_at(&files[*name], 0, len) == bytes_at(image, 0, len), "{why}: a parent was written");
    }
}

/// The bytes become the locator of the top: as they are, or as the pairs of a well-formed one.
pub(crate) fn locator(data: &[u8]) {
    let mut feed = Feed::new(data);
    let family = family();
    let item = match feed.byte() % 2 {
        0 => feed.bytes(4096).to_vec(),
        _ => made_locator(&family[1].1, &mut feed),
    };
    let top = &family[2].1;
    put(top, LOCATOR, &item);
    put(top, LOCATOR_ENTRY + 20, &u32::try_from(item.len()).expect("small").to_le_bytes());
    try_chain(&family, &format!("locator {data:02x?}"));
}

/// Pairs of which the input chooses keys, values, offsets and lengths.
fn made_locator(parent: &MemoryDevice, feed: &mut Feed<'_>) -> Vec<u8> {
    let keys = ["parent_linkage", "parent_linkage2", "relative_path", "volume_path", "absolute_win32_path"];
    let linkage = uuid::Uuid::from_slice_le(&bytes_at(parent, HEADERS[1] + 32, 16)).expect("16 bytes");
    let values = [
        linkage.braced().to_string(),
        uuid::Uuid::nil().braced().to_string(),
        r".\a\1".to_owned(),
        r"..\etc\passwd".to_owned(),
        r"..\..\..\..\..\vms\a\1".to_owned(),
        r"\\?\C:\ClusterStorage\Volume1\a\1".to_owned(),
        r"\\?\D:\shadow".to_owned(),
        r"\\server\share\a\1".to_owned(),
        r"a//.//1\".to_owned(),
        r"2".to_owned(),
        "/dev/zero".to_owned(),
        "a\u{0}b".to_owned(),
    ];
    let mut pairs = Vec::new();
    for _ in 0..feed.byte() % 8 {
        let key = keys[usize::from(feed.byte()) % keys.len()].to_owned();
        let value = match usize::from(feed.byte()) {
            known if known < 200 => values[known % values.len()].clone(),
            _ => String::from_utf8_lossy(feed.bytes(24)).into_owned(),
        };
        pairs.push((key, value));
    }
    let mut item = uuid::uuid!("B04AEFB7-D19E-4A81-B789-25B8E9445913").to_bytes_le().to_vec();
    let count = if feed.byte() == 1 { feed.number() } else { pairs.len() as u64 };
    item.extend([0, 0]);
    item.extend(u16::try_from(count).expect("two bytes").to_le_bytes());
    let mut strings: Vec<u8> = Vec::new();
    for (key, value) in &pairs {
        let mut place = |text: &str| {
            let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let offset = 20 + pairs.len() * 12 + strings.len();
            strings.extend(&units);
            (u32::try_from(offset).expect("small"), u16::try_from(units.len()).expect("small"))
        };
        let (key, value) = (place(key), place(value));
        item.extend(key.0.to_le_bytes());
        item.extend(value.0.to_le_bytes());
        item.extend(key.1.to_le_bytes());
        item.extend(value.1.to_le_bytes());
    }
    item.extend(strings);
    for _ in 0..feed.byte() % 3 {
        let at = usize::try_from(feed.below(item.len() as u64)).expect("small");
        item[at] = feed.byte();
    }
    item
}

/// Damages of the locators, ids and sizes of all three.
pub(crate) fn chain(data: &[u8]) {
    let mut feed = Feed::new(data);
    let mut family = family();
    for _ in 0..8 {
        if feed.is_empty() {
            break;
        }
        let which = usize::from(feed.byte()) % 3;
        let image = &family[which].1;
        match feed.byte() % 5 {
            // The id of one for another: crafted cycles pass the linkage check.
            0 => {
                let other = usize::from(feed.byte()) % 3;
                let id = bytes_at(&family[other].1, HEADERS[1] + 32, 16);
                for header in HEADERS {
                    put(image, header + 32, &id);
                    seal(image, header, 4096);
                }
            }
            // The locator of one in another.
            1 => {
                let other = usize::from(feed.byte() % 2) + 1;
                let item = bytes_at(&family[other].1, LOCATOR, 600);
                let entry = bytes_at(&family[other].1, LOCATOR_ENTRY, 32);
                put(image, LOCATOR, &item);
                put(image, LOCATOR_ENTRY, &entry);
                put(image, 2 * MIB + 10, &6_u16.to_le_bytes());
                put(image, 2 * MIB + (64 << 10) + 4, &2_u32.to_le_bytes());
            }
            // Sizes and sector sizes that do not fit.
            2 => put(image, 2 * MIB + (64 << 10) + 8, &(feed.below(12) * MIB / 2).to_le_bytes()),
            3 => put(image, 2 * MIB + (64 << 10) + 16, &(512_u32 << (feed.byte() % 5)).to_le_bytes()),
            // One file in the place of another.
            _ => {
                let other = usize::from(feed.byte()) % 3;
                let copy = family[other].1.fork();
                family[which].1 = copy;
            }
        }
    }
    try_chain(&family, &format!("chain {data:02x?}"));
}
