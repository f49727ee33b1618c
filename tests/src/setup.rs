//! Finds what the tests run.

use std::io::Write;
use std::path::{Path, PathBuf};

/// The programs that tests run.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The binary, with the capture library beside it.
    pub optape: PathBuf,
    /// A Python that has torch, spikingjelly and sinabs.
    pub python: PathBuf,
}

impl Setup {
    /// What is there; `None`, and a loud line, where a bare `cargo test` finds nothing.
    ///
    /// # Panics
    /// Where the environment names a file that is not there.
    #[must_use]
    pub fn find() -> Option<Self> {
        let target = workspace().join("target");
        let optape = named_or("OPTAPE_BIN", &target.join("release/optape"))?;
        let python = named_or("OPTAPE_PYTHON", &target.join("python/bin/python"))?;
        Some(Self { optape, python })
    }
}

/// The root of the workspace.
#[must_use]
pub fn workspace() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// The directory of the parity corpus; `None`, and a loud line, where it is not.
///
/// # Panics
/// Where the environment names a directory that is not there.
#[must_use]
pub fn parity_corpus() -> Option<PathBuf> {
    named_or("OPTAPE_PARITY", &workspace().join("../shared/parity"))
}

fn named_or(variable: &str, usual: &Path) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable).filter(|v| !v.is_empty()) {
        // Relative to where the variable was set: the root, not the package that cargo runs tests in.
        let path = workspace().join(path);
        assert!(
            path.exists(),
            "{variable} names {}, which is not there",
            path.display()
        );
        return Some(path);
    }
    if usual.exists() {
        return Some(usual.to_owned());
    }
    // Not through `eprintln!`, which the test harness swallows.
    let thread = std::thread::current();
    let _ = writeln!(
        std::io::stderr(),
        "\nNOT RUN: {}: no {}; `cargo xtask test` makes it, or name one in {variable}\n",
        thread.name().unwrap_or("a test"),
        usual.display()
    );
    None
}
