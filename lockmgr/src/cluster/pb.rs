//! Messages generated from `proto/cluster.proto`, which documents them.
#![expect(unreachable_pub, clippy::enum_variant_names, clippy::large_enum_variant, reason = "generated code")]

include!(concat!(env!("OUT_DIR"), "/cluster.rs"));
