//! The ring: how records leave the recorded process.
//!
//! One ring per stream (process), in a file of the run directory on a memory file system, so that it outlives the process:
//! what was committed before a SIGKILL is still there for the daemon. One producer (capture, under its lock), one
//! consumer (the daemon). The producer publishes with a release store of `head` after the message is whole; a
//! message that was being written when the process died is never seen.
//!
//! The consumer reads ahead of what it frees: room is given back once what stood in it is in the file. So what a daemon
//! had in its hands when it was killed is still in the ring, and `tail` with its count of records says where the file's end is.
//!
//! The data area is mapped twice, back to back, so that a message that wraps is contiguous for both sides.
//! The file is preallocated: a full memory file system is an error when the ring is made, not a bus error in training.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::monotonic_ns;

/// First bytes of a ring file. The last digit is the version of this layout and of the messages.
pub const MAGIC: u64 = u64::from_le_bytes(*b"optring3");
/// Size of the control page, before the data.
pub const CONTROL_BYTES: usize = 4096;
/// Default size of the data area.
pub const DEFAULT_CAPACITY: usize = 4 << 20;
/// A consumer whose heartbeat is older is taken for dead or stopped: nobody waits for it.
pub const CONSUMER_TIMEOUT_NS: u64 = 100_000_000;
/// The longest that one full ring may hold up the recorded process.
pub const LONGEST_STALL: Duration = Duration::from_secs(1);

/// What a message holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MessageKind {
    /// `StreamInfo`, encoded: always first.
    StreamBegin = 1,
    /// A `Definition`, encoded.
    Definition = 2,
    /// An op call: see [`OpCallMessage`].
    OpCall = 3,
    /// A `Moment`, encoded.
    Moment = 4,
    /// A `StreamEnd`, encoded: the process said goodbye.
    StreamEnd = 5,
    /// A piece of the value of the op call before it: see [`ValueMessage`].
    Value = 6,
}

impl MessageKind {
    /// Whether it takes a place among the records of the stream.
    #[must_use]
    pub const fn is_record(self) -> bool {
        matches!(self, Self::OpCall | Self::Moment)
    }

    fn from_raw(raw: u32) -> Option<Self> {
        Some(match raw {
            1 => Self::StreamBegin,
            2 => Self::Definition,
            3 => Self::OpCall,
            4 => Self::Moment,
            5 => Self::StreamEnd,
            6 => Self::Value,
            _ => return None,
        })
    }
}

/// The control page. Producer and consumer write to different cache lines.
#[repr(C, align(4096))]
struct Control {
    magic: AtomicU64,
    capacity: AtomicU64,
    process_id: AtomicU32,
    /// 0 wait, 1 drop.
    on_full: AtomicU32,
    /// When the process started, in clock ticks since the machine did (field 22 of /proc/PID/stat); 0: not known. Tells a process
    /// from a later one with its number, whatever the clocks do.
    process_started_ticks: AtomicU64,
    /// 1: the producer holds the file locked while its program image lives.
    locked: AtomicU64,
    _pad0: [u64; 3],
    /// Bytes ever written.
    head: AtomicU64,
    /// Records that did not fit, over the ring's life, and when.
    dropped: AtomicU64,
    dropped_from_ns: AtomicU64,
    dropped_until_ns: AtomicU64,
    /// Of `dropped`: already told in a `Drop` record.
    dropped_told: AtomicU64,
    /// What the daemon last told the producer to do: see [`command`].
    command: AtomicU32,
    /// The last command that the producer has followed.
    obeyed: AtomicU32,
    /// CLOCK_MONOTONIC at the stream's time 0.
    epoch_ns: AtomicU64,
    /// [`PAUSED_BY_COMMAND`] and [`PAUSED_BY_SCHEDULE`]: why nothing is recorded now.
    paused: AtomicU64,
    /// Bytes ever freed.
    tail: AtomicU64,
    /// CLOCK_MONOTONIC of the consumer's last look.
    heartbeat_ns: AtomicU64,
    /// How many records stand before a tail. Two of them, written by turns before `tail` is: one is always that of `tail`.
    marks: [MarkSlot; 2],
    /// The number of the stream in the file, plus 1; 0 until it is there.
    stream: AtomicU64,
    _pad1: u64,
    /// Steps that ended, recorded or not: by source, and root-module calls that do not train.
    steps: [AtomicU64; 4],
}

#[repr(C)]
struct MarkSlot {
    position: AtomicU64,
    records: AtomicU64,
}

/// Bits of the daemon's commands. What lies above them counts the commands, so that a repeated one is seen as new.
pub mod command {
    /// Nothing is to be recorded for now.
    pub const PAUSE: u32 = 1;
    /// The stream is to end.
    pub const STOP: u32 = 2;
    /// Added with every command.
    pub const NEXT: u32 = 4;
}

/// Of [`Consumer::paused`]: a command, or the program itself, paused it.
pub const PAUSED_BY_COMMAND: u64 = 1;
/// Of [`Consumer::paused`]: the schedule does.
pub const PAUSED_BY_SCHEDULE: u64 = 2;

const _: () = assert!(size_of::<Control>() == CONTROL_BYTES);

/// A mapped ring file: the control page, then the data twice.
struct Mapping {
    base: NonNull<u8>,
    capacity: usize,
    _file: File,
}

// SAFETY: the mapping is plain shared memory; all shared fields of `Control` are atomics, and the data area is
// handed between producer and consumer by `head` and `tail`.
unsafe impl Send for Mapping {}
// SAFETY: as above; methods that touch the data area take `&mut self` of the one producer or the one consumer.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: File, capacity: usize) -> io::Result<Self> {
        let total = CONTROL_BYTES + 2 * capacity;
        // SAFETY: a fresh anonymous reservation of `total` bytes at an address that the kernel picks.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                total,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let Some(base) = NonNull::new(base.cast::<u8>()) else {
            return Err(io::Error::other("mmap returned null"));
        };
        let mapping = Self {
            base,
            capacity,
            _file: file,
        };
        let parts = [
            (0, CONTROL_BYTES, 0),
            (CONTROL_BYTES, capacity, CONTROL_BYTES),
            (CONTROL_BYTES + capacity, capacity, CONTROL_BYTES),
        ];
        for (offset, length, file_offset) in parts {
            // SAFETY: MAP_FIXED inside the reservation made above, which nothing else uses; all offsets are multiples of the page size.
            let part = unsafe {
                libc::mmap(
                    base.as_ptr().add(offset).cast(),
                    length,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_FIXED,
                    mapping._file.as_raw_fd(),
                    libc::off_t::try_from(file_offset).map_err(io::Error::other)?,
                )
            };
            if part == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(mapping)
    }

    fn control(&self) -> &Control {
        // SAFETY: the control page is mapped, page-aligned, zero-initialised by the file system, and holds only atomics and padding.
        unsafe { self.base.cast::<Control>().as_ref() }
    }

    /// The data at stream position `position`, contiguous for `length <= capacity` bytes.
    fn at(&self, position: u64) -> *mut u8 {
        let offset = (position % self.capacity as u64) as usize;
        // SAFETY: offset < capacity, and capacity more bytes are mapped behind it.
        unsafe { self.base.as_ptr().add(CONTROL_BYTES + offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the reservation made in `new`; nobody holds a pointer into it once the owner is dropped.
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), CONTROL_BYTES + 2 * self.capacity);
        }
    }
}

/// What to do when the ring is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum OnFull {
    /// Wait, at most [`LONGEST_STALL`] and only for a consumer that lives, then drop and count.
    Wait,
    /// Drop and count.
    Drop,
}

/// The writing end, in the recorded process.
pub struct Producer {
    mapping: Mapping,
    path: PathBuf,
    head: u64,
    /// Last seen `tail`; read again only when the ring looks full.
    tail: u64,
    on_full: OnFull,
    /// After a stall that ran out: do not wait again until something was read.
    gave_up_at: Option<u64>,
}

impl Producer {
    /// Makes a ring file `ring-PID-N` in `directory` and maps it.
    ///
    /// # Errors
    /// Where the directory is gone or the memory file system is full.
    pub fn create(directory: &Path, capacity: usize, on_full: OnFull) -> io::Result<Self> {
        let process_id = std::process::id();
        for n in 0..u32::MAX {
            let path = directory.join(format!("ring-{process_id}-{n}"));
            let hidden = directory.join(format!(".ring-{process_id}-{n}"));
            if path.exists() {
                continue;
            }
            let file = match OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&hidden)
            {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(e),
            };
            return Self::initialise(file, &hidden, path, capacity, on_full).inspect_err(|_| {
                let _ = std::fs::remove_file(&hidden);
            });
        }
        Err(io::Error::other("no free ring name"))
    }

    fn initialise(
        file: File,
        hidden: &Path,
        path: PathBuf,
        capacity: usize,
        on_full: OnFull,
    ) -> io::Result<Self> {
        let capacity = capacity.next_power_of_two().max(1 << 16);
        let length = libc::off_t::try_from(CONTROL_BYTES + capacity).map_err(io::Error::other)?;
        // SAFETY: a plain system call on a file descriptor that we own.
        let error = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, length) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        let mapping = Mapping::new(file, capacity)?;
        let control = mapping.control();
        control.capacity.store(capacity as u64, Ordering::Relaxed);
        control
            .process_id
            .store(std::process::id(), Ordering::Relaxed);
        control.process_started_ticks.store(
            crate::clock::process_start_ticks(std::process::id()).unwrap_or(0),
            Ordering::Relaxed,
        );
        // Falls with the image: the descriptor is closed by exec, and a forked child gives its copy up (see `forked` in capture).
        let locked = rustix::fs::flock(
            &mapping._file,
            rustix::fs::FlockOperation::NonBlockingLockExclusive,
        );
        control
            .locked
            .store(u64::from(locked.is_ok()), Ordering::Relaxed);
        control.epoch_ns.store(monotonic_ns(), Ordering::Relaxed);
        control
            .on_full
            .store(u32::from(on_full == OnFull::Drop), Ordering::Relaxed);
        control
            .heartbeat_ns
            .store(monotonic_ns(), Ordering::Relaxed);
        control.magic.store(MAGIC, Ordering::Release);
        std::fs::rename(hidden, &path)?;
        Ok(Self {
            mapping,
            path,
            head: 0,
            tail: 0,
            on_full,
            gave_up_at: None,
        })
    }

    /// Writes one message of `words` 8-byte words that `fill` puts into place. False: it did not fit, and was not written.
    #[inline]
    pub fn push(&mut self, kind: MessageKind, words: usize, fill: impl FnOnce(&mut [u64])) -> bool {
        let bytes = (words as u64 + 1) * 8;
        if self.head + bytes - self.tail > self.mapping.capacity as u64 && !self.make_room(bytes) {
            return false;
        }
        let at = self.mapping.at(self.head).cast::<u64>();
        // SAFETY: `bytes` bytes from `head` on are free (checked above against `tail`, which only grows), contiguous thanks to the
        // double mapping, and 8-aligned since every message is a multiple of 8 bytes; the consumer reads them only after
        // the release store of `head` below.
        let message = unsafe { std::slice::from_raw_parts_mut(at, words + 1) };
        message[0] = (words as u64) << 32 | u64::from(kind as u32);
        fill(&mut message[1..]);
        self.head += bytes;
        self.mapping
            .control()
            .head
            .store(self.head, Ordering::Release);
        true
    }

    /// Writes an encoded message (its length in bytes is the first word).
    pub fn push_bytes(&mut self, kind: MessageKind, bytes: &[u8]) -> bool {
        self.push(kind, 1 + bytes.len().div_ceil(8), |words| {
            words[0] = bytes.len() as u64;
            for (word, chunk) in words[1..].iter_mut().zip(bytes.chunks(8)) {
                let mut padded = [0u8; 8];
                padded[..chunk.len()].copy_from_slice(chunk);
                *word = u64::from_le_bytes(padded);
            }
        })
    }

    /// Bytes that it holds.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.mapping.capacity
    }

    /// Whether a message of that many payload words could ever fit.
    #[must_use]
    pub fn can_hold(&self, words: usize) -> bool {
        (words as u64 + 1) * 8 <= self.mapping.capacity as u64
    }

    #[cold]
    fn make_room(&mut self, bytes: u64) -> bool {
        let capacity = self.mapping.capacity as u64;
        let control = self.mapping.control();
        self.tail = control.tail.load(Ordering::Acquire);
        if self.head + bytes - self.tail <= capacity {
            self.gave_up_at = None;
            return true;
        }
        if bytes > capacity || self.on_full == OnFull::Drop || self.gave_up_at == Some(self.tail) {
            return false;
        }
        let began = monotonic_ns();
        loop {
            let now = monotonic_ns();
            let silent = now.saturating_sub(control.heartbeat_ns.load(Ordering::Relaxed))
                > CONSUMER_TIMEOUT_NS;
            if silent || now - began > LONGEST_STALL.as_nanos() as u64 {
                self.gave_up_at = Some(self.tail);
                return false;
            }
            std::thread::sleep(Duration::from_micros(200));
            self.tail = control.tail.load(Ordering::Acquire);
            if self.head + bytes - self.tail <= capacity {
                return true;
            }
        }
    }

    /// Counts records that did not fit.
    #[cold]
    pub fn count_dropped(&self, records: u64, time_ns: u64) {
        let control = self.mapping.control();
        if control.dropped.fetch_add(records, Ordering::Relaxed)
            == control.dropped_told.load(Ordering::Relaxed)
        {
            control.dropped_from_ns.store(time_ns, Ordering::Relaxed);
        }
        control.dropped_until_ns.store(time_ns, Ordering::Release);
    }

    /// Drops that no `Drop` record told of yet: how many, from when, until when.
    #[must_use]
    pub fn untold_drops(&self) -> Option<(u64, u64, u64)> {
        self.mapping.control().untold_drops()
    }

    /// A `Drop` record was written for `records` of them.
    pub fn drops_told(&self, records: u64) {
        self.mapping
            .control()
            .dropped_told
            .fetch_add(records, Ordering::Relaxed);
    }

    /// What the daemon wants; see [`command`].
    #[inline]
    #[must_use]
    pub fn command(&self) -> u32 {
        // Acquire: what the daemon did before (the marker of a stopped run) is to be seen after it.
        self.mapping.control().command.load(Ordering::Acquire)
    }

    /// The command was followed, and `paused` is why nothing is recorded now (0: it is).
    pub fn obeyed(&self, command: u32, paused: u64) {
        let control = self.mapping.control();
        control.paused.store(paused, Ordering::Relaxed);
        control.obeyed.store(command, Ordering::Release);
    }

    /// Says when the stream's time began.
    pub fn set_epoch_ns(&self, epoch_ns: u64) {
        self.mapping
            .control()
            .epoch_ns
            .store(epoch_ns, Ordering::Relaxed);
    }

    /// Says how many steps have ended: by source, and inferences.
    pub fn set_steps(&self, steps: [u64; 4]) {
        for (word, steps) in self.mapping.control().steps.iter().zip(steps) {
            word.store(steps, Ordering::Relaxed);
        }
    }

    /// Whether the consumer's heartbeat is older than [`CONSUMER_TIMEOUT_NS`].
    #[must_use]
    pub fn consumer_silent(&self) -> bool {
        monotonic_ns().saturating_sub(self.mapping.control().heartbeat_ns.load(Ordering::Relaxed))
            > CONSUMER_TIMEOUT_NS
    }

    /// The ring file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Control {
    fn untold_drops(&self) -> Option<(u64, u64, u64)> {
        let until = self.dropped_until_ns.load(Ordering::Acquire);
        let untold = self
            .dropped
            .load(Ordering::Relaxed)
            .saturating_sub(self.dropped_told.load(Ordering::Relaxed));
        (untold > 0).then(|| (untold, self.dropped_from_ns.load(Ordering::Relaxed), until))
    }
}

/// The reading end, in the daemon. Trusts nothing: a malformed message is an error, not a crash.
pub struct Consumer {
    mapping: Mapping,
    path: PathBuf,
    /// Read up to here.
    read: Mark,
    /// Freed up to here.
    tail: u64,
    process_id: u32,
}

/// A place between two messages of a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// Bytes before it, over the ring's life.
    position: u64,
    /// Op calls and moments before it.
    pub records: u64,
}

/// One message, borrowed from the ring.
pub struct Message<'a> {
    /// What it holds.
    pub kind: MessageKind,
    /// Its words.
    pub words: &'a [u64],
}

impl Message<'_> {
    /// The bytes of an encoded message.
    #[must_use]
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let (&length, words) = self.words.split_first()?;
        let length = usize::try_from(length).ok()?;
        if length > words.len() * 8 {
            return None;
        }
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.truncate(length);
        Some(bytes)
    }
}

impl Consumer {
    /// Maps a ring file that a producer made.
    ///
    /// # Errors
    /// Where it cannot be mapped or is no ring.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let capacity = length
            .checked_sub(CONTROL_BYTES)
            .filter(|c| c.is_power_of_two() && *c >= 1 << 16);
        let Some(capacity) = capacity else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not a ring: odd size",
            ));
        };
        let mapping = Mapping::new(file, capacity)?;
        let control = mapping.control();
        if control.magic.load(Ordering::Acquire) != MAGIC
            || control.capacity.load(Ordering::Relaxed) != capacity as u64
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not a ring of this version",
            ));
        }
        let tail = control.tail.load(Ordering::Acquire);
        let slots = control.marks.iter();
        let slot = slots
            .filter(|slot| slot.position.load(Ordering::Relaxed) == tail)
            .max_by_key(|slot| slot.records.load(Ordering::Relaxed));
        let Some(slot) = slot else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not a ring: nobody marked its tail",
            ));
        };
        let read = Mark {
            position: tail,
            records: slot.records.load(Ordering::Relaxed),
        };
        let process_id = control.process_id.load(Ordering::Relaxed);
        Ok(Self {
            mapping,
            path: path.to_owned(),
            read,
            tail,
            process_id,
        })
    }

    /// Maps the file afresh, which gives back the memory of what was read.
    ///
    /// # Errors
    /// Where it cannot be mapped any more; all stays as it is then.
    pub fn map_again(&mut self) -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(&self.path)?;
        self.mapping = Mapping::new(file, self.mapping.capacity)?;
        Ok(())
    }

    /// The number of its stream in the file, once [`Self::set_stream`] has said it.
    #[must_use]
    pub fn stream(&self) -> Option<u32> {
        let stream = self.mapping.control().stream.load(Ordering::Relaxed);
        u32::try_from(stream.checked_sub(1)?).ok()
    }

    /// Notes the number of its stream in the file.
    pub fn set_stream(&self, stream: u32) {
        let stream = u64::from(stream) + 1;
        self.mapping
            .control()
            .stream
            .store(stream, Ordering::Relaxed);
    }

    /// The process that writes it.
    #[must_use]
    pub fn process_id(&self) -> u32 {
        self.process_id
    }

    /// The ring file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// When the process that made the ring started, in clock ticks since the machine did; `None` where that is not known.
    #[must_use]
    pub fn process_start_ticks(&self) -> Option<u64> {
        Some(
            self.mapping
                .control()
                .process_started_ticks
                .load(Ordering::Relaxed),
        )
        .filter(|ticks| *ticks > 0)
    }

    /// Whether the program image that made the ring is gone: the process died, or runs another program now.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        use rustix::fs::{FlockOperation, flock};

        if self.mapping.control().locked.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let file = &self.mapping._file;
        let free = flock(file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if free {
            let _ = flock(file, FlockOperation::Unlock);
        }
        free
    }

    /// Tells the producer what to do.
    pub fn send_command(&self, command: u32) {
        self.mapping
            .control()
            .command
            .store(command, Ordering::Release);
    }

    /// The last command that was sent.
    #[must_use]
    pub fn commanded(&self) -> u32 {
        self.mapping.control().command.load(Ordering::Relaxed)
    }

    /// The last command that the producer has followed.
    #[must_use]
    pub fn obeyed(&self) -> u32 {
        self.mapping.control().obeyed.load(Ordering::Acquire)
    }

    /// Why nothing is recorded now; 0: it is.
    #[must_use]
    pub fn paused(&self) -> u64 {
        self.mapping.control().paused.load(Ordering::Relaxed)
    }

    /// CLOCK_MONOTONIC at the stream's time 0.
    #[must_use]
    pub fn epoch_ns(&self) -> u64 {
        self.mapping.control().epoch_ns.load(Ordering::Relaxed)
    }

    /// Steps that ended: by source, and inferences.
    #[must_use]
    pub fn steps(&self) -> [u64; 4] {
        let steps = &self.mapping.control().steps;
        std::array::from_fn(|i| steps[i].load(Ordering::Relaxed))
    }

    /// Says that the consumer lives. At least every 20 ms.
    pub fn heartbeat(&self) {
        self.mapping
            .control()
            .heartbeat_ns
            .store(monotonic_ns(), Ordering::Relaxed);
    }

    /// How far it was read.
    #[must_use]
    pub fn mark(&self) -> Mark {
        self.read
    }

    /// Bytes that fit.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.mapping.capacity as u64
    }

    /// Bytes that were read behind a mark.
    #[must_use]
    pub fn bytes_since(&self, mark: Mark) -> u64 {
        self.read.position.saturating_sub(mark.position)
    }

    /// Bytes that were read and not freed yet.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.read.position - self.tail
    }

    /// Frees the room before `mark`.
    pub fn free(&mut self, mark: Mark) {
        if mark.position <= self.tail || mark.position > self.read.position {
            return;
        }
        let control = self.mapping.control();
        let [first, second] = &control.marks;
        let old = first.position.load(Ordering::Relaxed) == self.tail;
        let slot = if old { second } else { first };
        slot.position.store(mark.position, Ordering::Relaxed);
        slot.records.store(mark.records, Ordering::Relaxed);
        self.tail = mark.position;
        control.tail.store(self.tail, Ordering::Release);
    }

    /// Hands the messages committed so far to `each`, oldest first, until more than `most_held` bytes are read and not freed; gives their
    /// number.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] where the ring's content is not a sequence of messages; the ring is then of no further use.
    pub fn drain(
        &mut self,
        most_held: u64,
        mut each: impl FnMut(Message<'_>),
    ) -> io::Result<usize> {
        let mut messages = 0;
        let mut seen = self.read.position;
        let share = self.mapping.capacity as u64 / 8;
        self.read_messages(
            |message| {
                messages += 1;
                each(message);
            },
            |consumer| {
                if consumer.read.position - seen > share {
                    seen = consumer.read.position;
                    consumer.heartbeat();
                }
                consumer.held_bytes() <= most_held
            },
        )?;
        Ok(messages)
    }

    /// Reads on up to the head; `after` is called behind each message, and says whether to go on.
    fn read_messages(
        &mut self,
        mut each: impl FnMut(Message<'_>),
        mut after: impl FnMut(&mut Self) -> bool,
    ) -> io::Result<()> {
        let head = self.mapping.control().head.load(Ordering::Acquire);
        let invalid =
            |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("ring: {what}"));
        let available = head.wrapping_sub(self.read.position);
        if available > self.mapping.capacity as u64 || !head.is_multiple_of(8) {
            return Err(invalid("head beyond its capacity"));
        }
        while self.read.position < head {
            let at = self.mapping.at(self.read.position).cast::<u64>();
            // SAFETY: between tail and head, 8-aligned, mapped; the producer does not touch it until `tail` is published.
            let first = unsafe { at.read() };
            let words = first >> 32;
            let bytes = (words + 1) * 8;
            if bytes > head - self.read.position {
                return Err(invalid("message beyond head"));
            }
            let kind = MessageKind::from_raw((first & 0xffff_ffff) as u32)
                .ok_or_else(|| invalid("unknown message"))?;
            // SAFETY: as above, for all `words` words (checked against head); contiguous thanks to the double mapping.
            let words = unsafe { std::slice::from_raw_parts(at.add(1), words as usize) };
            each(Message { kind, words });
            self.read.position += bytes;
            self.read.records += u64::from(kind.is_record());
            if !after(self) {
                break;
            }
        }
        Ok(())
    }

    /// Hands every message to `each` that was committed and not freed, oldest first, and changes nothing.
    ///
    /// # Errors
    /// As [`Self::drain`].
    pub fn peek(&mut self, each: impl FnMut(Message<'_>)) -> io::Result<()> {
        self.read_messages(each, |_| true)
    }

    /// Whether everything committed was drained.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mapping.control().head.load(Ordering::Acquire) == self.read.position
    }

    /// Drops that no `Drop` record told of: how many, from when, until when (ns since the stream's start).
    #[must_use]
    pub fn untold_drops(&self) -> Option<(u64, u64, u64)> {
        self.mapping.control().untold_drops()
    }
}

/// A piece of a kept value as it travels. Values are larger than rings may be; the pieces of one follow each other without anything between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValueMessage<'a> {
    /// Watch id.
    pub watch: u32,
    /// `c10::ScalarType` of the tensor.
    pub dtype: i8,
    /// Whether the elements are bits.
    pub bits: bool,
    /// All bytes of the value.
    pub total: u64,
    /// Where in them this piece begins; 0: a value begins.
    pub offset: u64,
    /// How many bytes the piece has.
    pub length: u64,
    /// The tensor's shape, as words.
    pub shape: &'a [u64],
    /// The piece's bytes, in words; the last one is filled up with zeros.
    pub words: &'a [u64],
}

const FIXED_VALUE_WORDS: usize = 5;

impl<'a> ValueMessage<'a> {
    /// Puts a piece with these bytes into the ring. False: it did not fit.
    pub fn push(&self, bytes: &[u8], ring: &mut Producer) -> bool {
        let words = FIXED_VALUE_WORDS + self.shape.len() + bytes.len().div_ceil(8);
        ring.push(MessageKind::Value, words, |out| {
            let (fixed, rest) = out.split_at_mut(FIXED_VALUE_WORDS);
            fixed.copy_from_slice(&[
                u64::from(self.watch)
                    | u64::from(self.dtype.cast_unsigned()) << 32
                    | u64::from(self.bits) << 40,
                self.shape.len() as u64,
                self.total,
                self.offset,
                bytes.len() as u64,
            ]);
            let (shape, rest) = rest.split_at_mut(self.shape.len());
            shape.copy_from_slice(self.shape);
            for (word, chunk) in rest.iter_mut().zip(bytes.chunks(8)) {
                let mut padded = [0u8; 8];
                padded[..chunk.len()].copy_from_slice(chunk);
                *word = u64::from_le_bytes(padded);
            }
        })
    }

    /// Reads one; `None` where its lengths do not fit together.
    #[must_use]
    pub fn parse(words: &'a [u64]) -> Option<Self> {
        let (fixed, rest) = words.split_at_checked(FIXED_VALUE_WORDS)?;
        let &[first, dimensions, total, offset, length] = fixed else {
            return None;
        };
        let (shape, words) = rest.split_at_checked(usize::try_from(dimensions).ok()?)?;
        let fits = length.div_ceil(8) == words.len() as u64 && offset.checked_add(length)? <= total;
        fits.then_some(Self {
            watch: first as u32,
            dtype: ((first >> 32) as u8).cast_signed(),
            bits: first >> 40 & 1 == 1,
            total,
            offset,
            length,
            shape,
            words,
        })
    }
}

/// An op call as it travels: fixed words, then payload, storages, tensors, statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpCallMessage<'a> {
    /// Signature id.
    pub signature: u32,
    /// Pattern id.
    pub pattern: u32,
    /// Thread id.
    pub thread: u32,
    /// Nanoseconds since the stream's start.
    pub start_ns: u64,
    /// Nanoseconds.
    pub duration_ns: u64,
    /// See `OpCall::sequence_number`.
    pub sequence_number: i64,
    /// Payload words.
    pub payload: &'a [u64],
    /// Storage ids, one per tensor, or none.
    pub storages: &'a [u64],
    /// Tensor ids, one per tensor, or none.
    pub tensors: &'a [u64],
    /// The pattern's numbers.
    pub statistics: &'a [u64],
}

const FIXED_WORDS: usize = 6;

impl<'a> OpCallMessage<'a> {
    /// Puts it into the ring. False: it did not fit.
    #[inline]
    pub fn push(&self, ring: &mut Producer) -> bool {
        let words = FIXED_WORDS
            + self.payload.len()
            + self.storages.len()
            + self.tensors.len()
            + self.statistics.len();
        ring.push(MessageKind::OpCall, words, |out| {
            out[0] = u64::from(self.signature) << 32 | u64::from(self.pattern);
            out[1] = u64::from(self.thread) << 32
                | (self.payload.len() as u64) << 16
                | self.storages.len() as u64;
            out[2] = (self.tensors.len() as u64) << 16 | self.statistics.len() as u64;
            out[3] = self.start_ns;
            out[4] = self.duration_ns;
            out[5] = self.sequence_number as u64;
            let mut at = FIXED_WORDS;
            for part in [self.payload, self.storages, self.tensors, self.statistics] {
                out[at..at + part.len()].copy_from_slice(part);
                at += part.len();
            }
        })
    }

    /// Reads it from a message's words; `None` where they are not an op call.
    #[must_use]
    pub fn parse(words: &'a [u64]) -> Option<Self> {
        let (fixed, mut rest) = words.split_at_checked(FIXED_WORDS)?;
        let mut take = |n: u64| {
            let (part, behind) = rest.split_at_checked((n & 0xffff) as usize)?;
            rest = behind;
            Some(part)
        };
        let payload = take(fixed[1] >> 16)?;
        let storages = take(fixed[1])?;
        let tensors = take(fixed[2] >> 16)?;
        let statistics = take(fixed[2])?;
        Some(Self {
            signature: (fixed[0] >> 32) as u32,
            pattern: (fixed[0] & 0xffff_ffff) as u32,
            thread: (fixed[1] >> 32) as u32,
            start_ns: fixed[3],
            duration_ns: fixed[4],
            sequence_number: fixed[5] as i64,
            payload,
            storages,
            tensors,
            statistics,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(capacity: usize, on_full: OnFull) -> (tempfile::TempDir, Producer, Consumer) {
        let directory = tempfile::tempdir().unwrap();
        let producer = Producer::create(directory.path(), capacity, on_full).unwrap();
        let consumer = Consumer::open(producer.path()).unwrap();
        (directory, producer, consumer)
    }

    #[test]
    fn messages_arrive_in_order_across_many_wraps() {
        let (_directory, mut producer, mut consumer) = pair(1 << 16, OnFull::Drop);
        let mut sent = 0u64;
        let mut received = 0u64;
        for round in 0..5000u64 {
            for n in 0..(round % 7) {
                let words = 1 + ((round * 31 + n * 17) % 97) as usize;
                let first = sent;
                assert!(producer.push(MessageKind::Moment, words, |w| {
                    w.iter_mut()
                        .enumerate()
                        .for_each(|(i, w)| *w = first + i as u64)
                }));
                sent += 1;
            }
            consumer
                .drain(u64::MAX, |m| {
                    assert!(
                        m.words
                            .iter()
                            .enumerate()
                            .all(|(i, w)| *w == received + i as u64)
                    );
                    received += 1;
                })
                .unwrap();
            consumer.free(consumer.mark());
        }
        assert_eq!(sent, received);
        assert!(consumer.is_empty());
    }

    #[test]
    fn a_full_ring_drops_and_counts_and_goes_on() {
        let (_directory, mut producer, mut consumer) = pair(1 << 16, OnFull::Drop);
        let mut fitted = 0;
        while producer.push(MessageKind::Moment, 7, |w| w.fill(1)) {
            fitted += 1;
        }
        assert_eq!(fitted, (1 << 16) / 64);
        producer.count_dropped(3, 50);
        producer.count_dropped(1, 90);
        assert_eq!(consumer.untold_drops(), Some((4, 50, 90)));
        producer.drops_told(4);
        assert_eq!(consumer.untold_drops(), None);
        assert_eq!(consumer.drain(u64::MAX, |_| {}).unwrap(), fitted);
        // What was read is not free before somebody says so.
        assert!(!producer.push(MessageKind::Moment, 7, |w| w.fill(2)));
        consumer.free(consumer.mark());
        assert!(producer.push(MessageKind::Moment, 7, |w| w.fill(2)));
    }

    #[test]
    fn nobody_waits_for_a_silent_consumer() {
        let (_directory, mut producer, _consumer) = pair(1 << 16, OnFull::Wait);
        let began = std::time::Instant::now();
        while producer.push(MessageKind::Moment, 7, |w| w.fill(1)) {}
        for _ in 0..1000 {
            assert!(!producer.push(MessageKind::Moment, 7, |w| w.fill(1)));
        }
        assert!(producer.consumer_silent());
        assert!(
            began.elapsed() < Duration::from_millis(700),
            "waited {:?}",
            began.elapsed()
        );
    }

    #[test]
    fn op_calls_survive_the_trip() {
        let (_directory, mut producer, mut consumer) = pair(1 << 16, OnFull::Drop);
        let call = OpCallMessage {
            signature: 7,
            pattern: 3,
            thread: 2,
            start_ns: 1 << 40,
            duration_ns: 99,
            sequence_number: -1,
            payload: &[1, 2],
            storages: &[3, 4, 5],
            tensors: &[],
            statistics: &[u64::MAX],
        };
        assert!(call.push(&mut producer));
        let mut seen = 0;
        consumer
            .drain(u64::MAX, |m| {
                assert_eq!(OpCallMessage::parse(m.words), Some(call));
                seen += 1;
            })
            .unwrap();
        assert_eq!(seen, 1);
    }

    #[test]
    fn values_survive_the_trip() {
        let (_directory, mut producer, mut consumer) = pair(1 << 16, OnFull::Drop);
        let bytes: Vec<u8> = (0..1003u32).map(|i| i as u8).collect();
        let piece = ValueMessage {
            watch: 9,
            dtype: -3,
            bits: true,
            total: 2000,
            offset: 10,
            length: 1003,
            shape: &[4, 5, 6],
            words: &[],
        };
        assert!(piece.push(&bytes, &mut producer));
        consumer
            .drain(u64::MAX, |m| {
                assert_eq!(m.kind, MessageKind::Value);
                let read = ValueMessage::parse(m.words).unwrap();
                let back: Vec<u8> = read.words.iter().flat_map(|w| w.to_le_bytes()).collect();
                assert_eq!(&back[..1003], bytes);
                assert_eq!(ValueMessage { words: &[], ..read }, piece);
                assert_eq!(ValueMessage::parse(&m.words[..m.words.len() - 1]), None);
            })
            .unwrap();
        assert_eq!(ValueMessage::parse(&[0, u64::MAX, 0, 0, 0]), None);
        assert_eq!(ValueMessage::parse(&[0, 0, 4, u64::MAX, 4, 0]), None);
    }

    #[test]
    fn a_corrupt_ring_is_an_error() {
        let (_directory, mut producer, mut consumer) = pair(1 << 16, OnFull::Drop);
        assert!(producer.push(MessageKind::Moment, 3, |w| w.fill(0)));
        // SAFETY: test of a hostile producer: overwrites the length of a committed message.
        unsafe { producer.mapping.at(0).cast::<u64>().write(u64::MAX) };
        assert!(
            consumer
                .drain(u64::MAX, |_| panic!("nothing whole"))
                .is_err()
        );
    }

    #[test]
    fn reading_goes_ahead_of_freeing_and_no_further_than_asked() {
        let (_directory, mut producer, mut consumer) = pair(1 << 16, OnFull::Drop);
        let send = |producer: &mut Producer, n: usize| {
            for _ in 0..n {
                assert!(producer.push(MessageKind::OpCall, 7, |w| w.fill(1)));
            }
        };
        send(&mut producer, 1000);
        assert_eq!(consumer.drain(640, |_| {}).unwrap(), 11);
        assert_eq!((consumer.held_bytes(), consumer.mark().records), (704, 11));
        assert!(!consumer.is_empty());
        consumer.free(consumer.mark());
        let behind = consumer.mark();
        assert_eq!(consumer.drain(u64::MAX, |_| {}).unwrap(), 989);
        assert_eq!(consumer.bytes_since(behind), 989 * 64);
        // Whoever opens the ring now begins where it was freed, and knows how much stood before.
        let mut other = Consumer::open(producer.path()).unwrap();
        assert_eq!(other.mark(), behind);
        let mut seen = 0;
        other.peek(|_| seen += 1).unwrap();
        assert_eq!(seen, 989);
        for round in 0..10 {
            consumer.free(consumer.mark());
            send(&mut producer, 700);
            consumer.drain(u64::MAX, |_| {}).unwrap();
            let other = Consumer::open(producer.path()).unwrap();
            assert_eq!(other.mark().records, 1000 + 700 * round);
        }
    }
}
