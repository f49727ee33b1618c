//! The Python environment: the active one where it has what is needed, else one of our own in `target/python`.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::process;
use crate::progress::Progress;
use crate::workspace::Workspace;

/// The oldest Python that the pinned torch runs on.
const OLDEST: (u32, u32) = (3, 10);

/// Prints what keeps the interpreter from running our programs, one line each; nothing where all is well.
/// Arguments: `NAME==VERSION` or `NAME`. Local parts of versions (`2.13.0+cu130`) do not count.
const CHECK: &str = r#"
import sys
from importlib import metadata
for wanted in sys.argv[1:]:
    name, _, version = wanted.partition("==")
    try:
        found = metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        print(f"{name} is not installed")
        continue
    if version and found != version:
        print(f"{name} is {found}, needed is {version}")
"#;

/// That the packages are there does not mean that they work (a library is missing, two builds are mixed).
const IMPORT: &str = "import torch, spikingjelly.activation_based, sinabs, sklearn.datasets";

/// An interpreter that has everything in `requirements.txt`.
#[derive(Clone, Debug)]
pub(crate) struct Python {
    pub(crate) interpreter: PathBuf,
    /// Its environment's root, where it is a virtual one.
    environment: Option<PathBuf>,
}

impl Python {
    /// A command that runs the interpreter.
    pub(crate) fn command(&self) -> Command {
        Command::new(&self.interpreter)
    }

    /// Puts the environment first on a command's PATH, as activating it would; torch-sys asks `python` or `python3` on
    /// PATH where libtorch is.
    pub(crate) fn activate<'a>(&self, command: &'a mut Command) -> anyhow::Result<&'a mut Command> {
        let mut directories: Vec<PathBuf> = self
            .interpreter
            .parent()
            .map(Path::to_owned)
            .into_iter()
            .collect();
        directories.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
        command.env("PATH", env::join_paths(directories)?);
        match &self.environment {
            Some(environment) => command.env("VIRTUAL_ENV", environment),
            None => command.env_remove("VIRTUAL_ENV"),
        };
        Ok(command.env("LIBTORCH_USE_PYTORCH", "1"))
    }
}

/// Finds or makes the environment.
pub(crate) fn prepare(workspace: &Workspace) -> anyhow::Result<Python> {
    let requirements = Requirements::read(&workspace.root.join("requirements.txt"))?;
    let own = workspace.root.join("target/python");
    let stamps = workspace.output("xtask")?;

    let mut refused = Vec::new();
    for python in candidates(&own) {
        match requirements.check(&python, &stamps)? {
            None => return Ok(python),
            Some(why) => refused.push(format!("{}: {why}", python.interpreter.display())),
        }
    }
    for line in &refused {
        eprintln!("xtask: {line}");
    }
    let python = install(&own, workspace, &requirements)?;
    if let Some(why) = requirements.check(&python, &stamps)? {
        bail!(
            "the environment in {} does not work: {why}\nremove the directory and run the task again to make it anew",
            own.display()
        );
    }
    Ok(python)
}

/// In the order in which they are tried; those that do not exist are left out. `OPTAPE_PYTHON` names one for good.
fn candidates(own: &Path) -> Vec<Python> {
    let in_environment = |root: &Path| Python {
        interpreter: root.join("bin/python"),
        environment: Some(root.to_owned()),
    };
    if let Some(interpreter) = env::var_os("OPTAPE_PYTHON") {
        return vec![outside(PathBuf::from(interpreter))];
    }
    let mut found = Vec::new();
    if let Some(root) = env::var_os("VIRTUAL_ENV") {
        found.push(in_environment(Path::new(&root)));
    }
    found.extend(on_path("python3").map(outside));
    found.push(in_environment(own));
    found.retain(|python| python.interpreter.is_file());
    found
}

/// An interpreter that was not found by its environment; it may belong to one all the same.
fn outside(interpreter: PathBuf) -> Python {
    let root = interpreter
        .parent()
        .and_then(Path::parent)
        .map(Path::to_owned);
    Python {
        environment: root.filter(|root| root.join("pyvenv.cfg").is_file()),
        interpreter,
    }
}

fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

struct Requirements {
    path: PathBuf,
    /// `torch==2.13.0`, `scikit-learn`.
    wanted: Vec<String>,
}

impl Requirements {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            wanted: Self::parse(&text),
        })
    }

    /// Exact pins are held to; of anything looser only the name is.
    fn parse(text: &str) -> Vec<String> {
        text.lines()
            .map(|line| line.split('#').next().unwrap_or_default().trim())
            .filter(|line| !line.is_empty())
            .map(|line| match line.split_once("==") {
                Some(_) => line.replace(' ', ""),
                None => line
                    .split(['<', '>', '=', '~', '!', ' '])
                    .next()
                    .unwrap_or_default()
                    .to_owned(),
            })
            .collect()
    }

    /// `None` where the interpreter has everything, else why it does not do. Whether the packages import is tried once for
    /// each interpreter and each set of requirements.
    fn check(&self, python: &Python, stamps: &Path) -> anyhow::Result<Option<String>> {
        let output = python
            .command()
            .args(["-c", CHECK])
            .args(&self.wanted)
            .stdin(Stdio::null())
            .output();
        let output = match output {
            Ok(output) if output.status.success() => output,
            Ok(output) => return Ok(Some(last_line(&output.stderr))),
            Err(error) => return Ok(Some(error.to_string())),
        };
        let missing = String::from_utf8_lossy(&output.stdout);
        if !missing.trim().is_empty() {
            return Ok(Some(missing.trim().replace('\n', ", ")));
        }
        let stamp = stamps.join("python-imports");
        let checked = format!(
            "{}\n{}\n",
            python.interpreter.display(),
            self.wanted.join("\n")
        );
        if fs::read_to_string(&stamp).is_ok_and(|text| text == checked) {
            return Ok(None);
        }
        let progress = Progress::start(format!(
            "trying the packages of {}",
            python.interpreter.display()
        ));
        let output = python
            .command()
            .args(["-c", IMPORT])
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            return Ok(Some(format!(
                "its packages do not import: {}",
                last_line(&output.stderr)
            )));
        }
        progress.done();
        fs::write(&stamp, checked).with_context(|| format!("cannot write {}", stamp.display()))?;
        Ok(None)
    }
}

fn last_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or("it fails without a message")
        .to_owned()
}

/// Makes the environment of our own.
fn install(
    own: &Path,
    workspace: &Workspace,
    requirements: &Requirements,
) -> anyhow::Result<Python> {
    let base = base()?;
    let python = Python {
        interpreter: own.join("bin/python"),
        environment: Some(own.to_owned()),
    };
    let progress = Progress::start(format!(
        "making a Python environment in {}",
        display(own, workspace)
    ));
    let pip = make_environment(&base, own, &progress)?;
    progress.done();

    let progress = Progress::start(
        "installing torch, spikingjelly, sinabs and scikit-learn (about 5 GB, some minutes)",
    );
    let mut command = Command::new(&pip[0]);
    command
        .args(&pip[1..])
        .args(["install", "--disable-pip-version-check", "--no-input", "-r"])
        .arg(&requirements.path);
    process::run_behind(&mut command, &progress).context(
        "pip could not install the packages; is the package index reachable, and is there room for 5 GB? `cargo xtask` goes on from there when it \
         runs again. An environment of your own serves as well: install requirements.txt into it and activate it",
    )?;
    progress.done();
    Ok(python)
}

/// The interpreter that environments are made with.
pub(crate) fn base() -> anyhow::Result<PathBuf> {
    let named = env::var_os("OPTAPE_PYTHON").map(PathBuf::from);
    let active = env::var_os("VIRTUAL_ENV").map(|root| PathBuf::from(root).join("bin/python"));
    let base = match named.or(active) {
        Some(active) if active.is_file() => active,
        _ => on_path("python3").context(
            "no python3 on PATH: install Python 3.10 or newer with pip and venv (Debian, Ubuntu: apt install python3 python3-venv python3-pip)",
        )?,
    };
    check_version(&base)?;
    Ok(base)
}

/// An environment with these packages, made where it is not there.
pub(crate) fn make(
    place: &Path,
    packages: &[String],
    progress: &Progress,
) -> anyhow::Result<Python> {
    let pip = make_environment(&base()?, place, progress)?;
    let mut command = Command::new(&pip[0]);
    command
        .args(&pip[1..])
        .args([
            "install",
            "--disable-pip-version-check",
            "--no-input",
            "--no-cache-dir",
        ])
        .args(packages);
    process::run_behind(&mut command, progress)?;
    Ok(Python {
        interpreter: place.join("bin/python"),
        environment: Some(place.to_owned()),
    })
}

fn display(path: &Path, workspace: &Workspace) -> String {
    path.strip_prefix(&workspace.root)
        .unwrap_or(path)
        .display()
        .to_string()
}

fn check_version(python: &Path) -> anyhow::Result<()> {
    let mut command = Command::new(python);
    let printed =
        process::output(command.args(["-c", "import sys; print(*sys.version_info[:2])"]))?;
    let version = parse_version(&printed)
        .with_context(|| format!("{} says its version is {printed:?}", python.display()))?;
    if version < OLDEST {
        bail!(
            "{} is Python {}.{}; torch 2.13 needs {}.{} or newer. Put a newer python3 first on PATH, or name one by OPTAPE_PYTHON",
            python.display(),
            version.0,
            version.1,
            OLDEST.0,
            OLDEST.1
        );
    }
    Ok(())
}

fn parse_version(printed: &str) -> Option<(u32, u32)> {
    let (major, minor) = printed.trim().split_once(' ')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Makes it, by what this machine has, and returns the words of the pip that installs into it. Debian and Ubuntu ship a `venv` that cannot
/// put pip into what it makes (ensurepip is a package of its own).
fn make_environment(base: &Path, own: &Path, progress: &Progress) -> anyhow::Result<Vec<OsString>> {
    let inside = own.join("bin/python");
    let own_pip: Vec<OsString> = vec![inside.clone().into(), "-m".into(), "pip".into()];
    let works = |pip: &[OsString]| {
        process::succeeds(Command::new(&pip[0]).args(&pip[1..]).arg("--version"))
    };
    if works(&own_pip) {
        return Ok(own_pip);
    }
    let whole = process::run_behind(Command::new(base).args(["-m", "venv"]).arg(own), progress);
    if whole.is_ok() && works(&own_pip) {
        return Ok(own_pip);
    }
    // `pip --python` came with pip 22.3.
    let outer_pip: Vec<OsString> = vec![
        base.into(),
        "-m".into(),
        "pip".into(),
        "--python".into(),
        inside.clone().into(),
    ];
    let bare = process::succeeds(
        Command::new(base)
            .args(["-m", "venv", "--clear", "--without-pip"])
            .arg(own),
    );
    if bare && works(&outer_pip) {
        return Ok(outer_pip);
    }
    for virtualenv in [
        vec![base.as_os_str(), "-m".as_ref(), "virtualenv".as_ref()],
        vec!["virtualenv".as_ref()],
    ] {
        let made = process::succeeds(Command::new(virtualenv[0]).args(&virtualenv[1..]).arg(own));
        if made && works(&own_pip) {
            return Ok(own_pip);
        }
    }
    let why = whole.err().map_or_else(
        || "what it made has no pip".to_owned(),
        |error| format!("{error:#}"),
    );
    bail!(
        "{} can make no environment with pip in it: {why}\ninstall its venv and pip modules (Debian, Ubuntu: apt install python3-venv python3-pip), or \
         virtualenv",
        base.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirements_keep_exact_pins_and_names() {
        let wanted = Requirements::parse(
            "# head\ntorch==2.13.0\n\nscikit-learn>=1.5 # why\nnumpy\nsinabs == 3.1.3\n",
        );
        assert_eq!(
            wanted,
            ["torch==2.13.0", "scikit-learn", "numpy", "sinabs==3.1.3"]
        );
    }

    #[test]
    fn a_version_that_is_too_old_is_refused_by_number() {
        assert_eq!(parse_version("3 9\n"), Some((3, 9)));
        assert!(parse_version("3 9").unwrap() < OLDEST);
        assert!(parse_version("3 10").unwrap() >= OLDEST);
        assert_eq!(parse_version("3.11"), None);
    }

    #[test]
    fn an_interpreter_without_the_packages_says_which() {
        let directory = tempfile::tempdir().unwrap();
        let requirements = Requirements {
            path: PathBuf::new(),
            wanted: vec!["no-such-package-of-ours==1.0".to_owned()],
        };
        let python = outside(on_path("python3").expect("the tests need python3"));
        let why = requirements.check(&python, directory.path()).unwrap();
        assert_eq!(
            why.as_deref(),
            Some("no-such-package-of-ours is not installed")
        );
    }

    #[test]
    fn an_interpreter_that_is_none_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let requirements = Requirements {
            path: PathBuf::new(),
            wanted: Vec::new(),
        };
        let why = requirements
            .check(&outside("/bin/false".into()), directory.path())
            .unwrap();
        assert_eq!(why.as_deref(), Some("it fails without a message"));
    }
}
