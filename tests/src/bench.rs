//! A place to run programs in.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

use crate::{Setup, workspace};

/// Longer than any program of the tests takes on a busy machine: who needs more hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// A directory of a test's own, and commands that run in it with a known environment.
#[derive(Debug)]
pub struct Bench {
    setup: Setup,
    directory: tempfile::TempDir,
}

impl Bench {
    /// An empty one; `None` where there is nothing to run (see [`Setup::find`]).
    ///
    /// # Panics
    /// Where no directory can be made.
    #[must_use]
    pub fn new() -> Option<Self> {
        let setup = Setup::find()?;
        let directory = tempfile::tempdir().expect("a temporary directory");
        Some(Self { setup, directory })
    }

    /// A file in the directory.
    #[must_use]
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes a file in the directory.
    ///
    /// # Panics
    /// Where it cannot be written.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        path
    }

    /// One of the programs under `tests/programs`.
    ///
    /// # Panics
    /// Where there is none of the name.
    #[must_use]
    pub fn program(name: &str) -> PathBuf {
        let path = workspace().join("tests/programs").join(name);
        assert!(path.is_file(), "no {}", path.display());
        path
    }

    /// A command whose environment has nothing of optape's in it, and the tests' Python first on its path.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("OPTAPE_")
                || text.starts_with("PYTHON")
                || text == "TORCH_DEVICE_BACKEND_AUTOLOAD"
            {
                command.env_remove(name);
            }
        }
        let mut path = vec![
            self.setup
                .python
                .parent()
                .unwrap_or(Path::new("/"))
                .to_owned(),
        ];
        path.extend(std::env::split_paths(
            &std::env::var_os("PATH").unwrap_or_default(),
        ));
        if let Ok(path) = std::env::join_paths(path) {
            command.env("PATH", path);
        }
        // Compiled programs of torch.compile and byte code stay where the test can throw them away.
        command
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("XDG_CONFIG_HOME", self.path("no-configuration"))
            // Monitors have tests of their own, which take this away.
            .env("OPTAPE_MONITOR", "none")
            .current_dir(self.directory.path())
            .stdin(Stdio::null());
        command
    }

    /// The tests' Python.
    pub fn python<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.command(&self.setup.python);
        command.args(arguments);
        command
    }

    /// The binary.
    pub fn optape<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.command(&self.setup.optape);
        command.args(arguments);
        command
    }

    /// `optape -q record -o TRACE -- COMMAND`: silent unless something is wrong, so that stderr is the command's.
    pub fn record<S: AsRef<OsStr>>(
        &self,
        trace: &str,
        command: impl IntoIterator<Item = S>,
    ) -> Command {
        let mut record = self.optape(["-q", "record", "-o", trace, "--"]);
        record.args(command);
        record
    }

    /// `python PROGRAM` as words.
    #[must_use]
    pub fn words(&self, program: &Path, arguments: &[&str]) -> Vec<String> {
        let mut words = vec!["python".to_owned(), program.display().to_string()];
        words.extend(arguments.iter().map(|&a| a.to_owned()));
        words
    }

    /// `optape replay TRACE --format json` with more flags, as JSON.
    ///
    /// # Panics
    /// Where it fails.
    pub fn replay(&self, trace: &str, flags: &[&str]) -> Value {
        let done = self.run(
            self.optape(["replay", trace, "--format", "json"])
                .args(flags),
        );
        done.expect_code(0);
        done.json()
    }

    /// Runs a command to its end and keeps what it wrote.
    ///
    /// # Panics
    /// Where it cannot be started, or hangs; then it is killed with everything that it started.
    pub fn run(&self, command: &mut Command) -> Done {
        self.start(command).wait()
    }

    /// Starts a command, in a process group of its own.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn start(&self, command: &mut Command) -> Running {
        // Files and not pipes: what a command leaves running cannot keep us waiting.
        let file = || tempfile::tempfile_in(self.directory.path()).expect("a file for the output");
        let (stdout, stderr) = (file(), file());
        let copy = |file: &File| file.try_clone().expect("another handle");
        let child = command
            .stdout(copy(&stdout))
            .stderr(copy(&stderr))
            .process_group(0)
            .spawn();
        let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Running {
            shown: shown(command),
            child,
            stdout,
            stderr,
            started: Instant::now(),
        }
    }
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

/// A command that runs.
#[derive(Debug)]
pub struct Running {
    shown: String,
    child: Child,
    stdout: File,
    stderr: File,
    started: Instant,
}

impl Running {
    /// Its process id, which is its process group's too.
    ///
    /// # Panics
    /// Never: the system's ids fit.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits until it has written a text to stdout.
    ///
    /// # Panics
    /// Where it never does.
    pub fn wait_for_output(&self, text: &str) {
        while !read(&self.stdout).contains(text) {
            assert!(
                self.started.elapsed() < PATIENCE,
                "{} never writes {text:?}: {}",
                self.shown,
                read(&self.stderr)
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for it to end.
    ///
    /// # Panics
    /// Where it hangs; then it is killed with everything that it started.
    pub fn wait(mut self) -> Done {
        loop {
            if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
                return Done {
                    shown: self.shown,
                    status,
                    stdout: read(&self.stdout),
                    stderr: read(&self.stderr),
                };
            }
            if self.started.elapsed() > PATIENCE {
                let _ = kill_process_group(self.pid(), Signal::KILL);
                let _ = self.child.wait();
                panic!(
                    "{} hangs; it wrote:\n{}{}",
                    self.shown,
                    read(&self.stdout),
                    read(&self.stderr)
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Everything in it. The offset is shared with the process that writes, so it is left alone.
fn read(file: &File) -> String {
    let mut bytes =
        vec![0; usize::try_from(file.metadata().expect("a file").len()).expect("a size")];
    let filled = file.read_at(&mut bytes, 0).expect("the output can be read");
    bytes.truncate(filled);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A command that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    shown: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Done {
    /// As a shell sees it: 128 and the signal's number after a signal.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Fails the test where the exit code is another one.
    ///
    /// # Panics
    /// See above.
    #[track_caller]
    pub fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(
            self.code(),
            code,
            "exit code of {}; stdout:\n{}\nstderr:\n{}",
            self.shown,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Fails the test where stderr lacks a text.
    ///
    /// # Panics
    /// See above.
    #[track_caller]
    pub fn expect_message(&self, text: &str) -> &Self {
        assert!(
            self.stderr.contains(text),
            "{} should say {text:?}, and says:\n{}",
            self.shown,
            self.stderr
        );
        self
    }

    /// Fails the test where a Rust panic shows.
    ///
    /// # Panics
    /// See above.
    #[track_caller]
    pub fn expect_no_panic(&self) -> &Self {
        assert!(
            !self.stderr.contains("panicked at"),
            "{}:\n{}",
            self.shown,
            self.stderr
        );
        assert_ne!(self.code(), 101, "{}", self.shown);
        self
    }

    /// Its stdout, as JSON.
    ///
    /// # Panics
    /// Where it is none.
    #[must_use]
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{}: {error}:\n{}", self.shown, self.stdout))
    }

    /// The last line of stdout, as JSON: what a program reports after whatever else it prints.
    ///
    /// # Panics
    /// Where it is none.
    #[must_use]
    #[track_caller]
    pub fn report(&self) -> Value {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line)
            .unwrap_or_else(|error| panic!("{}: {error}: {line:?}\n{}", self.shown, self.stderr))
    }
}
