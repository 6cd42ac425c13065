//! The NBD client and server against each other, against hostile peers, and against those of other projects.

mod foreign;
mod hostile;
mod loss;
mod pair;
mod support;
