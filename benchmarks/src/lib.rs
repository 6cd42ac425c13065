//! Canonical workloads beside the raw device in one run.
