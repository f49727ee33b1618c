//! Where things are.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// The repository, and where its builds go.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// The repository's root.
    pub(crate) root: PathBuf,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
    /// The cargo that runs this task.
    pub(crate) cargo: OsString,
}

impl Workspace {
    /// From what cargo says in the environment, else from where this binary was compiled.
    pub(crate) fn locate() -> anyhow::Result<Self> {
        let manifest =
            env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&manifest)
            .parent()
            .context("xtask has no directory above it")?
            .to_owned();
        if !root.join("requirements.txt").is_file() {
            bail!(
                "{} is not the optape repository; run `cargo xtask` inside it",
                root.display()
            );
        }
        let target = match env::var_os("CARGO_TARGET_DIR") {
            Some(directory) => env::current_dir()?.join(directory),
            None => root.join("target"),
        };
        Ok(Self {
            root,
            target,
            cargo: env::var_os("CARGO").unwrap_or_else(|| "cargo".into()),
        })
    }

    /// A directory for the outputs of a task, made if it is not there.
    pub(crate) fn output(&self, task: &str) -> anyhow::Result<PathBuf> {
        let directory = self.root.join("target").join(task);
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(directory)
    }

    /// The corpus of expected numbers: `$OPTAPE_PARITY`, else `../shared/parity` beside the repository.
    pub(crate) fn parity(&self) -> Option<PathBuf> {
        let directory = match env::var_os("OPTAPE_PARITY") {
            Some(directory) => PathBuf::from(directory),
            None => self.root.join("../shared/parity"),
        };
        directory
            .join("cases")
            .is_dir()
            .then(|| directory.canonicalize().unwrap_or(directory))
    }
}
