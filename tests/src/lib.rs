//! Helpers of the integration tests: where the built binary, a Python with torch and the parity corpus are, and how to
//! run programs under `optape record` and without it.
//!
//! `cargo xtask test` makes everything ready and names it in the environment (`OPTAPE_BIN`, `OPTAPE_PYTHON`,
//! `OPTAPE_PARITY`); then a missing piece fails the tests. Under a bare `cargo test` the same things are looked for in
//! `target/`, and where they are not, the tests say loudly that they did not run.

mod bench;
mod calls;
pub mod conformance;
mod setup;

pub use bench::{Bench, Done, Running};
pub use calls::{Call, calls_of, ops_of, stages_of};
pub use setup::{Setup, parity_corpus, workspace};
