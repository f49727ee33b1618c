//! Starting the command so that it attaches itself, and waiting for it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};

use rustix::fs::Access;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use super::error::RecordError;
use super::{SUPPORTED_TORCH, Settings, run_directory, signals};
use crate::ring::OnFull;

/// Torch loads its entry points unless this is set to something other than 1.
const AUTOLOAD: &str = "TORCH_DEVICE_BACKEND_AUTOLOAD";
const LIBRARY: &str = "liboptape_recorder.so";

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// What a shell makes of it: 128 and the signal's number after a signal.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => (code & 0xff) as u8,
            Self::Signal(signal) => (128 + (signal & 0x7f)) as u8,
        }
    }

    /// The code, and the signal: one of them.
    pub(super) fn parts(self) -> (Option<i32>, Option<i32>) {
        match self {
            Self::Code(code) => (Some(code), None),
            Self::Signal(signal) => (None, Some(signal)),
        }
    }

    fn of(status: ExitStatus) -> Self {
        status
            .code()
            .map_or_else(|| Self::Signal(status.signal().unwrap_or(0)), Self::Code)
    }
}

/// The file that a command's name means, as a shell finds it.
pub(super) fn find(program: &OsStr, path_variable: Option<&OsStr>) -> Result<PathBuf, RecordError> {
    let name = || program.to_string_lossy().into_owned();
    let candidates: Vec<PathBuf> = if program.as_encoded_bytes().contains(&b'/') {
        vec![PathBuf::from(program)]
    } else {
        let path = path_variable.unwrap_or(OsStr::new("/bin:/usr/bin"));
        std::env::split_paths(path)
            .map(|directory| directory.join(program))
            .collect()
    };
    let mut refused = None;
    for candidate in candidates {
        match check(&candidate) {
            Ok(()) if !program.is_empty() => return Ok(candidate),
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                refused.get_or_insert(error);
            }
            _ => {}
        }
    }
    Err(match refused {
        Some(source) if !program.is_empty() => RecordError::CommandNotExecutable {
            command: name(),
            source,
        },
        _ => RecordError::CommandNotFound { command: name() },
    })
}

fn check(candidate: &Path) -> io::Result<()> {
    if std::fs::metadata(candidate)?.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    Ok(rustix::fs::access(candidate, Access::EXEC_OK)?)
}

/// The library that the recorded process loads.
pub(super) fn capture_library() -> Result<PathBuf, RecordError> {
    if let Some(given) = std::env::var_os("OPTAPE_CAPTURE_LIB").filter(|v| !v.is_empty()) {
        let path = PathBuf::from(given);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(RecordError::CaptureLibraryMissing { looked: vec![path] })
        };
    }
    let executable = std::env::current_exe().map_err(|source| RecordError::System {
        what: "find the optape executable",
        source,
    })?;
    let beside = executable.parent().unwrap_or(Path::new("/"));
    let mut looked = vec![beside.join(LIBRARY), beside.join("deps").join(LIBRARY)];
    // Of a build folder, the newer one: cargo refreshes one of the two, depending on what was built.
    let newest = looked
        .iter()
        .filter_map(|path| Some((std::fs::metadata(path).ok()?.modified().ok()?, path)))
        .max();
    if let Some((_, path)) = newest {
        return Ok(path.clone());
    }
    let installed = beside.join("../lib/optape").join(LIBRARY);
    if installed.is_file() {
        return Ok(installed);
    }
    looked.push(installed);
    Err(RecordError::CaptureLibraryMissing { looked })
}

/// What the command's environment has beyond ours.
pub(super) fn environment(
    directory: &Path,
    library: &Path,
    settings: &Settings,
) -> BTreeMap<&'static str, OsString> {
    let mut attach = vec![run_directory::attach_path(directory)];
    if std::env::var_os(AUTOLOAD).is_some_and(|v| v != "1") {
        attach.push(run_directory::site_path(directory));
    }
    let mut variables = BTreeMap::from([
        (
            "PYTHONPATH",
            with_python_path(&attach, std::env::var_os("PYTHONPATH").as_deref()),
        ),
        ("OPTAPE_RUN", directory.into()),
        ("OPTAPE_CAPTURE_LIB", library.into()),
        (
            "OPTAPE_HOOK_SOURCE",
            run_directory::hook_source(directory).into(),
        ),
        ("OPTAPE_STATS", settings.statistics_name().into()),
        (
            "OPTAPE_ON_FULL",
            if settings.on_full == OnFull::Drop {
                "drop"
            } else {
                "wait"
            }
            .into(),
        ),
        ("OPTAPE_RING_BYTES", settings.ring_bytes.to_string().into()),
        ("OPTAPE_DETAIL", settings.detail.to_json().into()),
        ("OPTAPE_TORCH_VERSIONS", SUPPORTED_TORCH.join(",").into()),
    ]);
    if settings.force_torch {
        variables.insert("OPTAPE_FORCE_TORCH", "1".into());
    }
    if settings.eager {
        // Read by torch._dynamo.config when it is imported.
        variables.insert("TORCH_COMPILE_DISABLE", "1".into());
    }
    // These also where there is nothing to say: the environment that we were started in may be that of another recording.
    let schedule = settings.schedule.map(|schedule| schedule.to_string());
    variables.insert("OPTAPE_SCHEDULE", schedule.unwrap_or_default().into());
    variables.insert(
        "OPTAPE_FUNCTIONS",
        if settings.functions { "1" } else { "0" }.into(),
    );
    variables.insert(
        "OPTAPE_GPU_TIME",
        if settings.gpu_time { "1" } else { "0" }.into(),
    );
    variables
}

/// An empty entry would mean the working directory: there is none that was not there before.
fn with_python_path(first: &[PathBuf], before: Option<&OsStr>) -> OsString {
    let mut all = OsString::new();
    let before = before.filter(|b| !b.is_empty());
    for (i, part) in first
        .iter()
        .map(|p| p.as_os_str())
        .chain(before)
        .enumerate()
    {
        if i > 0 {
            all.push(":");
        }
        all.push(part);
    }
    all
}

/// Starts the command with our stdin, stdout, stderr and process group.
pub(super) fn start(
    command: &[OsString],
    found: &Path,
    variables: &BTreeMap<&'static str, OsString>,
) -> Result<Child, RecordError> {
    let (program, arguments) =
        command
            .split_first()
            .ok_or_else(|| RecordError::CommandNotFound {
                command: String::new(),
            })?;
    let name = || program.to_string_lossy().into_owned();
    let spawn = |command: &mut Command| {
        command.args(arguments).envs(variables);
        // SAFETY: system calls that are allowed after a fork, and atomics.
        unsafe { command.pre_exec(signals::ignore_as_before) };
        command.spawn()
    };
    let result = match spawn(&mut Command::new(program)) {
        // No `#!`: a shell takes it for a script of its own, and so do `env` and `timeout`.
        Err(error) if error.raw_os_error() == Some(libc::ENOEXEC) => {
            spawn(Command::new("/bin/sh").arg(found))
        }
        result => result,
    };
    result.map_err(|source| match source.kind() {
        // The file was found before, so its interpreter is missing.
        io::ErrorKind::NotFound if found.exists() => RecordError::CommandNotFound {
            command: format!("{} (its interpreter is missing)", name()),
        },
        io::ErrorKind::NotFound => RecordError::CommandNotFound { command: name() },
        _ => RecordError::CommandNotExecutable {
            command: name(),
            source,
        },
    })
}

/// Waits for the command, passing on signals meanwhile.
pub(super) fn wait(mut child: Child) -> Result<Exit, RecordError> {
    let failed = |source| RecordError::System {
        what: "wait for the command",
        source,
    };
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
    signals::command_started(child.id());
    let dead = loop {
        match waitid(
            WaitId::Pid(pid),
            WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result,
        }
    };
    signals::command_ended();
    dead.map_err(|e| failed(e.into()))?;
    child.wait().map(Exit::of).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_found_as_a_shell_finds_them() {
        let directory = tempfile::tempdir().unwrap();
        let plain = directory.path().join("plain");
        std::fs::write(&plain, "data").unwrap();
        let path =
            std::env::join_paths([directory.path(), Path::new("/usr/bin"), Path::new("/bin")])
                .unwrap();
        assert!(find(OsStr::new("sh"), Some(&path)).unwrap().ends_with("sh"));
        assert_eq!(
            find(OsStr::new("no-such-command"), Some(&path))
                .unwrap_err()
                .exit_code(),
            127
        );
        assert_eq!(
            find(OsStr::new(""), Some(&path)).unwrap_err().exit_code(),
            127
        );
        assert_eq!(
            find(OsStr::new("/no/such/command"), None)
                .unwrap_err()
                .exit_code(),
            127
        );
        assert_eq!(
            find(OsStr::new("plain"), Some(&path))
                .unwrap_err()
                .exit_code(),
            126
        );
        assert_eq!(find(plain.as_os_str(), None).unwrap_err().exit_code(), 126);
        assert_eq!(
            find(directory.path().as_os_str(), None)
                .unwrap_err()
                .exit_code(),
            126
        );
    }

    #[test]
    fn python_path_gets_no_empty_entry() {
        let first = [PathBuf::from("/run/attach")];
        assert_eq!(with_python_path(&first, None), "/run/attach");
        assert_eq!(
            with_python_path(&first, Some(OsStr::new(""))),
            "/run/attach"
        );
        assert_eq!(
            with_python_path(&first, Some(OsStr::new("/a:/b"))),
            "/run/attach:/a:/b"
        );
    }

    #[test]
    fn exit_codes_follow_the_shell() {
        assert_eq!(Exit::Code(3).code(), 3);
        assert_eq!(Exit::Signal(libc::SIGKILL).code(), 137);
        let status = Command::new("sh")
            .args(["-c", "kill -TERM $$"])
            .status()
            .unwrap();
        assert_eq!(Exit::of(status), Exit::Signal(libc::SIGTERM));
    }
}
