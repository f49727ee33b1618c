//! `cargo xtask wheel`: one wheel with everything: the program, the library that recorded processes load, the glue, the hook's source.
//!
//! pip puts the program where console commands are and the library into `lib/optape` of the environment, which is where the program
//! looks for it. Nothing in the wheel depends on the version of Python. The same files give the same wheel, byte for byte.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use clap::Args;
use sha2::{Digest, Sha256};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::workspace::Workspace;
use crate::{build, process};

/// Options of `cargo xtask wheel`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Take this program and the library beside it, instead of a release build
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Where the wheel goes [default: target/wheels]
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
}

const NAME: &str = "optape";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const LIBRARY: &str = "liboptape_recorder.so";
/// The oldest Python that the glue runs on.
const REQUIRES_PYTHON: &str = ">=3.10";

/// The glue, below `recorder/python`.
const GLUE: [&str; 11] = [
    "_optape_attach.py",
    "_optape_facts.py",
    "_optape_functions.py",
    "_optape_watch.py",
    "optape/__init__.py",
    "optape/_marks.py",
    "optape/_monitor.py",
    "optape/_recording.py",
    "optape/_version.py",
    "optape/py.typed",
    "optape/pytest_plugin.py",
];
/// The hook, below `recorder/hook`: what is compiled for the torch that is there.
const HOOK: [&str; 2] = ["optape_hook.cpp", "optape_hook.h"];
const LICENSES: [&str; 2] = ["LICENSE-APACHE", "LICENSE-MIT"];

/// Builds it, and prints where it is.
pub(crate) fn run(options: &Options, workspace: &Workspace) -> anyhow::Result<ExitCode> {
    let binary = match &options.binary {
        Some(binary) => binary.clone(),
        None => build::release(workspace)?,
    };
    let directory = match &options.output {
        Some(directory) => directory.clone(),
        None => workspace.root.join("target/wheels"),
    };
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let tag = format!("py3-none-{}", platform_tag(&binary)?);
    let path = directory.join(format!("{NAME}-{VERSION}-{tag}.whl"));
    let entries = entries(workspace, &binary, &tag)?;
    let bytes = archive(&entries)?;
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    Ok(ExitCode::SUCCESS)
}

/// A file of the wheel.
struct Entry {
    name: String,
    content: Vec<u8>,
    executable: bool,
}

impl Entry {
    fn text(name: String, content: String) -> Self {
        Self {
            name,
            content: content.into_bytes(),
            executable: false,
        }
    }

    fn read(name: String, path: &Path, executable: bool) -> anyhow::Result<Self> {
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self {
            name,
            content,
            executable,
        })
    }
}

fn entries(workspace: &Workspace, binary: &Path, tag: &str) -> anyhow::Result<Vec<Entry>> {
    let root = &workspace.root;
    let python = root.join("recorder/python");
    let hook = root.join("recorder/hook");
    let data = format!("{NAME}-{VERSION}.data");
    let information = format!("{NAME}-{VERSION}.dist-info");

    let version = fs::read_to_string(python.join("optape/_version.py"))?;
    if !version.contains(&format!("\"{VERSION}\"")) {
        bail!("recorder/python/optape/_version.py names another version than {VERSION}");
    }
    let mut entries = Vec::new();
    for name in GLUE {
        entries.push(Entry::read(name.to_owned(), &python.join(name), false)?);
    }
    for name in HOOK {
        entries.push(Entry::read(
            format!("optape/hook/{name}"),
            &hook.join(name),
            false,
        )?);
    }
    entries.push(Entry::read(format!("{data}/scripts/optape"), binary, true)?);
    entries.push(Entry::read(
        format!("{data}/data/lib/optape/{LIBRARY}"),
        &library_of(binary)?,
        true,
    )?);
    for name in LICENSES {
        entries.push(Entry::read(
            format!("{information}/licenses/{name}"),
            &root.join(name),
            false,
        )?);
    }
    let readme = fs::read_to_string(root.join("README.md"))?;
    entries.push(Entry::text(
        format!("{information}/METADATA"),
        metadata(&readme),
    ));
    entries.push(Entry::text(
        format!("{information}/WHEEL"),
        format!(
            "Wheel-Version: 1.0\nGenerator: xtask {VERSION}\nRoot-Is-Purelib: false\nTag: {tag}\n"
        ),
    ));
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    // Last, as the format wants: it names the others.
    let record = record(&entries, &format!("{information}/RECORD"));
    entries.push(record);
    Ok(entries)
}

/// The library that was built with the program: cargo refreshes one of two places, depending on what was built.
fn library_of(binary: &Path) -> anyhow::Result<PathBuf> {
    let beside = binary.parent().unwrap_or(Path::new("."));
    let newest = [beside.join(LIBRARY), beside.join("deps").join(LIBRARY)]
        .into_iter()
        .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
        .max();
    newest.map(|(_, path)| path).with_context(|| {
        format!(
            "no {LIBRARY} beside {}; cargo build -p optape-recorder makes it",
            binary.display()
        )
    })
}

fn metadata(readme: &str) -> String {
    format!(
        "Metadata-Version: 2.4\nName: {NAME}\nVersion: {VERSION}\n\
         Summary: An op tape for PyTorch: records every op of a run, and counts afterwards\n\
         License-Expression: MIT OR Apache-2.0\nLicense-File: LICENSE-APACHE\nLicense-File: LICENSE-MIT\n\
         Requires-Python: {REQUIRES_PYTHON}\nDescription-Content-Type: text/markdown\n\n{readme}"
    )
}

/// Every file with its checksum and size; itself without.
fn record(entries: &[Entry], name: &str) -> Entry {
    let mut lines = String::new();
    for entry in entries {
        let checksum = BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(&entry.content));
        lines += &format!("{},sha256={checksum},{}\n", entry.name, entry.content.len());
    }
    lines += &format!("{name},,\n");
    Entry::text(name.to_owned(), lines)
}

fn archive(entries: &[Entry]) -> anyhow::Result<Vec<u8>> {
    let mut zip = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for entry in entries {
        // The default time is the format's first: no clock in the file.
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .last_modified_time(zip::DateTime::default())
            .unix_permissions(if entry.executable { 0o755 } else { 0o644 });
        zip.start_file(entry.name.as_str(), options)?;
        zip.write_all(&entry.content)?;
    }
    Ok(zip.finish()?.into_inner())
}

/// What the platform is called in the wheel's name: the program needs this machine's C library, or a newer one.
fn platform_tag(binary: &Path) -> anyhow::Result<String> {
    let machine = process::output(Command::new("uname").arg("-m"))?;
    let machine = machine.trim();
    // `getconf` belongs to the C library.
    let glibc = process::output(Command::new("getconf").arg("GNU_LIBC_VERSION"));
    Ok(match glibc.ok().as_deref().and_then(version_of_glibc) {
        Some((major, minor)) => format!("manylinux_{major}_{minor}_{machine}"),
        None => {
            eprintln!(
                "xtask: this machine's C library is not glibc; {} is tagged for it alone",
                binary.display()
            );
            format!("linux_{machine}")
        }
    })
}

/// `glibc 2.36` as (2, 36).
fn version_of_glibc(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.trim().strip_prefix("glibc ")?.split_once('.')?;
    let minor = minor.split('.').next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_glibc() {
        assert_eq!(version_of_glibc("glibc 2.36\n"), Some((2, 36)));
        assert_eq!(version_of_glibc("glibc 2.39.9000"), Some((2, 39)));
        assert_eq!(version_of_glibc("musl 1.2"), None);
    }

    #[test]
    fn a_record_names_every_file() {
        let entry = Entry::text("a.py".to_owned(), "x = 1\n".to_owned());
        let record = record(&[entry], "d/RECORD");
        assert_eq!(
            String::from_utf8(record.content).unwrap(),
            "a.py,sha256=nia_NpkRxFwkPGhBR7I_yeHc_PJX0pmhxjIBam_NM_Q,6\nd/RECORD,,\n"
        );
    }

    #[test]
    fn all_of_the_glue_is_in_the_wheel() {
        let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recorder/python");
        let mut there: Vec<String> = fs::read_dir(python.join("optape"))
            .unwrap()
            .map(|entry| format!("optape/{}", entry.unwrap().file_name().to_string_lossy()))
            .filter(|name| !name.ends_with("__pycache__"))
            .collect();
        there.sort();
        let known: Vec<&str> = GLUE
            .into_iter()
            .filter(|name| name.starts_with("optape/"))
            .collect();
        assert_eq!(there, known);
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        let entries = || [Entry::text("a.py".to_owned(), "x = 1\n".to_owned())];
        assert_eq!(archive(&entries()).unwrap(), archive(&entries()).unwrap());
    }
}
