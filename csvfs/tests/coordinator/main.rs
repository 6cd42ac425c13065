//! The coordinator from outside: requests in, replies and pushes out, and what is on the LUN afterwards.

mod clones;
mod crash;
mod failures;
mod grants;
mod group;
mod names;
mod sessions;
mod space;
mod volume;
mod world;
