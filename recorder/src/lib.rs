//! Everything of optape that records and needs no libtorch to build: capture with its statistics kernels, the ring that
//! carries records out of the recorded process, and the daemon that writes them to disk.
//!
//! The crate is two things: a Rust library, which the `optape` binary and `optape-torch` link, and a C library
//! (`liboptape_recorder.so`), which the attach glue loads into a Python process beside the hook.

pub mod abi;
pub mod capture;
pub mod clock;
pub mod daemon;
pub mod device;
pub mod monitor;
pub mod ring;
pub mod statistics;

pub use optape_trace as trace;
