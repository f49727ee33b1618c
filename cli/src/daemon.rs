//! `optape daemon`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueHint};
use optape_recorder::daemon;

use crate::exit::Failure;
use crate::options::GlobalOptions;

/// Options of `optape daemon`.
#[derive(Debug, Args)]
#[command(
    after_help = "`optape record --daemon -- CMD` has a command recorded by it. It ends with SIGTERM, SIGINT or `optape ctl stop \
    --daemon`, and completes the files of its runs then. A systemd user unit: docs/optape-daemon.service."
)]
pub struct Options {
    /// Listen here [default: daemon.sock in $XDG_RUNTIME_DIR/optape, or in optape-daemon-UID in the directory for temporary files]
    #[arg(long, value_name = "PATH", env = "OPTAPE_SOCKET", value_hint = ValueHint::AnyPath)]
    pub socket: Option<PathBuf>,
}

/// Serves until it is told to end.
///
/// # Errors
/// Where the socket cannot be had.
pub fn run(options: &Options, global: &GlobalOptions) -> anyhow::Result<ExitCode> {
    let path = options.socket.clone().unwrap_or_else(daemon::socket_path);
    let quiet = global.quiet;
    let ready = |path: &Path| {
        if !quiet {
            say(&format!("listening at {}", path.display()));
        }
    };
    daemon::serve(&path, ready, say).map_err(|error| Failure {
        code: 125,
        message: error.to_string(),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn say(text: &str) {
    // Nobody may be listening any more.
    let _ = writeln!(std::io::stderr(), "optape: {text}");
}
