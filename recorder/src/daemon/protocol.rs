//! What is said through the sockets: one JSON object per line, a request and its reply.
//!
//! Nothing that arrives is trusted: lines have a greatest length and a deadline, who connects must be the same user, and a request can
//! only do what its type says. A connection holds one request; only one that begins a run goes on, until its program has ended.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use optape_trace::RunInfo;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Settings;
use super::order::StreamStatus;
use super::report::Report;

/// Version of the protocol; both sides must have the same.
pub(super) const PROTOCOL: u32 = 1;
/// No line is longer.
pub(super) const MOST_LINE_BYTES: usize = 1 << 20;
/// No mark is longer.
pub const MOST_MARK_BYTES: usize = 1024;
/// So long a request may take to arrive, and so long its reply may take to be read.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

/// What is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Request {
    /// How it stands.
    Status,
    /// Record nothing for now.
    Pause {
        /// Only this process.
        process: Option<u32>,
    },
    /// Go on recording.
    Resume {
        /// Only this process.
        process: Option<u32>,
    },
    /// Put a mark into the trace.
    Mark {
        /// What it says; at most [`MOST_MARK_BYTES`].
        text: String,
    },
    /// See to it that the file holds everything so far.
    Flush,
    /// End: of a run the recording, of the daemon everything.
    Stop,
    /// To the daemon: begin to record a run.
    Begin(Box<Begin>),
    /// To the daemon, on the connection that began a run: its command has ended.
    End {
        /// By itself, with this code.
        exit_code: Option<i32>,
        /// By this signal.
        signal: Option<i32>,
    },
}

/// A run that is to be recorded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Begin {
    /// The client's version, which must be the daemon's: the ring is read by the one and written by the other.
    pub client_version: String,
    /// The file, by its absolute name.
    pub output: PathBuf,
    /// Overwrite it if it exists.
    pub force: bool,
    /// How to record.
    pub settings: Settings,
    /// What is known of the run.
    pub run: RunDescription,
}

/// [`RunInfo`] as it travels.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunDescription {
    run_uuid: [u8; 16],
    optape_version: String,
    command: Vec<String>,
    working_directory: String,
    host: String,
    started_unix_ns: u64,
    statistics: String,
    needs_version: u32,
    facts: std::collections::BTreeMap<String, String>,
}

impl From<RunInfo> for RunDescription {
    fn from(run: RunInfo) -> Self {
        Self {
            run_uuid: run.run_uuid,
            optape_version: run.optape_version,
            command: run.command,
            working_directory: run.working_directory,
            host: run.host,
            started_unix_ns: run.started_unix_ns,
            statistics: run.statistics,
            needs_version: run.needs_version,
            facts: run.facts,
        }
    }
}

impl From<RunDescription> for RunInfo {
    fn from(run: RunDescription) -> Self {
        Self {
            run_uuid: run.run_uuid,
            optape_version: run.optape_version,
            command: run.command,
            working_directory: run.working_directory,
            host: run.host,
            started_unix_ns: run.started_unix_ns,
            statistics: run.statistics,
            needs_version: run.needs_version,
            facts: run.facts,
        }
    }
}

/// What is answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reply {
    /// It was done; in words.
    Done {
        /// Line by line.
        lines: Vec<String>,
    },
    /// It was not.
    Failed {
        /// Why.
        why: String,
    },
    /// A run.
    Run(Box<RunStatus>),
    /// The daemon.
    Daemon(DaemonStatus),
    /// The run is recorded from now on.
    Begun {
        /// Its run directory.
        directory: PathBuf,
    },
    /// The run was recorded.
    Ended {
        /// What came of it.
        report: Box<Report>,
    },
}

/// A run as it stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunStatus {
    /// Its uuid, in hexadecimal.
    pub run_uuid: String,
    /// The process that records it.
    pub recorder_process_id: u32,
    /// That is `optape daemon`, not `optape record`.
    pub by_daemon: bool,
    /// Its command line.
    pub command: Vec<String>,
    /// Its file.
    pub file: PathBuf,
    /// Nanoseconds since 1970.
    pub started_unix_ns: u64,
    /// It was stopped, or its command has ended.
    pub ended: bool,
    /// Its processes.
    pub streams: Vec<StreamStatus>,
}

/// The daemon as it stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its process.
    pub process_id: u32,
    /// Runs that it records.
    pub runs: usize,
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    optape: u32,
    #[serde(flatten)]
    body: T,
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Sends one object.
pub(super) fn send<T: Serialize>(stream: &mut UnixStream, body: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(&Envelope {
        optape: PROTOCOL,
        body,
    })?;
    if line.len() >= MOST_LINE_BYTES {
        return Err(invalid(format!(
            "a message of {} bytes is longer than the longest, {MOST_LINE_BYTES}",
            line.len()
        )));
    }
    line.push(b'\n');
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&line)
}

/// Receives one object; `None` where the other side has closed. `patience`: for the whole of it.
pub(super) fn receive<T: DeserializeOwned>(
    stream: &mut UnixStream,
    patience: Option<Duration>,
) -> io::Result<Option<T>> {
    let deadline = patience.map(|patience| Instant::now() + patience);
    let mut line = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let left = deadline
            .map(|deadline| {
                deadline
                    .checked_duration_since(Instant::now())
                    .filter(|left| !left.is_zero())
                    .ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut))
            })
            .transpose()?;
        stream.set_read_timeout(left)?;
        let read = match stream.read(&mut piece) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        };
        let piece = piece.get(..read).unwrap_or_default();
        if piece.is_empty() {
            return match line.is_empty() {
                true => Ok(None),
                false => Err(invalid("it ends in the middle of a line")),
            };
        }
        line.extend_from_slice(piece);
        if line.len() > MOST_LINE_BYTES {
            return Err(invalid(format!(
                "a line of more than {MOST_LINE_BYTES} bytes"
            )));
        }
        match line.iter().position(|byte| *byte == b'\n') {
            Some(end) if end + 1 == line.len() => break,
            Some(_) => return Err(invalid("more than one line at once")),
            None => {}
        }
    }
    parse(&line).map(Some)
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> io::Result<T> {
    #[derive(Deserialize)]
    struct Version {
        optape: u32,
    }
    let version: Version = serde_json::from_slice(line)
        .map_err(|error| invalid(format!("not a message of optape's: {error}")))?;
    if version.optape != PROTOCOL {
        return Err(invalid(format!(
            "protocol version {}, this is {PROTOCOL}: both sides must be of one version of optape",
            version.optape
        )));
    }
    let envelope: Envelope<T> = serde_json::from_slice(line)
        .map_err(|error| invalid(format!("a message that is not understood: {error}")))?;
    Ok(envelope.body)
}

/// Refuses who is not the user `wanted`.
pub(super) fn check_peer(stream: &UnixStream, wanted: u32) -> io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?.uid.as_raw();
    match peer == wanted {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("user {peer} is not the user of this recording"),
        )),
    }
}

/// Asks the socket at `path`, and waits for the answer for at most `patience`.
pub(super) fn ask(path: &Path, request: &Request, patience: Duration) -> io::Result<Reply> {
    let mut stream = UnixStream::connect(path)?;
    check_peer(&stream, rustix::process::geteuid().as_raw())?;
    send(&mut stream, request)?;
    receive(&mut stream, Some(patience))?.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "it closed the connection without an answer",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(bytes: &[u8]) -> io::Result<Option<Request>> {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let bytes = bytes.to_owned();
        let writer = std::thread::spawn(move || {
            let _ = near.write_all(&bytes);
        });
        let result = receive(&mut far, Some(PATIENCE));
        drop(far);
        writer.join().unwrap();
        result
    }

    #[test]
    fn requests_come_back() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        send(&mut near, &Request::Pause { process: Some(7) }).unwrap();
        let request: Request = receive(&mut far, Some(PATIENCE)).unwrap().unwrap();
        assert!(matches!(request, Request::Pause { process: Some(7) }));
        drop(near);
        assert!(receive::<Request>(&mut far, None).unwrap().is_none());
    }

    #[test]
    fn a_run_comes_back() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let begin = Begin {
            client_version: "1.2.3".to_owned(),
            output: "/t.optape".into(),
            force: true,
            settings: Settings::default(),
            run: RunInfo {
                command: vec!["python".to_owned()],
                ..RunInfo::default()
            }
            .into(),
        };
        send(&mut near, &Request::Begin(Box::new(begin))).unwrap();
        let Request::Begin(begin) = receive(&mut far, Some(PATIENCE)).unwrap().unwrap() else {
            panic!("another request")
        };
        assert_eq!(begin.client_version, "1.2.3");
        assert_eq!(RunInfo::from(begin.run).command, ["python"]);
    }

    #[test]
    fn nonsense_is_an_error_that_says_what() {
        let long = vec![b'a'; MOST_LINE_BYTES + 1];
        let cases: [(&[u8], &str); 7] = [
            (b"\n", "not a message"),
            (b"\xff\xfe\n", "not a message"),
            (b"{\"optape\":99,\"do\":\"status\"}\n", "version 99"),
            (b"{\"optape\":1,\"do\":\"explode\"}\n", "not understood"),
            (b"{\"optape\":1,\"do\":\"status\"}\nmore", "more than one"),
            (b"{\"optape\":1", "middle of a line"),
            (&long, "more than 1048576 bytes"),
        ];
        for (bytes, what) in cases {
            let error = received(bytes).unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        }
    }

    #[test]
    fn who_says_nothing_is_not_waited_for() {
        let (_near, mut far) = UnixStream::pair().unwrap();
        let error = receive::<Request>(&mut far, Some(Duration::from_millis(20))).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn another_user_is_refused() {
        let (near, _far) = UnixStream::pair().unwrap();
        let own = rustix::process::geteuid().as_raw();
        check_peer(&near, own).unwrap();
        let error = check_peer(&near, own + 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains(&own.to_string()));
    }
}
