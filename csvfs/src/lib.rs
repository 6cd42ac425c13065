//! The cluster filesystem: on-LUN format, metadata store, coordinator and node library.
