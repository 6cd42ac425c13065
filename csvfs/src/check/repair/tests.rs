//! Each table is damaged in turn: the check names it, the repair mends it, the check is clean, and files that were not
//! concerned have their content.

use std::sync::Arc;
use std::sync::mpsc;

use blockio::{BlockDevice, IoBuf, MemoryDevice};
use lockmgr::{ClientId, ClusterId, Epoch, NodeId, Term, VolumeId};

use crate::extents::{Extent, State};
use crate::local::{LocalLink, LocalPushes};
use crate::meta::{Dirent, Store, TableId, Tables};
use crate::node::{Creation, File, Node, NodeParams};
use crate::proto::{FileKind, Repaired};
use crate::refcounts::SharedRun;
use crate::{Coordinator, CreateParams, OpenParams, ROOT_INO, Superblock, Volume};

const PLAIN: Creation = Creation { mode: 0o644, umask: 0, uid: 1, gid: 1 };
const BLOCK: usize = 4096;

struct Lun {
    device: Arc<dyn BlockDevice>,
    volume: VolumeId,
    term: u64,
}

/// A coordinator and a node on it.
struct Served {
    coordinator: Arc<Coordinator>,
    node: Arc<Node>,
}

impl Served {
    fn end(self) {
        self.node.detach().expect("an orderly leave");
        drop(self.node);
        self.coordinator.close().expect("an orderly end");
    }

    fn problems(&self) -> Vec<String> {
        let report = self.node.check().expect("a check");
        report.problems.into_iter().map(|problem| problem.what).collect()
    }

    fn repair(&self) -> Vec<Repaired> {
        let found = self.node.check().expect("a check");
        self.node.repair(&found).expect("a repair")
    }
}

impl Lun {
    /// Two files of some blocks, a directory with a file in it, a clone.
    fn new() -> Self {
        let device: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(128 << 20));
        let cluster = ClusterId(uuid::Uuid::from_u128(7));
        let params = CreateParams { name: "vol".into(), cluster, force: false };
        let volume = Volume::create(device.clone(), params).expect("an empty LUN").volume;
        let mut lun = Self { device, volume, term: 0 };
        let served = lun.serve();
        for (name, byte) in [("a", 1), ("b", 2)] {
            let file = served.node.create(ROOT_INO, name.as_bytes(), &PLAIN, true).expect("a file").1;
            write(&file, &[byte; 16 * BLOCK]);
        }
        let folder = served.node.mkdir(ROOT_INO, b"dir", &PLAIN).expect("a directory").ino;
        let inner = served.node.create(folder, b"inner", &PLAIN, true).expect("a file").1;
        write(&inner, &[3; 4 * BLOCK]);
        served.node.clone_file(&inner, ROOT_INO, b"clone", &PLAIN).expect("a clone");
        drop(inner);
        served.end();
        lun
    }

    fn serve(&mut self) -> Served {
        self.term += 1;
        let (link, pushes) = (Arc::new(LocalLink::default()), LocalPushes::new());
        let who = (NodeId(1), Epoch(1), Term(self.term));
        let params = OpenParams::new(self.device.clone(), self.volume, who, pushes.clone());
        let coordinator = Coordinator::open(params).expect("it opens");
        link.set(Some(coordinator.clone()));
        let client = ClientId { node: NodeId(1), epoch: Epoch(1), serial: self.term };
        let params = NodeParams {
            device: self.device.clone(),
            link,
            client,
            volume: self.volume,
            term: Term(self.term),
            name: "test".into(),
        };
        let node = Node::attach(params).expect("it attaches");
        pushes.add(client, &node);
        Served { coordinator, node }
    }

    /// Changes the tables behind everybody's back.
    fn damage(&self, change: impl FnOnce(&mut Tables<'_>)) {
        let block = Superblock::read(self.device.as_ref()).expect("a superblock");
        let mut store =
            Store::open(self.device.clone(), self.volume, block.lun_bytes, Term(self.term)).expect("a store");
        let transaction = store.begin().expect("a transaction");
        let mut tables = transaction.tables().expect("tables");
        change(&mut tables);
        let changes = tables.into_changes();
        store.commit(transaction, &changes).expect("a commit");
        store.close().expect("an orderly end");
    }
}

fn write(file: &File, bytes: &[u8]) {
    let buf = IoBuf::zeroed(bytes.len());
    buf.copy_from(bytes);
    let (tell, told) = mpsc::channel();
    file.write(0, buf, move |outcome| drop(tell.send(outcome)));
    told.recv().expect("an answer").expect("a write");
}

fn read(node: &Arc<Node>, path: &str) -> Vec<u8> {
    let file = node.open(node.resolve(path).expect("it is there").ino).expect("it opens");
    let buf = IoBuf::zeroed(1 << 20);
    let (tell, told) = mpsc::channel();
    file.read(0, buf.clone(), move |outcome| drop(tell.send(outcome)));
    let got = told.recv().expect("an answer").expect("a read");
    buf.slice(0..got).to_vec()
}

fn ino_of(tables: &Tables<'_>, name: &str) -> u64 {
    tables.dirent(ROOT_INO, name.as_bytes()).expect("readable").expect("there").ino
}

fn first_extent(tables: &Tables<'_>, name: &str) -> (u64, Extent) {
    let ino = ino_of(tables, name);
    (ino, tables.extents(ino, 0, u64::MAX, 1).expect("readable")[0])
}

/// Damages, and expects of check and repair to name it in these words. Gives the repaired volume.
fn check(problem: &str, action: &str, change: impl FnOnce(&mut Tables<'_>)) -> Served {
    let mut lun = Lun::new();
    lun.damage(change);
    let served = lun.serve();
    let found = served.problems();
    assert!(found.iter().any(|what| what.contains(problem)), "'{problem}' is not in {found:#?}");
    let actions = served.repair();
    assert!(
        actions.iter().any(|did| did.done && did.what.contains(action)),
        "'{action}' is not in {actions:#?}"
    );
    let left: Vec<_> = actions.iter().filter(|did| !did.done).collect();
    assert!(left.is_empty(), "{left:#?}");
    assert_eq!(served.problems(), Vec::<String>::new(), "after {actions:#?}");
    assert_eq!(served.repair(), Vec::new(), "a second repair has nothing to do");
    served
}

#[test]
fn a_volume_without_damage_is_left_alone() {
    let mut lun = Lun::new();
    let served = lun.serve();
    assert_eq!(served.repair(), Vec::new());
    served.end();
}

#[test]
fn blocks_without_an_owner_are_free_again() {
    let served = check("have no owner", "blocks without an owner are free again", |tables| {
        let (start, blocks) = *tables.free().expect("readable").last().expect("free space");
        tables.put_free(start, blocks - 100).expect("a write");
    });
    assert_eq!(read(&served.node, "/a"), vec![1; 16 * BLOCK]);
    served.end();
}

#[test]
fn wrong_counts_are_corrected() {
    let served = check("blocks are counted", "16 blocks are counted", |tables| {
        let ino = ino_of(tables, "a");
        let mut inode = tables.inode(ino).expect("readable").expect("there");
        (inode.blocks, inode.nlink) = (3, 7);
        tables.put_inode(ino, &inode).expect("a write");
    });
    assert_eq!(served.node.resolve("/a").expect("there").nlink, 1);
    served.end();
}

#[test]
fn counts_of_references_are_counted_anew() {
    let served = check("references", "counts of references were corrected", |tables| {
        let (_, extent) = first_extent(tables, "clone");
        let old = tables.shared_runs(&(extent.lun..extent.lun + 1), 1).expect("readable");
        tables.replace_shared_runs(&old, &[SharedRun { count: 9, ..old[0] }]).expect("a write");
    });
    assert_eq!(read(&served.node, "/clone"), vec![3; 4 * BLOCK]);
    served.end();
}

#[test]
fn an_inode_without_a_name_is_in_lost_found() {
    let served = check("names are counted", "/lost+found/inode-", |tables| {
        let dirent = tables.dirent(ROOT_INO, b"b").expect("readable").expect("there");
        tables.remove_dirent(ROOT_INO, b"b", dirent.cookie).expect("a write");
    });
    let folder = served.node.resolve("/lost+found").expect("there").ino;
    let page = served.node.readdir(folder, 0, 10).expect("a listing");
    let name = String::from_utf8(page.entries[0].name.clone()).expect("ASCII");
    assert_eq!(read(&served.node, &format!("/lost+found/{name}")), vec![2; 16 * BLOCK]);
    served.end();
}

// What a repair puts into the root is seen by who knew all names there.
#[test]
fn the_folder_of_found_files_is_seen_by_who_had_listed_the_root() {
    let mut lun = Lun::new();
    lun.damage(|tables| {
        // Nothing is wrong with the root itself.
        let folder = ino_of(tables, "dir");
        let dirent = tables.dirent(folder, b"inner").expect("readable").expect("there");
        tables.remove_dirent(folder, b"inner", dirent.cookie).expect("a write");
    });
    let served = lun.serve();
    assert!(served.node.readdir(ROOT_INO, 0, 100).expect("a listing").end);
    assert!(served.node.lookup(ROOT_INO, b"lost+found").is_err());
    served.repair();
    assert!(served.node.lookup(ROOT_INO, b"lost+found").is_ok());
    let page = served.node.readdir(ROOT_INO, 0, 100).expect("a listing");
    assert!(page.entries.iter().any(|entry| entry.name == b"lost+found"));
    served.end();
}

#[test]
fn an_entry_to_nothing_is_set_aside() {
    let served = check("names a missing inode", "was set aside", |tables| {
        let kind = FileKind::Regular;
        tables.put_dirent(ROOT_INO, b"ghost", Dirent { ino: 4000, cookie: 90, kind }).expect("a write");
    });
    assert!(served.node.resolve("/ghost").is_err());
    assert!(served.node.check().expect("a check").quarantined >= 1);
    served.end();
}

#[test]
fn an_inode_that_cannot_be_read_is_made_anew_for_its_blocks() {
    let served = check("a row of inodes cannot be read", "was made anew", |tables| {
        let ino = ino_of(tables, "a");
        tables.put_raw(TableId::Inodes, &ino.to_be_bytes(), &[0xFF; 9]).expect("a write");
    });
    assert_eq!(read(&served.node, "/a"), vec![1; 16 * BLOCK]);
    served.end();
}

#[test]
fn a_directory_that_cannot_be_read_keeps_what_is_in_it() {
    let served = check("a row of inodes cannot be read", "made anew", |tables| {
        let ino = ino_of(tables, "dir");
        tables.put_raw(TableId::Inodes, &ino.to_be_bytes(), &[0xFF; 9]).expect("a write");
    });
    assert_eq!(read(&served.node, "/dir/inner"), vec![3; 4 * BLOCK]);
    served.end();
}

#[test]
fn an_entry_that_cannot_be_read_comes_back_from_the_order_of_its_directory() {
    let served = check("a row of dirents cannot be read", "rebuilt from the order", |tables| {
        let key = [&ROOT_INO.to_be_bytes()[..], b"b"].concat();
        tables.put_raw(TableId::Dirents, &key, &[1]).expect("a write");
    });
    assert_eq!(read(&served.node, "/b"), vec![2; 16 * BLOCK]);
    served.end();
}

#[test]
fn a_place_that_cannot_be_read_comes_back_from_its_entry() {
    let served = check("a row of cookies cannot be read", "its place", |tables| {
        let cookie = tables.dirent(ROOT_INO, b"b").expect("readable").expect("there").cookie;
        let key = [ROOT_INO.to_be_bytes(), cookie.to_be_bytes()].concat();
        tables.put_raw(TableId::Cookies, &key, &[]).expect("a write");
    });
    assert_eq!(read(&served.node, "/b"), vec![2; 16 * BLOCK]);
    served.end();
}

// Nothing is dropped silently: what the lost extent had is a file.
#[test]
fn blocks_of_an_extent_that_cannot_be_read_are_a_file_in_lost_found() {
    let served = check("a row of extents cannot be read", "blocks whose owner is not known", |tables| {
        let (ino, extent) = first_extent(tables, "a");
        let key = [ino.to_be_bytes(), extent.file.to_be_bytes()].concat();
        tables.put_raw(TableId::Extents, &key, &[9; 17]).expect("a write");
    });
    let folder = served.node.resolve("/lost+found").expect("there").ino;
    let page = served.node.readdir(folder, 0, 10).expect("a listing");
    let name = String::from_utf8(page.entries[0].name.clone()).expect("ASCII");
    assert_eq!(read(&served.node, &format!("/lost+found/{name}")), vec![1; 16 * BLOCK]);
    served.end();
}

#[test]
fn blocks_that_two_files_claim_are_shared_by_both() {
    let served = check("belongs to", "are shared with other files now", |tables| {
        let (_, theirs) = first_extent(tables, "a");
        let (ino, mine) = first_extent(tables, "b");
        let half = Extent { blocks: 8, lun: theirs.lun + 4, ..mine };
        tables.replace_extents(ino, &[mine], &[half]).expect("a write");
    });
    let mut expected = vec![1; 8 * BLOCK];
    expected.resize(16 * BLOCK, 0);
    assert_eq!(read(&served.node, "/b"), expected);
    // Neither harms the other any more.
    let file = served.node.open(served.node.resolve("/b").expect("there").ino).expect("it opens");
    write(&file, &[7; 8 * BLOCK]);
    drop(file);
    assert_eq!(read(&served.node, "/a"), vec![1; 16 * BLOCK]);
    assert_eq!(served.problems(), Vec::<String>::new());
    served.end();
}

#[test]
fn an_extent_in_the_metadata_store_reads_zeros() {
    let served = check("belongs to", "lay in the metadata store", |tables| {
        let (ino, mine) = first_extent(tables, "b");
        let chunk = tables.chunks().expect("readable")[0].0;
        tables.replace_extents(ino, &[mine], &[Extent { lun: chunk, ..mine }]).expect("a write");
    });
    assert_eq!(read(&served.node, "/b"), vec![0; 16 * BLOCK]);
    served.end();
}

#[test]
fn an_extent_beyond_the_volume_is_set_aside() {
    let served = check("outside the data area", "cannot be and was set aside", |tables| {
        let (ino, mine) = first_extent(tables, "b");
        tables.replace_extents(ino, &[mine], &[Extent { lun: 1 << 40, ..mine }]).expect("a write");
    });
    assert_eq!(read(&served.node, "/b"), vec![0; 16 * BLOCK]);
    served.end();
}

#[test]
fn fresh_blocks_that_others_have_become_holes() {
    let served = check("belongs to", "are holes now", |tables| {
        let (_, theirs) = first_extent(tables, "a");
        let ino = ino_of(tables, "b");
        let more = Extent { file: 100, blocks: 4, lun: theirs.lun, state: State::Fresh };
        tables.replace_extents(ino, &[], &[more]).expect("a write");
    });
    assert_eq!(read(&served.node, "/a"), vec![1; 16 * BLOCK]);
    served.end();
}

#[test]
fn a_directory_that_lies_in_itself_is_taken_out() {
    let served = check("does not lead to the root", "lies in itself", |tables| {
        let ino = ino_of(tables, "dir");
        let dirent = tables.dirent(ROOT_INO, b"dir").expect("readable").expect("there");
        tables.remove_dirent(ROOT_INO, b"dir", dirent.cookie).expect("a write");
        let mut inode = tables.inode(ino).expect("readable").expect("there");
        let kind = FileKind::Directory;
        tables.put_dirent(ino, b"self", Dirent { ino, cookie: inode.next_cookie, kind }).expect("a write");
        inode.next_cookie += 1;
        inode.parent = ino;
        tables.put_inode(ino, &inode).expect("a write");
    });
    served.end();
}

#[test]
fn other_damage_is_named_and_mended() {
    type Damage = fn(&mut Tables<'_>);
    let cases: [(&str, &str, Damage); 5] = [
        ("a row of orphans cannot be read", "set aside", |t| {
            t.put_raw(TableId::Orphans, &[1, 2], &[]).expect("a write");
        }),
        ("attribute of an inode", "attribute", |t| t.put_xattr(5000, b"user.x", b"1").expect("a write")),
        ("a row of replies cannot be read", "set aside", |t| {
            t.put_raw(TableId::Replies, &[0; 26], &[0xFF; 4]).expect("a write");
        }),
        ("a row of refcounts cannot be read", "set aside", |t| {
            t.put_raw(TableId::Refcounts, &7_u64.to_be_bytes(), &[0; 16]).expect("a write");
        }),
        ("the next inode number", "the next number is", |t| {
            let globals = t.globals().expect("readable");
            t.put_globals(crate::meta::Globals { next_ino: 2, ..globals }).expect("a write");
        }),
    ];
    for (problem, action, change) in cases {
        check(problem, action, change).end();
    }
}
