//! The socket of a run, in its run directory: `optape ctl` reaches a recording through it, whoever records.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use optape_trace::RunInfo;

use super::order::{Flushing, Order, StreamStatus};
use super::protocol::{self, MOST_MARK_BYTES, PATIENCE, Reply, Request, RunStatus};
use super::run_directory;

/// The socket's name in the run directory.
const NAME: &str = "control";
/// So long is waited for processes to follow an order, before it is said that they have not yet.
const OBEDIENCE: Duration = Duration::from_millis(500);
/// So long is waited for the disk when a flush was asked for, and for the end when a stop was.
const LONG: Duration = Duration::from_secs(20);

/// What `status` says of a run beside its streams.
#[derive(Clone, Debug)]
pub(super) struct RunFacts {
    pub(super) run_uuid: String,
    pub(super) by_daemon: bool,
    pub(super) command: Vec<String>,
    pub(super) file: PathBuf,
    pub(super) started_unix_ns: u64,
}

impl RunFacts {
    pub(super) fn new(run: &RunInfo, file: &Path, by_daemon: bool) -> Self {
        Self {
            run_uuid: uuid::Uuid::from_bytes(run.run_uuid).simple().to_string(),
            by_daemon,
            command: run.command.clone(),
            file: std::path::absolute(file).unwrap_or_else(|_| file.to_owned()),
            started_unix_ns: run.started_unix_ns,
        }
    }
}

/// The listening end; goes away when dropped.
pub(super) struct Control {
    listener: Arc<UnixListener>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    pub(super) fn start(
        directory: &Path,
        facts: RunFacts,
        orders: Sender<Order>,
    ) -> io::Result<Self> {
        let path = directory.join(NAME);
        // Nobody else can enter the directory, so there is no moment in which it is open to others.
        let listener = Arc::new(UnixListener::bind(&path)?);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))?;
        let thread = thread::Builder::new()
            .name("optape-control".into())
            .spawn({
                let listener = Arc::clone(&listener);
                move || serve(&listener, &facts, &orders)
            })?;
        Ok(Self {
            listener,
            thread: Some(thread),
        })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Wakes `accept`, which then fails.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One client after the other: who is slow has a deadline, and holds up nobody but other clients of this run.
fn serve(listener: &UnixListener, facts: &RunFacts, orders: &Sender<Order>) {
    loop {
        match listener.accept() {
            Ok((mut stream, _)) => {
                let reply = match hear(&mut stream) {
                    Ok(Some(request)) => answer(request, facts, orders),
                    Ok(None) => continue,
                    Err(error) => Reply::Failed {
                        why: error.to_string(),
                    },
                };
                // Who does not wait for the answer does not want it.
                let _ = protocol::send(&mut stream, &reply);
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
            // Too many open files, or a client that went away at once.
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn hear(stream: &mut UnixStream) -> io::Result<Option<Request>> {
    protocol::check_peer(stream, rustix::process::geteuid().as_raw())?;
    protocol::receive(stream, Some(PATIENCE))
}

fn answer(request: Request, facts: &RunFacts, orders: &Sender<Order>) -> Reply {
    let done = |lines| Reply::Done { lines };
    let result = match request {
        Request::Status => {
            let (streams, ended) = match order(orders, Order::Status) {
                Ok(streams) => (streams, false),
                Err(_) => (Vec::new(), true),
            };
            return Reply::Run(Box::new(RunStatus {
                run_uuid: facts.run_uuid.clone(),
                recorder_process_id: std::process::id(),
                by_daemon: facts.by_daemon,
                command: facts.command.clone(),
                file: facts.file.clone(),
                started_unix_ns: facts.started_unix_ns,
                ended,
                streams,
            }));
        }
        Request::Pause { process } => pause(orders, true, process).map(done),
        Request::Resume { process } => pause(orders, false, process).map(done),
        Request::Mark { text } => mark(orders, text).map(done),
        Request::Flush => flush(orders, facts).map(done),
        Request::Stop => {
            let stopped = order_for(orders, LONG, Order::Stop).map(|mut lines| {
                if facts.file.exists() {
                    lines.push(format!(
                        "{} is complete; the program goes on",
                        facts.file.display()
                    ));
                }
                lines
            });
            stopped.map(done)
        }
        Request::Begin(_) | Request::End { .. } => {
            Err("this is one run, not the daemon, and begins no others".to_owned())
        }
    };
    result.unwrap_or_else(|why| Reply::Failed { why })
}

fn order<T>(orders: &Sender<Order>, make: impl FnOnce(Sender<T>) -> Order) -> Result<T, String> {
    order_for(orders, LONG, make)
}

fn order_for<T>(
    orders: &Sender<Order>,
    patience: Duration,
    make: impl FnOnce(Sender<T>) -> Order,
) -> Result<T, String> {
    let ended = || "its recording has ended".to_owned();
    let (reply, answered): (Sender<T>, Receiver<T>) = bounded(1);
    orders
        .send_timeout(make(reply), patience)
        .map_err(|_| ended())?;
    answered.recv_timeout(patience).map_err(|_| ended())
}

fn pause(orders: &Sender<Order>, on: bool, process: Option<u32>) -> Result<Vec<String>, String> {
    let told = order(orders, |reply| Order::Pause { on, process, reply })??;
    let deadline = Instant::now() + OBEDIENCE;
    let waiting = loop {
        let streams = order(orders, Order::Status)?;
        let waiting = streams
            .iter()
            .filter(|s| !s.ended && !s.obeys && process.is_none_or(|p| p == s.process_id))
            .count();
        if waiting == 0 || Instant::now() >= deadline {
            break waiting;
        }
        thread::sleep(Duration::from_millis(10));
    };
    let what = if on { "paused" } else { "resumed" };
    let mut lines = vec![match (told, process) {
        (0, _) => format!("{what}: no process has run an op yet; those to come begin so"),
        (1, _) => format!("{what} 1 process"),
        (n, _) => format!("{what} {n} processes"),
    }];
    if waiting > 0 {
        lines.push(format!(
            "{waiting} of them ran no op since, and will follow at the next"
        ));
    }
    let scheduled = order(orders, Order::Status)?
        .iter()
        .filter(|s| !s.ended && s.paused & crate::ring::PAUSED_BY_SCHEDULE != 0)
        .count();
    if !on && scheduled > 0 {
        lines.push(format!(
            "{scheduled} of them are at a step that the schedule (--steps, --every) leaves out"
        ));
    }
    Ok(lines)
}

fn mark(orders: &Sender<Order>, text: String) -> Result<Vec<String>, String> {
    if text.is_empty() || text.len() > MOST_MARK_BYTES {
        return Err(format!(
            "a mark has 1 to {MOST_MARK_BYTES} bytes, this one {}",
            text.len()
        ));
    }
    let marked = order(orders, |reply| Order::Mark { text, reply })??;
    Ok(vec![match marked {
        1 => "marked 1 process".to_owned(),
        n => format!("marked {n} processes"),
    }])
}

fn flush(orders: &Sender<Order>, facts: &RunFacts) -> Result<Vec<String>, String> {
    let Flushing { bytes, sink } = order(orders, Order::Flush)??;
    let deadline = Instant::now() + LONG;
    while sink.written() < bytes {
        if let Some(error) = sink.failure() {
            return Err(error.to_string());
        }
        if Instant::now() >= deadline {
            return Err(format!(
                "the disk has taken {} of {bytes} bytes in {} s",
                sink.written(),
                LONG.as_secs()
            ));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(vec![format!("{}: {bytes} bytes", facts.file.display())])
}

/// A run that somebody records now.
#[derive(Clone, Debug)]
pub struct FoundRun {
    directory: PathBuf,
    /// How it stands.
    pub status: RunStatus,
}

impl FoundRun {
    /// Asks the run.
    ///
    /// # Errors
    /// Where nobody answers. What the run itself refuses is a [`Reply::Failed`].
    pub fn ask(&self, request: &Request) -> io::Result<Reply> {
        protocol::ask(&self.directory.join(NAME), request, 2 * LONG)
    }

    /// Whether the run has this process: its recorder, or one that is recorded.
    #[must_use]
    pub fn has_process(&self, process_id: u32) -> bool {
        self.status.recorder_process_id == process_id && !self.status.by_daemon
            || self
                .status
                .streams
                .iter()
                .any(|stream: &StreamStatus| stream.process_id == process_id)
    }
}

/// The runs of this user that are being recorded on this machine, by start.
#[must_use]
pub fn find_runs() -> Vec<FoundRun> {
    let mut runs: Vec<FoundRun> = run_directory::existing()
        .into_iter()
        .filter_map(|directory| {
            let socket = directory.join(NAME);
            match protocol::ask(&socket, &Request::Status, PATIENCE) {
                Ok(Reply::Run(status)) => Some(FoundRun {
                    directory,
                    status: *status,
                }),
                Ok(_) => None,
                Err(error) => {
                    tracing::debug!("{}: {error}", socket.display());
                    None
                }
            }
        })
        .collect();
    runs.sort_by_key(|run| (run.status.started_unix_ns, run.status.recorder_process_id));
    runs
}
