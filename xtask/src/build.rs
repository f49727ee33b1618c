//! The release build that tasks run.

use std::path::PathBuf;
use std::process::Command;

use anyhow::bail;

use crate::process;
use crate::workspace::Workspace;

/// Builds the binary and the recorder's library, and returns the binary. `OPTAPE_BIN` names one that is built already.
pub(crate) fn release(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    if let Some(binary) = std::env::var_os("OPTAPE_BIN") {
        return Ok(std::path::absolute(binary)?);
    }
    let mut cargo = workspace.cargo();
    process::run(cargo.args([
        "build",
        "--release",
        "--package",
        "optape",
        "--package",
        "optape-recorder",
    ]))?;
    Ok(workspace.target.join("release/optape"))
}

/// The hook is compiled for the torch that is loaded, so a C++ compiler is needed wherever something is recorded.
pub(crate) fn check_compiler() -> anyhow::Result<()> {
    let chosen = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let tried = [chosen.as_str(), "g++", "clang++"];
    if !tried
        .iter()
        .any(|compiler| process::succeeds(Command::new(compiler).arg("--version")))
    {
        bail!(
            "no C++ compiler ({}): install g++ (Debian, Ubuntu: apt install g++), or name one by CXX",
            tried.join(", ")
        );
    }
    Ok(())
}

impl Workspace {
    /// Cargo, in the repository's root.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = Command::new(&self.cargo);
        command.current_dir(&self.root);
        command
    }
}
