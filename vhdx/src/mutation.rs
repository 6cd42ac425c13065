//! Steps of the write protocol that a test can leave out, to prove that the crash suite would see it.
//!
//! Only with the feature `mutations` a [`crate::Builder`] takes one; without it every step is always done.
//!
//! **Invariant:** each is asked for at exactly one place of the protocol.

/// A step that is left out, or done in the wrong order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// The guest's flush is acknowledged without one of the file.
    AcknowledgeUnflushed,
    /// A forced write trusts that the place of its block is known after a crash.
    TrustMapping,
    /// The header names a log whose first entry is not durable.
    HeaderBeforeLog,
    /// The next generation begins in the half of the ring that is live.
    SameHalf,
    /// The first of two entries of one flush is left to the generation that ends between them.
    SplitFlush,
    /// Sectors of a child count before they are durable.
    SkipBarrier,
    /// Both headers are written at once.
    HeadersTogether,
    /// The header names the one log entry of a change before that entry is durable.
    NameBeforeEntry,
    /// The end of a change is announced before its pages are in place.
    UnflushedChange,
    /// A table that moved is named by the first region table alone.
    OneRegionTable,
    /// A block counts at its new place before its bytes are durable there.
    UnflushedMove,
    /// A parent takes its child up before the child knows the new name of it.
    UnannouncedMerge,
    /// A session goes on with what a crash left at the end of the file.
    TrustTail,
    /// Space is free for others before the log has dropped it.
    ReuseEarly,
    /// Space of others is handed out as it is.
    KeepLeftovers,
    /// Zeroed space is handed out before the zeros are durable.
    UnflushedZeros,
    /// The end of a replay is announced before its pages are durable.
    UnflushedReplay,
    /// The end of the session is announced before its pages are durable.
    UnflushedClose,
}
