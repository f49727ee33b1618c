//! Why nothing was recorded, from the facts: what the glue said, what the command is, what its Python has.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::provenance::output_before;
use super::{Report, SUPPORTED_TORCH, launch};

/// How long the command's Python may take to say what it has.
const PATIENCE: Duration = Duration::from_secs(10);
/// Executables are searched for libtorch's name up to here.
const SEARCHED_BYTES: u64 = 512 << 20;

/// What the command is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Program {
    /// A Python, itself or as the interpreter of a script.
    Python {
        /// The interpreter.
        interpreter: PathBuf,
        /// `-I` or `-E`: it ignores PYTHONPATH.
        isolated: Option<&'static str>,
    },
    /// A script for something else.
    Script,
    /// An executable; whether it names libtorch.
    Native { torch: bool },
}

/// What the command's Python says of torch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Torch {
    Absent,
    Version(String),
    Unknown,
}

/// The message, line by line.
pub(super) fn explain(command: &[OsString], report: &Report) -> Vec<String> {
    let said = report.attach_error_lines();
    let mut lines = vec!["nothing was recorded, and no trace was written".to_owned()];
    if !said.is_empty() {
        lines.extend(said);
        return lines;
    }
    if report.attached > 0 {
        let processes = if report.attached == 1 {
            "1 process imported torch and was".to_owned()
        } else {
            format!("{} processes imported torch and were", report.attached)
        };
        lines.push(format!("{processes} ready to be recorded, but ran no op"));
        return lines;
    }
    let program = command
        .first()
        .and_then(|name| launch::find(name, std::env::var_os("PATH").as_deref()).ok());
    let program = program.map(|path| classify(&path, command.get(1..).unwrap_or_default()));
    let torch = match &program {
        Some(Program::Python {
            interpreter,
            isolated: None,
        }) => ask_for_torch(interpreter),
        _ => Torch::Unknown,
    };
    lines.extend(reasons(program.as_ref(), &torch));
    lines
}

fn reasons(program: Option<&Program>, torch: &Torch) -> Vec<String> {
    let elsewhere = "an environment that is cleared on the way (sudo, env -i, docker run, ssh) cannot be recorded from outside: put `optape record` inside";
    let text = |lines: &[&str]| {
        lines
            .iter()
            .map(|&line| line.to_owned())
            .collect::<Vec<_>>()
    };
    match program {
        Some(Program::Python {
            isolated: Some(flag),
            ..
        }) => vec![format!(
            "python {flag} ignores the environment, and optape attaches through it (PYTHONPATH); run the program without {flag}"
        )],
        Some(Program::Python { interpreter, .. }) => match torch {
            Torch::Absent => vec![format!(
                "{} has no torch; install it there, or start the program with the Python that has it (is the right environment active?)",
                interpreter.display()
            )],
            Torch::Version(version) if !is_supported(version) => vec![format!(
                "torch {version} is not supported; supported: {}; --force-torch tries nevertheless",
                SUPPORTED_TORCH.join(", ")
            )],
            _ => {
                let mut lines = text(&["the program did not import torch"]);
                lines.push(format!("if it ran torch in other processes: {elsewhere}"));
                lines
            }
        },
        Some(Program::Native { torch: true }) => {
            let mut lines = text(&[
                "the program links libtorch, but does not attach itself. A tch program is recorded after adding two lines:",
            ]);
            lines.extend(two_lines());
            lines
        }
        Some(Program::Native { torch: false }) | Some(Program::Script) | None => {
            let mut lines = text(&["no Python that imports torch ran under the command"]);
            lines.push(format!("if one should have: {elsewhere}"));
            lines.push("if it is a Rust program built on tch, add two lines to it:".to_owned());
            lines.extend(two_lines());
            lines
        }
    }
}

fn two_lines() -> Vec<String> {
    vec![
        "    optape-torch = \"0.1\"                      # Cargo.toml, [dependencies]".to_owned(),
        "    let _tape = optape_torch::attach()?;      // first line of main".to_owned(),
    ]
}

fn is_supported(version: &str) -> bool {
    let plain = version.split('+').next().unwrap_or(version);
    SUPPORTED_TORCH.contains(&plain)
}

/// What a program is, by its name, its `#!` line and its bytes.
pub(super) fn classify(path: &Path, arguments: &[OsString]) -> Program {
    if is_python(path.as_os_str()) {
        return Program::Python {
            interpreter: path.to_owned(),
            isolated: isolation(arguments.iter().map(OsString::as_os_str)),
        };
    }
    match interpreter_of(path) {
        Some((interpreter, flags)) if is_python(interpreter.as_os_str()) => {
            let isolated = isolation(flags.iter().map(OsString::as_os_str));
            Program::Python {
                interpreter,
                isolated,
            }
        }
        Some(_) => Program::Script,
        None => Program::Native {
            torch: names_torch(path),
        },
    }
}

fn is_python(path: &OsStr) -> bool {
    let name = Path::new(path)
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let version = name
        .strip_prefix("python")
        .or_else(|| name.strip_prefix("pypy"));
    version.is_some_and(|version| {
        version
            .chars()
            .all(|c| c.is_ascii_digit() || c == '.' || c == 't')
    })
}

/// The interpreter of a script and its flags; `env` is looked through.
fn interpreter_of(path: &Path) -> Option<(PathBuf, Vec<OsString>)> {
    let mut line = Vec::new();
    BufReader::new(std::fs::File::open(path).ok()?)
        .take(512)
        .read_until(b'\n', &mut line)
        .ok()?;
    let line = String::from_utf8_lossy(line.strip_prefix(b"#!")?)
        .trim()
        .to_owned();
    let mut words = line.split_ascii_whitespace();
    let mut interpreter = PathBuf::from(words.next()?);
    if interpreter.file_name() == Some(OsStr::new("env")) {
        let name = words.find(|word| !word.starts_with('-') && !word.contains('='))?;
        interpreter = launch::find(OsStr::new(name), std::env::var_os("PATH").as_deref())
            .unwrap_or_else(|_| name.into());
    }
    Some((interpreter, words.map(OsString::from).collect()))
}

/// `-I` or `-E` among Python's own flags, which end at the program.
fn isolation<'a>(arguments: impl Iterator<Item = &'a OsStr>) -> Option<&'static str> {
    let mut arguments = arguments.map(OsStr::to_string_lossy);
    while let Some(argument) = arguments.next() {
        let flags = argument
            .strip_prefix('-')
            .filter(|flags| !flags.is_empty() && !flags.starts_with('-'))?;
        for (i, flag) in flags.char_indices() {
            match flag {
                'I' => return Some("-I"),
                'E' => return Some("-E"),
                // What follows is code or a module: the program.
                'c' | 'm' => return None,
                'W' | 'X' => {
                    // Takes the rest of the word, or the next one.
                    if i + 1 == flags.len() {
                        arguments.next();
                    }
                    break;
                }
                _ => {}
            }
        }
    }
    None
}

fn ask_for_torch(interpreter: &Path) -> Torch {
    const QUESTION: &str = "import importlib.util as u, importlib.metadata as m\n\
        print('absent' if u.find_spec('torch') is None else 'version ' + m.version('torch'))";
    let mut python = Command::new(interpreter);
    python.args(["-c", QUESTION]);
    match output_before(python, Instant::now() + PATIENCE) {
        Some(answer) if answer.trim() == "absent" => Torch::Absent,
        Some(answer) => answer
            .trim()
            .strip_prefix("version ")
            .map_or(Torch::Unknown, |v| Torch::Version(v.to_owned())),
        None => Torch::Unknown,
    }
}

fn names_torch(path: &Path) -> bool {
    const NAMES: [&[u8]; 2] = [b"libtorch", b"torch_cpu"];
    const LONGEST: usize = 9;
    let Ok(file) = std::fs::File::open(path) else {
        return false;
    };
    let mut file = file.take(SEARCHED_BYTES);
    let mut buffer = vec![0; 1 << 16];
    let mut kept = 0;
    loop {
        let Ok(n) = file.read(buffer.get_mut(kept..).unwrap_or_default()) else {
            return false;
        };
        let filled = kept + n;
        let bytes = buffer.get(..filled).unwrap_or_default();
        if NAMES
            .iter()
            .any(|name| bytes.windows(name.len()).any(|window| window == *name))
        {
            return true;
        }
        if n == 0 {
            return false;
        }
        // A name may be cut by the end of the buffer.
        kept = filled.min(LONGEST - 1);
        buffer.copy_within(filled - kept..filled, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(words: &[&str]) -> Option<&'static str> {
        isolation(words.iter().map(OsStr::new))
    }

    #[test]
    fn isolated_pythons_are_recognised() {
        assert_eq!(flags(&["-I", "x.py"]), Some("-I"));
        assert_eq!(flags(&["-sE", "x.py"]), Some("-E"));
        assert_eq!(flags(&["-W", "-I", "-uI", "x.py"]), Some("-I"));
        assert_eq!(flags(&["-Wignore", "x.py", "-I"]), None);
        assert_eq!(flags(&["x.py", "-E"]), None);
        assert_eq!(flags(&["-m", "pkg", "-I"]), None);
        assert_eq!(flags(&["-Sc", "import I", "-I"]), None);
        assert_eq!(flags(&["-", "-I"]), None);
        assert_eq!(flags(&["--version", "-I"]), None);
        assert_eq!(flags(&[]), None);
    }

    #[test]
    fn programs_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = directory.path().join(name);
            std::fs::write(&path, content).unwrap();
            path
        };
        assert_eq!(
            classify(Path::new("/usr/bin/python3.11"), &["-I".into()]),
            Program::Python {
                interpreter: "/usr/bin/python3.11".into(),
                isolated: Some("-I")
            }
        );
        assert_eq!(
            classify(
                &file("tool", b"#!/opt/venv/bin/python3 -E\nimport torch\n"),
                &[]
            ),
            Program::Python {
                interpreter: "/opt/venv/bin/python3".into(),
                isolated: Some("-E")
            }
        );
        let Program::Python { isolated: None, .. } =
            classify(&file("env", b"#!/usr/bin/env python3\n"), &["-I".into()])
        else {
            panic!("not a Python")
        };
        assert_eq!(
            classify(&file("run.sh", b"#!/bin/sh\n"), &[]),
            Program::Script
        );
        let mut long = vec![0; 3 << 16];
        assert_eq!(
            classify(&file("native", &long), &[]),
            Program::Native { torch: false }
        );
        // Across the border of two reads.
        let border = (1 << 16) - 3;
        long[border..border + 11].copy_from_slice(b"libtorch.so");
        assert_eq!(
            classify(&file("tch", &long), &[]),
            Program::Native { torch: true }
        );
    }

    #[test]
    fn every_reason_shows_a_way_out() {
        let python = |isolated| Program::Python {
            interpreter: "/v/python".into(),
            isolated,
        };
        let text = |program: &Program, torch| reasons(Some(program), &torch).join("\n");
        assert!(text(&python(Some("-I")), Torch::Unknown).contains("run the program without -I"));
        assert!(text(&python(None), Torch::Absent).contains("/v/python has no torch; install it"));
        assert!(
            text(&python(None), Torch::Version("1.13.1+cu117".into())).contains("--force-torch")
        );
        assert!(
            text(&python(None), Torch::Version("2.13.0+cpu".into()))
                .contains("did not import torch")
        );
        let native = text(&Program::Native { torch: true }, Torch::Unknown);
        assert!(
            native.contains("optape-torch = \"0.1\"")
                && native.contains("let _tape = optape_torch::attach()?;")
        );
        assert!(text(&Program::Script, Torch::Unknown).contains("docker"));
    }

    #[test]
    fn a_python_without_torch_says_so() {
        let fake = tempfile::tempdir().unwrap();
        let path = fake.path().join("python3");
        std::fs::write(&path, "#!/bin/sh\necho absent\n").unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        assert_eq!(ask_for_torch(&path), Torch::Absent);
    }
}
