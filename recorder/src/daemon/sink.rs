//! Where the trace goes: a thread of its own writes, so that a slow disk holds up nobody until 8 MiB are waiting for it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::cost::thread_cpu_ns;
use super::error::RecordError;

/// Bytes are handed over in pieces of about this size, and at every flush.
const CHUNK_BYTES: usize = 256 << 10;
/// So many pieces may wait for the disk.
const WAITING_CHUNKS: usize = 32;
/// How often it is looked whether the file still has a name.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The trace file. It is reserved before the recording starts, but what was in an overwritten file is kept until there is something to replace it.
#[derive(Debug)]
pub struct TraceFile {
    path: PathBuf,
    file: File,
    /// It was not there before: remove it where nothing is recorded.
    created: bool,
    /// Devices and pipes are neither cut nor looked for.
    regular: bool,
    begun: bool,
    looked: Instant,
}

impl TraceFile {
    /// Makes `path`, or opens it for overwriting where `force` is set.
    ///
    /// # Errors
    /// Where the file exists and `force` is not set, and where it cannot be written.
    pub fn create(path: &Path, force: bool) -> Result<Self, RecordError> {
        let output = |source| RecordError::Output {
            path: path.to_owned(),
            source,
        };
        let (file, created) = match OpenOptions::new().write(true).create_new(true).open(path) {
            Ok(file) => (file, true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && force => (
                OpenOptions::new().write(true).open(path).map_err(output)?,
                false,
            ),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(RecordError::OutputExists {
                    path: path.to_owned(),
                });
            }
            Err(error) => return Err(output(error)),
        };
        let regular = file.metadata().map_err(output)?.is_file();
        Ok(Self {
            path: path.to_owned(),
            file,
            created,
            regular,
            begun: false,
            looked: Instant::now(),
        })
    }

    /// Its name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A note of it that outlives the writing.
    pub(super) fn claim(&self) -> Claim {
        Claim {
            path: self.path.clone(),
            created: self.created,
        }
    }

    fn still_there(&mut self) -> io::Result<()> {
        if self.regular && self.looked.elapsed() >= LOOK_INTERVAL {
            self.looked = Instant::now();
            if self.file.metadata()?.nlink() == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    "the file was removed while it was written",
                ));
            }
        }
        Ok(())
    }
}

impl Write for TraceFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.begun {
            if self.regular && !self.created {
                self.file.set_len(0)?;
            }
            self.begun = true;
        }
        self.still_there()?;
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that was reserved for a trace.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    pub(super) path: PathBuf,
    created: bool,
}

impl Claim {
    /// Nothing was recorded: what was not there before is not left behind.
    pub(super) fn give_up(&self) {
        let ours = self.created
            && std::fs::metadata(&self.path).is_ok_and(|m| m.is_file() && !m.file_type().is_fifo());
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The near end of the writing thread: takes bytes and hands them over.
pub(super) struct BackgroundSink {
    pending: Vec<u8>,
    chunks: Option<Sender<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
    state: SinkState,
}

/// What the writing thread has reached.
#[derive(Clone)]
pub(super) struct SinkState(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Nothing is handed over before [`SinkState::release`].
    released: AtomicBool,
    written: AtomicU64,
    cpu_ns: AtomicU64,
    failure: OnceLock<io::Error>,
}

impl BackgroundSink {
    pub(super) fn start(sink: impl Write + Send + 'static) -> io::Result<Self> {
        let state = SinkState(Arc::new(Shared::default()));
        let (chunks, received) = bounded(WAITING_CHUNKS);
        let thread = thread::Builder::new().name("optape-write".into()).spawn({
            let state = state.clone();
            move || state.write_all(sink, &received)
        })?;
        Ok(Self {
            pending: Vec::new(),
            chunks: Some(chunks),
            thread: Some(thread),
            state,
        })
    }

    pub(super) fn state(&self) -> SinkState {
        self.state.clone()
    }

    /// Sees to it that everything is written or has failed.
    pub(super) fn close(mut self) {
        let _ = self.hand_over();
        self.chunks = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    fn hand_over(&mut self) -> io::Result<()> {
        self.state.check()?;
        if self.pending.is_empty() || !self.state.0.released.load(Ordering::Relaxed) {
            return Ok(());
        }
        let chunk = std::mem::take(&mut self.pending);
        let gone = || io::Error::other("the writing thread is gone");
        self.chunks
            .as_ref()
            .ok_or_else(gone)?
            .send(chunk)
            .map_err(|_| gone())
    }
}

impl Write for BackgroundSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= CHUNK_BYTES {
            self.hand_over()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.hand_over()
    }
}

impl SinkState {
    /// From now on, bytes go to the file.
    pub(super) fn release(&self) {
        self.0.released.store(true, Ordering::Relaxed);
    }

    /// Bytes that arrived.
    pub(super) fn written(&self) -> u64 {
        self.0.written.load(Ordering::Acquire)
    }

    /// Processor time of the writing thread, up to its last write.
    pub(super) fn cpu_ns(&self) -> u64 {
        self.0.cpu_ns.load(Ordering::Relaxed)
    }

    /// Why writing ended early.
    pub(super) fn failure(&self) -> Option<&io::Error> {
        self.0.failure.get()
    }

    fn check(&self) -> io::Result<()> {
        self.failure()
            .map_or(Ok(()), |e| Err(io::Error::new(e.kind(), e.to_string())))
    }

    fn write_all(&self, mut sink: impl Write, chunks: &Receiver<Vec<u8>>) {
        for chunk in chunks {
            // After a failure everything is taken and thrown away, so that nobody waits.
            if self.failure().is_none() {
                if let Err(error) = self.write_chunk(&mut sink, &chunk) {
                    let _ = self.0.failure.set(error);
                }
                self.0.cpu_ns.store(thread_cpu_ns(), Ordering::Relaxed);
            }
        }
    }

    fn write_chunk(&self, sink: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match sink.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    self.0.written.fetch_add(n as u64, Ordering::Release);
                    bytes = bytes.get(n..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        sink.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn nothing_reaches_the_file_before_the_release() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t.optape");
        std::fs::write(&path, "precious").unwrap();
        let mut sink = BackgroundSink::start(TraceFile::create(&path, true).unwrap()).unwrap();
        sink.write_all(&vec![7; 3 * CHUNK_BYTES]).unwrap();
        sink.flush().unwrap();
        thread::sleep(Duration::from_millis(20));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        sink.state().release();
        sink.close();
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 3 * CHUNK_BYTES]);
    }

    #[test]
    fn an_existing_file_is_not_overwritten_without_force() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t.optape");
        std::fs::write(&path, "precious").unwrap();
        let error = TraceFile::create(&path, false).unwrap_err();
        assert!(matches!(error, RecordError::OutputExists { .. }), "{error}");
        assert!(error.to_string().contains("--force"));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        TraceFile::create(&path, true).unwrap().claim().give_up();
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = TraceFile::create(Path::new("/no/such/place/t.optape"), false).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("there is no directory /no/such/place"),
            "{error}"
        );
        assert_eq!(error.exit_code(), 125);
    }

    #[test]
    fn a_removed_file_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t.optape");
        let mut file = TraceFile::create(&path, false).unwrap();
        file.write_all(b"x").unwrap();
        std::fs::remove_file(&path).unwrap();
        file.looked = file.looked.checked_sub(LOOK_INTERVAL).unwrap();
        assert!(
            file.write_all(b"y")
                .unwrap_err()
                .to_string()
                .contains("removed")
        );
    }

    /// Takes `left` bytes, then the disk is full.
    struct Full {
        left: usize,
        got: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = bytes.len().min(self.left);
            if n == 0 {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            self.left -= n;
            self.got.lock().unwrap().extend_from_slice(&bytes[..n]);
            Ok(n)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_is_told_and_holds_up_nobody() {
        let got = Arc::default();
        let mut sink = BackgroundSink::start(Full {
            left: 1000,
            got: Arc::clone(&got),
        })
        .unwrap();
        let state = sink.state();
        state.release();
        let mut failed = None;
        for _ in 0..10 * WAITING_CHUNKS {
            if let Err(error) = sink.write_all(&vec![1; CHUNK_BYTES]) {
                failed = Some(error);
                break;
            }
        }
        assert_eq!(failed.map(|e| e.kind()), Some(io::ErrorKind::StorageFull));
        sink.close();
        assert_eq!(state.written(), 1000);
        assert_eq!(got.lock().unwrap().len(), 1000);
        assert_eq!(
            state.failure().map(io::Error::kind),
            Some(io::ErrorKind::StorageFull)
        );
    }
}
