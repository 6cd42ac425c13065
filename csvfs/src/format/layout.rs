//! Where things are on the LUN, in bytes.

/// Unit of allocation. Every extent starts and ends at a multiple of it.
pub const BLOCK_BYTES: u64 = 4096;
/// Superblock A and B. Far apart, so that one stray write does not take both.
pub const SUPERBLOCK_OFFSETS: [u64; 2] = [0, MIB];
/// Owner block A and B.
pub const OWNER_OFFSETS: [u64; 2] = [2 * MIB, 2 * MIB + BLOCK_BYTES];
/// Heartbeat slots, one block for each node.
pub const HEARTBEAT_OFFSET: u64 = 3 * MIB;
/// Size of the heartbeat area.
pub const HEARTBEAT_BYTES: u64 = MIB;
/// Blocks that hold nothing: `cluster validate` writes here, a block for each node and one more.
pub const TRIAL_OFFSET: u64 = HEARTBEAT_OFFSET + MIB / 2;
/// Intent logs, one ring for each node.
pub const INTENT_OFFSET: u64 = 4 * MIB;
/// Size of one ring.
pub const INTENT_RING_BYTES: u64 = 256 * 1024;
/// Number of rings, and of heartbeat slots.
pub const NODE_SLOTS: u64 = lockmgr::NODES_MAX as u64;
/// Metadata slot A and B: length and chunk table of the metadata store.
pub const META_SLOT_OFFSETS: [u64; 2] = [20 * MIB, 20 * MIB + META_SLOT_BYTES as u64];
/// Size of a metadata slot.
pub const META_SLOT_BYTES: usize = 16 * 1024;
/// Journal of the metadata store: changes that are not yet in its pages.
pub const JOURNAL_OFFSET: u64 = 20 * MIB + 64 * 1024;
/// Size of the journal.
pub const JOURNAL_BYTES: u64 = FIRST_CHUNK_OFFSET - JOURNAL_OFFSET;
/// First metadata chunk.
pub const FIRST_CHUNK_OFFSET: u64 = 21 * MIB;
/// Size of the first metadata chunk.
pub const FIRST_CHUNK_BYTES: u64 = 8 * MIB;
/// A LUN must have at least this many bytes to become a volume.
pub const LUN_BYTES_MIN: u64 = 64 * MIB;

const MIB: u64 = 1 << 20;

const _: () = assert!(INTENT_OFFSET + NODE_SLOTS * INTENT_RING_BYTES == META_SLOT_OFFSETS[0]);
const _: () = assert!(HEARTBEAT_OFFSET + NODE_SLOTS * BLOCK_BYTES <= TRIAL_OFFSET);
const _: () = assert!(TRIAL_OFFSET + (NODE_SLOTS + 1) * BLOCK_BYTES <= HEARTBEAT_OFFSET + HEARTBEAT_BYTES);
const _: () = assert!(META_SLOT_OFFSETS[1] + META_SLOT_BYTES as u64 <= JOURNAL_OFFSET);
const _: () =
    assert!(JOURNAL_OFFSET.is_multiple_of(BLOCK_BYTES) && JOURNAL_BYTES.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(FIRST_CHUNK_OFFSET + FIRST_CHUNK_BYTES < LUN_BYTES_MIN);
