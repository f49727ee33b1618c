//! The run directory: where the rings of one recording live, beside what a process needs to attach.
//!
//! It stands on a memory file system, outlives the recorded processes, and is removed when the recording ends. A daemon
//! that was killed leaves its directory behind, with the records that nobody wrote; those of dead daemons are
//! removed by later recordings once they are a day old.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use super::error::RecordError;
use crate::capture::PAUSED_MARKER;
use crate::ring::{OnFull, Producer};

/// What a recorded process reads: name within the run directory, content.
const ATTACH_FILES: [(&str, &str); 9] = [
    (
        "attach/_optape_attach.py",
        include_str!("../../python/_optape_attach.py"),
    ),
    (
        "attach/_optape_functions.py",
        include_str!("../../python/_optape_functions.py"),
    ),
    (
        "attach/_optape_facts.py",
        include_str!("../../python/_optape_facts.py"),
    ),
    (
        "attach/_optape_watch.py",
        include_str!("../../python/_optape_watch.py"),
    ),
    (
        "attach/optape_attach-0.1.0.dist-info/entry_points.txt",
        include_str!("../../python/entry_points.txt"),
    ),
    (
        "attach/optape_attach-0.1.0.dist-info/METADATA",
        include_str!("../../python/METADATA"),
    ),
    (
        "site/sitecustomize.py",
        include_str!("../../python/sitecustomize.py"),
    ),
    (
        "hook/optape_hook.cpp",
        include_str!("../../hook/optape_hook.cpp"),
    ),
    (
        "hook/optape_hook.h",
        include_str!("../../hook/optape_hook.h"),
    ),
];

/// Held locked by a living daemon; names it.
const LOCK: &str = "daemon";
/// Names the run, as its trace does.
const RUN: &str = "run";
/// How long the directory of a dead daemon stays, for what its rings still hold.
const STALE_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The directory; removed when dropped.
#[derive(Debug)]
pub(super) struct RunDirectory {
    path: PathBuf,
    _lock: File,
}

impl RunDirectory {
    /// Makes it on the first memory file system that can be written; a note says where that is no memory.
    pub(super) fn create(notice: &dyn Fn(&str)) -> Result<Self, RecordError> {
        let places = memory_places();
        let on_disk = std::env::temp_dir();
        let mut tried = Vec::new();
        for place in places {
            sweep(&place);
            match Self::create_in(&place) {
                Ok(directory) => return Ok(directory),
                Err(error) => tried.push((place, error)),
            }
        }
        match Self::create_in(&on_disk) {
            Ok(directory) => {
                let why: Vec<_> = tried
                    .iter()
                    .map(|(path, error)| format!("{}: {error}", path.display()))
                    .collect();
                notice(&format!(
                    "the rings are in {}, which may be a disk and cost time: no memory file system can be used ({})",
                    on_disk.display(),
                    why.join("; ")
                ));
                Ok(directory)
            }
            Err(error) => {
                tried.push((on_disk, error));
                Err(RecordError::NoRunDirectory { tried })
            }
        }
    }

    fn create_in(place: &Path) -> io::Result<Self> {
        let name = format!("{}{}", prefix(), uuid::Uuid::new_v4().simple());
        let path = place.join(name);
        DirBuilder::new().mode(0o700).create(&path)?;
        let lock = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(path.join(LOCK))
            .and_then(|mut lock| {
                flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
                writeln!(lock, "{}", std::process::id())?;
                Ok(lock)
            });
        match lock {
            Ok(lock) => Ok(Self { path, _lock: lock }),
            Err(error) => {
                let _ = std::fs::remove_dir_all(&path);
                Err(error)
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Says whose rings these are.
    pub(super) fn name_run(&self, run: &[u8; 16]) -> Result<(), RecordError> {
        let path = self.path.join(RUN);
        std::fs::write(&path, hexadecimal(run))
            .map_err(|source| RecordError::RunDirectory { path, source })
    }

    /// Puts the attach glue and the hook's source into place.
    pub(super) fn write_attach_files(&self) -> Result<(), RecordError> {
        for (name, content) in ATTACH_FILES {
            let path = self.path.join(name);
            let made = path.parent().map_or(Ok(()), std::fs::create_dir_all);
            made.and_then(|()| std::fs::write(&path, content))
                .map_err(|source| RecordError::RunDirectory { path, source })?;
        }
        Ok(())
    }

    /// Leaves word for the processes that will begin to record.
    pub(super) fn prepare(&self, settings: &super::Settings) -> Result<(), RecordError> {
        if !settings.paused {
            return Ok(());
        }
        let path = self.path.join(PAUSED_MARKER);
        std::fs::write(&path, "").map_err(|source| RecordError::RunDirectory { path, source })
    }

    /// Makes a ring and removes it again: a memory file system that is too small shows here, not in training.
    pub(super) fn try_ring(&self, ring_bytes: usize) -> Result<(), RecordError> {
        match Producer::create(&self.path, ring_bytes, OnFull::Drop) {
            Ok(ring) => {
                let _ = std::fs::remove_file(ring.path());
                Ok(())
            }
            Err(source) => Err(RecordError::MemoryTooSmall {
                directory: self.path.parent().unwrap_or(&self.path).to_owned(),
                ring_bytes: ring_bytes as u64,
                free_bytes: rustix::fs::statvfs(&self.path)
                    .map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize)),
                source,
            }),
        }
    }
}

/// First on PYTHONPATH: what torch's own entry points load.
pub(super) fn attach_path(directory: &Path) -> PathBuf {
    directory.join("attach")
}

/// On PYTHONPATH where torch does not load entry points.
pub(super) fn site_path(directory: &Path) -> PathBuf {
    directory.join("site")
}

/// The directory of the hook's source.
pub(super) fn hook_source(directory: &Path) -> PathBuf {
    directory.join("hook")
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

fn hexadecimal(run: &[u8; 16]) -> String {
    uuid::Uuid::from_bytes(*run).simple().to_string()
}

/// Memory file systems, the best first.
fn memory_places() -> Vec<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty());
    let memory = std::iter::once(PathBuf::from("/dev/shm"));
    memory.chain(runtime.map(PathBuf::from)).collect()
}

/// Where rings may be: memory first.
fn places() -> Vec<PathBuf> {
    let mut places = memory_places();
    places.push(std::env::temp_dir());
    places
}

/// The run directories of this user, whoever made them, dead or alive.
pub(super) fn existing() -> Vec<PathBuf> {
    let prefix = prefix();
    let own = rustix::process::getuid().as_raw();
    let mut found: Vec<PathBuf> = places()
        .iter()
        .filter_map(|place| std::fs::read_dir(place).ok())
        .flat_map(|entries| entries.flatten())
        .filter(|entry| {
            let ours = |name: &str| name.starts_with(&prefix);
            entry.file_name().to_str().is_some_and(ours)
                && entry
                    .path()
                    .symlink_metadata()
                    .is_ok_and(|m| m.is_dir() && m.uid() == own)
        })
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found.dedup();
    found
}

/// The directory that a run left behind, or works in.
pub(super) fn of_run(run: &[u8; 16]) -> Option<PathBuf> {
    let run = hexadecimal(run);
    existing()
        .into_iter()
        .find(|path| std::fs::read_to_string(path.join(RUN)).is_ok_and(|text| text.trim() == run))
}

/// Whether a daemon works in the directory: which process.
pub(super) fn daemon_of(directory: &Path) -> Option<String> {
    let lock = File::open(directory.join(LOCK)).ok()?;
    let free = flock(&lock, FlockOperation::NonBlockingLockShared).is_ok();
    let name = || std::fs::read_to_string(directory.join(LOCK)).unwrap_or_default();
    (!free).then(|| name().trim().to_owned())
}

/// Removes what killed daemons left behind, everywhere.
pub(super) fn sweep_all() {
    for place in places() {
        sweep(&place);
    }
}

fn prefix() -> String {
    format!("optape-{}-", rustix::process::getuid().as_raw())
}

/// Removes what daemons that were killed left behind, once nobody can want it any more.
fn sweep(place: &Path) {
    let prefix = prefix();
    let Ok(entries) = std::fs::read_dir(place) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(&prefix))
            && is_stale(&path)
        {
            tracing::info!(
                "removing {}, left behind by a recording that was killed",
                path.display()
            );
            let _ = std::fs::remove_dir_all(&path);
        }
    }
}

fn is_stale(path: &Path) -> bool {
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return false;
    };
    let old = metadata
        .modified()
        .ok()
        .and_then(|t| t.elapsed().ok())
        .is_some_and(|age| age > STALE_AFTER);
    if !metadata.is_dir() || metadata.uid() != rustix::process::getuid().as_raw() || !old {
        return false;
    }
    match File::open(path.join(LOCK)) {
        Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn it_is_private_and_goes_away() {
        let directory = RunDirectory::create(&|_| {}).unwrap();
        let path = directory.path().to_owned();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o700
        );
        directory.write_attach_files().unwrap();
        assert!(
            attach_path(directory.path())
                .join("_optape_attach.py")
                .is_file()
        );
        assert!(
            !attach_path(directory.path())
                .join("sitecustomize.py")
                .exists(),
            "would shadow the user's own"
        );
        assert!(
            site_path(directory.path())
                .join("sitecustomize.py")
                .is_file()
        );
        assert!(
            hook_source(directory.path())
                .join("optape_hook.cpp")
                .is_file()
        );
        drop(directory);
        assert!(!path.exists());
    }

    #[test]
    fn a_ring_that_does_not_fit_is_refused_with_a_way_out() {
        let directory = RunDirectory::create(&|_| {}).unwrap();
        directory.try_ring(1 << 20).unwrap();
        let error = directory.try_ring(1 << 45).unwrap_err();
        assert!(error.to_string().contains("--ring-size"), "{error}");
        assert_eq!(error.exit_code(), 125);
        let left: Vec<_> = std::fs::read_dir(directory.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, [LOCK], "the trial leaves nothing behind");
    }

    #[test]
    fn only_old_directories_of_dead_daemons_are_swept() {
        let place = tempfile::tempdir().unwrap();
        let living = RunDirectory::create_in(place.path()).unwrap();
        let dead = place.path().join(format!("{}dead", prefix()));
        let fresh = place.path().join(format!("{}fresh", prefix()));
        let other = place.path().join("something-else");
        for path in [&dead, &fresh, &other] {
            std::fs::create_dir(path).unwrap();
            std::fs::write(path.join(LOCK), "1").unwrap();
        }
        let long_ago = std::time::SystemTime::now() - 2 * STALE_AFTER;
        for path in [&dead, &other, &living.path().to_owned()] {
            File::open(path).unwrap().set_modified(long_ago).unwrap();
        }
        sweep(place.path());
        assert!(!dead.exists());
        assert!(fresh.exists() && other.exists() && living.path().exists());
    }
}
