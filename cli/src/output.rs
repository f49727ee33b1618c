//! Where a subcommand's data goes: stdout, or a file that is never overwritten by accident.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueHint};

use crate::exit::Failure;

/// Flags of every subcommand that writes data.
#[derive(Clone, Debug, Default, Args)]
pub struct OutputOptions {
    /// Write to FILE instead of stdout
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,
    /// Overwrite FILE if it exists
    #[arg(short, long, requires = "output")]
    pub force: bool,
}

impl OutputOptions {
    /// Hands a writer to `write` and sees to it that all of it arrives.
    ///
    /// # Errors
    /// Where FILE exists and `--force` is not given, or the data cannot be written.
    pub fn write_with(
        &self,
        write: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        match &self.output {
            Some(path) => {
                let mut out = BufWriter::new(create(path, self.force)?);
                write(&mut out)?;
                out.flush()
                    .with_context(|| format!("cannot write {}", path.display()))
            }
            None => {
                let mut out = BufWriter::new(io::stdout().lock());
                write(&mut out)?;
                Ok(out.flush()?)
            }
        }
    }
}

impl OutputOptions {
    /// Writes what is ready.
    ///
    /// # Errors
    /// As [`Self::write_with`].
    pub fn write_all(&self, data: &[u8]) -> anyhow::Result<()> {
        self.write_with(|out| Ok(out.write_all(data)?))
    }
}

/// Creates a file; refuses one that exists unless `force`.
///
/// # Errors
/// A usage error where the file exists, else what the system says.
pub fn create(path: &Path, force: bool) -> anyhow::Result<File> {
    let mut open = OpenOptions::new();
    open.write(true);
    if force {
        open.create(true).truncate(true);
    } else {
        open.create_new(true);
    }
    match open.open(path) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Failure::usage(format!(
            "{} exists; choose another name with --output, or overwrite it with --force",
            path.display()
        ))
        .into()),
        Err(error) => Err(error).with_context(|| format!("cannot create {}", path.display())),
    }
}
