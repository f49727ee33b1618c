//! Records programs that train with tch.
//!
//! The hook is built against the libtorch that tch links, and records what this process runs in it.
