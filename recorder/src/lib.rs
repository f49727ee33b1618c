//! Everything of optape that records and needs no libtorch to build.

pub mod statistics;
