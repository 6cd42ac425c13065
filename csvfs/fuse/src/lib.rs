//! The FUSE mount of a cluster volume.
