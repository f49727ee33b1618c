//! optape.

fn main() {}
