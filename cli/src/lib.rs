//! The optape command line.
