//! The coordinator from outside: requests in, replies and pushes out, and what is on the LUN afterwards.

mod names;
mod world;
