//! Traces of a simulated training program: written, cut, bent, followed, recovered.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "these are tests"
)]

mod corpus;
mod following;
mod format_example;
mod late_statistics;
mod program;
mod recovery;
mod refusals;
mod round_trip;
mod streams;
mod truncation;
