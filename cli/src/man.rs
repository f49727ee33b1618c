//! `optape man DIRECTORY`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, CommandFactory};

use crate::options::GlobalOptions;
use crate::output;

/// Options of `optape man`.
#[derive(Debug, Args)]
pub struct Options {
    /// Where the pages go; made if it is not there
    #[arg(value_name = "DIRECTORY")]
    pub directory: PathBuf,
    /// Overwrite pages that exist
    #[arg(short, long)]
    pub force: bool,
}

/// Writes `optape.1`, `optape-replay.1` and so on.
///
/// # Errors
/// Where a page exists already and `--force` is not given, or cannot be written.
pub fn run(options: &Options, _global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    use std::io::Write;

    std::fs::create_dir_all(&options.directory)
        .with_context(|| format!("cannot make {}", options.directory.display()))?;
    let mut root = crate::options::Options::command();
    root.build();
    let mut pages = vec![root.clone()];
    pages.extend(
        root.get_subcommands()
            .filter(|c| c.get_name() != "help")
            .cloned(),
    );
    for command in pages {
        // `build` gives subcommands the display name `optape-replay`.
        let name = command
            .get_display_name()
            .unwrap_or_else(|| command.get_name())
            .to_owned();
        let mut page = Vec::new();
        clap_mangen::Man::new(command.name(name.clone().leak() as &'static str))
            .render(&mut page)?;
        let path = options.directory.join(format!("{name}.1"));
        output::create(&path, options.force)?
            .write_all(&page)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}
