//! `optape daemon`: records many runs at once. A client asks through the daemon's socket, starts the program itself, and says when it has
//! ended. Every run has its own file, run directory, threads and control socket, as under `optape record`; what goes wrong in one stays there.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use optape_trace::RunInfo;
use rustix::fs::{FlockOperation, flock};

use super::control::RunFacts;
use super::intake::Finish;
use super::protocol::{self, Begin, DaemonStatus, PATIENCE, Reply, Request};
use super::run_directory::{self, RunDirectory};
use super::{GRACE, RecordError, Recording, Setting, TraceFile, signals};

/// At most so many clients at once.
const MOST_CLIENTS: usize = 256;
/// A run whose client is gone goes on until its processes have ended.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// Another one is there.
    #[error(
        "a daemon listens at {} already; stop it with `optape ctl stop --daemon`, or choose another socket with OPTAPE_SOCKET or --socket", path.display()
    )]
    Running {
        /// Its socket.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{} exists and is no socket; remove it, or choose another name with OPTAPE_SOCKET or --socket", path.display())]
    NoSocket {
        /// What is in the way.
        path: PathBuf,
    },
    /// The directory of the default socket is not ours alone.
    #[error(
        "{} belongs to another user or can be written by others; choose a socket elsewhere with OPTAPE_SOCKET or --socket", path.display()
    )]
    UnsafeDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot {what} {}: {source}", path.display())]
    System {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// Where the daemon listens: `OPTAPE_SOCKET`, else `optape/daemon.sock` in `XDG_RUNTIME_DIR`, else in a directory of the user's own
/// below the directory for temporary files.
#[must_use]
pub fn socket_path() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    if let Some(path) = variable("OPTAPE_SOCKET") {
        return path.into();
    }
    match variable("XDG_RUNTIME_DIR") {
        Some(directory) => Path::new(&directory).join("optape").join("daemon.sock"),
        None => std::env::temp_dir()
            .join(format!(
                "optape-daemon-{}",
                rustix::process::getuid().as_raw()
            ))
            .join("daemon.sock"),
    }
}

/// The socket, held.
struct Held {
    listener: UnixListener,
    path: PathBuf,
    /// Locked while the daemon lives: of two that start at once, one gets it.
    _lock: File,
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Held {
    fn take(path: &Path) -> Result<Self, ServiceError> {
        let system = |what, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| ServiceError::System { what, path, source }
        };
        if let Some(directory) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
            match DirBuilder::new().mode(0o700).create(directory) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    check_directory(directory)?;
                }
                Err(error) => return Err(system("make", directory)(error)),
            }
        }
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(system("open", &lock_path))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(ServiceError::Running {
                path: path.to_owned(),
            });
        }
        match std::fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(ServiceError::NoSocket {
                    path: path.to_owned(),
                });
            }
            Ok(_) if UnixStream::connect(path).is_ok() => {
                return Err(ServiceError::Running {
                    path: path.to_owned(),
                });
            }
            // Its daemon was killed.
            Ok(_) => std::fs::remove_file(path).map_err(system("remove", path))?,
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).map_err(system("listen at", path))?;
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))
            .map_err(system("protect", path))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            _lock: lock,
        })
    }
}

/// Whose directory it is, and who may write there, decides who could put a socket of his own in our place. A sticky directory (/tmp) lets
/// nobody but the owner of a file replace it.
fn check_directory(path: &Path) -> Result<(), ServiceError> {
    let metadata = std::fs::metadata(path).map_err(|source| ServiceError::System {
        what: "look at",
        path: path.to_owned(),
        source,
    })?;
    let own = metadata.uid() == rustix::process::geteuid().as_raw();
    let mode = metadata.mode();
    match (own && mode & 0o022 == 0) || mode & 0o1000 != 0 {
        true => Ok(()),
        false => Err(ServiceError::UnsafeDirectory {
            path: path.to_owned(),
        }),
    }
}

/// The daemon's state that its threads share.
#[derive(Default)]
struct Shared {
    /// Connections that began a run, to be woken at the end.
    runs: Mutex<HashMap<u64, UnixStream>>,
    clients: std::sync::atomic::AtomicUsize,
    stopping: std::sync::atomic::AtomicBool,
}

/// Records for whoever asks, until SIGTERM, SIGINT or `optape ctl stop --daemon`. Installs signal handlers: once per process.
///
/// `ready` is called when clients can connect, `notice` with what goes wrong.
///
/// # Errors
/// Where the socket cannot be had.
pub fn serve(path: &Path, ready: impl FnOnce(&Path), notice: fn(&str)) -> Result<(), ServiceError> {
    use std::sync::atomic::Ordering;

    let held = Held::take(path)?;
    signals::install_for_service(held.listener.as_raw_fd()).map_err(|source| {
        ServiceError::System {
            what: "handle signals for",
            path: path.to_owned(),
            source,
        }
    })?;
    run_directory::sweep_all();
    ready(path);
    let shared = Arc::new(Shared::default());
    let mut next = 0_u64;
    let mut threads = Vec::new();
    while !shared.stopping.load(Ordering::Acquire) && !signals::service_is_to_end() {
        threads.retain(|thread: &thread::JoinHandle<()>| !thread.is_finished());
        let mut stream = match held.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(_) => {
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if shared.clients.fetch_add(1, Ordering::AcqRel) >= MOST_CLIENTS {
            shared.clients.fetch_sub(1, Ordering::AcqRel);
            let _ = protocol::send(
                &mut stream,
                &Reply::Failed {
                    why: format!("{MOST_CLIENTS} clients are connected, which is the most"),
                },
            );
            continue;
        }
        next += 1;
        let id = next;
        let spawned = thread::Builder::new().name("optape-client".into()).spawn({
            let (shared, listener) = (Arc::clone(&shared), held.listener.try_clone());
            move || {
                client(id, stream, &shared, notice, listener.ok().as_ref());
                shared.clients.fetch_sub(1, Ordering::AcqRel);
            }
        });
        match spawned {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                shared.clients.fetch_sub(1, Ordering::AcqRel);
                notice(&format!("cannot serve a client: {error}"));
            }
        }
    }
    // Clients that wait for their program see the end of the connection, and complete their files.
    shared.stopping.store(true, Ordering::Release);
    for run in shared
        .runs
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .values()
    {
        let _ = run.shutdown(std::net::Shutdown::Read);
    }
    for thread in threads {
        let _ = thread.join();
    }
    Ok(())
}

fn client(
    id: u64,
    mut stream: UnixStream,
    shared: &Shared,
    notice: fn(&str),
    listener: Option<&UnixListener>,
) {
    use std::sync::atomic::Ordering;

    let request = protocol::check_peer(&stream, rustix::process::geteuid().as_raw())
        .and_then(|()| protocol::receive(&mut stream, Some(PATIENCE)));
    let reply = match request {
        Ok(None) => return,
        Err(error) => Reply::Failed {
            why: error.to_string(),
        },
        Ok(Some(Request::Begin(begin))) => match run(id, &mut stream, *begin, shared, notice) {
            Ok(reply) => reply,
            Err(error) => Reply::Failed {
                why: error.to_string(),
            },
        },
        Ok(Some(Request::Status)) => Reply::Daemon(DaemonStatus {
            process_id: std::process::id(),
            runs: shared
                .runs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .len(),
        }),
        Ok(Some(Request::Stop)) => {
            shared.stopping.store(true, Ordering::Release);
            if let Some(listener) = listener {
                let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Both);
            }
            Reply::Done {
                lines: vec!["the daemon ends; its runs' files are completed".to_owned()],
            }
        }
        Ok(Some(_)) => Reply::Failed {
            why: "this is asked of a run, not of the daemon".to_owned(),
        },
    };
    // Who does not wait for the answer does not want it.
    let _ = protocol::send(&mut stream, &reply);
}

/// Records one run, from its client's request to the end of its program.
fn run(
    id: u64,
    stream: &mut UnixStream,
    begin: Begin,
    shared: &Shared,
    notice: fn(&str),
) -> Result<Reply, RecordError> {
    let own = env!("CARGO_PKG_VERSION");
    if begin.client_version != own {
        return Ok(Reply::Failed {
            why: format!(
                "the daemon is optape {own}, this is optape {}: restart the daemon",
                begin.client_version
            ),
        });
    }
    if !begin.output.is_absolute() {
        return Ok(Reply::Failed {
            why: format!(
                "{} is no absolute name, and the daemon works elsewhere",
                begin.output.display()
            ),
        });
    }
    let settings = begin.settings.sound();
    let directory = RunDirectory::create(&notice)?;
    directory.write_attach_files()?;
    directory.try_ring(settings.ring_bytes)?;
    directory.prepare(&settings)?;
    let run: RunInfo = begin.run.into();
    let file = TraceFile::create(&begin.output, begin.force)?;
    let name = begin.output.display().to_string();
    let facts = RunFacts::new(&run, &begin.output, true);
    let recording = Recording::start(
        directory,
        file,
        &run,
        Setting {
            ring_bytes: settings.ring_bytes,
            window: super::window(&settings, &begin.output)?,
            monitors: settings.monitors,
            own_process: false,
        },
        Box::new({
            let name = name.clone();
            move |text| notice(&format!("{name}: {text}"))
        }),
        Some(facts),
    )?;
    tracing::info!("recording into {name}");
    let begun = stream
        .try_clone()
        .map(|copy| {
            shared
                .runs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(id, copy);
        })
        .and_then(|()| {
            protocol::send(
                stream,
                &Reply::Begun {
                    directory: recording.directory().to_owned(),
                },
            )
        });
    let ended = match begun {
        Ok(()) => protocol::receive::<Request>(stream, None),
        // It has not started its program yet.
        Err(error) => Err(error),
    };
    shared
        .runs
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .remove(&id);
    let stopping =
        shared.stopping.load(std::sync::atomic::Ordering::Acquire) || signals::service_is_to_end();
    let finish = match ended {
        Ok(Some(Request::End { exit_code, signal })) => Finish {
            exit_code,
            signal,
            grace: GRACE,
        },
        _ if stopping => {
            recording.stop();
            // Its processes end their streams with their next op.
            Finish {
                grace: GRACE,
                ..Finish::default()
            }
        }
        _ => {
            notice(&format!(
                "{name}: its client is gone; what still runs of the program is recorded to its end"
            ));
            Finish {
                grace: FOREVER,
                ..Finish::default()
            }
        }
    };
    let report = recording.finish_with(finish);
    tracing::info!("{name}: {} op calls", report.op_calls());
    Ok(Reply::Ended {
        report: Box::new(report),
    })
}

/// Asks the daemon at `path`.
///
/// # Errors
/// Where nobody answers.
pub fn ask_daemon(path: &Path, request: &Request) -> io::Result<Reply> {
    protocol::ask(path, request, 5 * PATIENCE)
}

/// The client's end of a run that the daemon records.
pub(super) struct Client {
    stream: UnixStream,
    pub(super) directory: PathBuf,
}

impl Client {
    pub(super) fn begin(path: &Path, begin: Begin) -> Result<Self, RecordError> {
        let no_daemon = |source| RecordError::NoDaemon {
            path: path.to_owned(),
            source,
        };
        let mut stream = UnixStream::connect(path).map_err(no_daemon)?;
        let reply = protocol::check_peer(&stream, rustix::process::geteuid().as_raw())
            .and_then(|()| protocol::send(&mut stream, &Request::Begin(Box::new(begin))))
            .and_then(|()| protocol::receive(&mut stream, Some(5 * PATIENCE)));
        match reply.map_err(no_daemon)? {
            Some(Reply::Begun { directory }) => Ok(Self { stream, directory }),
            Some(Reply::Failed { why }) => Err(RecordError::DaemonRefused { why }),
            _ => Err(no_daemon(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// The program has ended: waits for the file.
    pub(super) fn end(
        mut self,
        exit_code: Option<i32>,
        signal: Option<i32>,
    ) -> io::Result<super::Report> {
        // The daemon may have ended first, and have said so: then nobody hears this.
        let sent = protocol::send(&mut self.stream, &Request::End { exit_code, signal });
        match protocol::receive(&mut self.stream, Some(10 * PATIENCE)) {
            Ok(Some(Reply::Ended { report })) => Ok(*report),
            Ok(Some(Reply::Failed { why })) => Err(io::Error::other(why)),
            Ok(_) => Err(sent
                .err()
                .unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(error),
        }
    }
}
