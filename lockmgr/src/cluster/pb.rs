//! Messages generated from `proto/cluster.proto`, which documents them.
#![expect(unreachable_pub, clippy::enum_variant_names, reason = "generated code")]

include!(concat!(env!("OUT_DIR"), "/cluster.rs"));
