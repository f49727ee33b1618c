//! Signals while the command runs.
//!
//! What is sent to the whole process group, by a terminal or by a process, has reached the command already: the daemon stays, to
//! write what is left. What a process sends to the daemon alone is meant for the command and is passed on. A terminal's signals say
//! that they come from the kernel, but who is meant by another process shows nowhere; so a [`Witness`] stands in our group.
//!
//! Handlers rather than ignored signals, since the command would inherit the latter. What was ignored when we were started (`nohup`,
//! a shell that runs us behind it) is ignored in the command, too, until it says otherwise, and passed on like the others.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

/// A file that outgrew its limit: an error of `write`, and no end.
const SURVIVED: i32 = libc::SIGXFSZ;
/// Passed on where a process sent them to us alone.
const PASSED_ON: [i32; 6] = [
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGUSR1,
    libc::SIGUSR2,
];
/// A signal to the group reaches its processes within one system call of the sender; this long after the first, all have it.
const GROUP_DELIVERY_NS: libc::c_long = 2_000_000;

/// The command, while it can be signalled. Its number cannot have been reused: it is taken back here before the command is reaped.
static COMMAND: AtomicI32 = AtomicI32::new(0);
/// A signal that came before the command was there.
static EARLY: AtomicI32 = AtomicI32::new(0);
/// Bit n: signal n was ignored when we were started.
static IGNORED: AtomicU64 = AtomicU64::new(0);
/// The witness, while there is one.
static WITNESS: AtomicI32 = AtomicI32::new(0);

/// Installs the handlers, and puts the witness into place. Once per process, before it has threads.
pub(super) fn install() -> io::Result<Witness> {
    handle(SURVIVED, survive)?;
    for signal in PASSED_ON {
        handle(signal, pass_on)?;
    }
    // A parent that ignores SIGCHLD would make the command's exit code vanish.
    // SAFETY: a plain system call; nobody else in this process waits for children by handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    Witness::start()
}

/// The listening socket of `optape daemon`, while it serves.
static LISTENER: AtomicI32 = AtomicI32::new(-1);
/// A signal that ends `optape daemon` came.
static SERVICE_ENDS: AtomicBool = AtomicBool::new(false);

/// For `optape daemon`: SIGTERM, SIGINT and SIGHUP end it in order, by shutting the listening socket down, but for those that were
/// ignored when it was started (`nohup`). Once per process.
pub(super) fn install_for_service(listener: i32) -> io::Result<()> {
    LISTENER.store(listener, Ordering::SeqCst);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        handle(signal, end_service)?;
    }
    handle(SURVIVED, survive)
}

/// Whether one of these signals came.
pub(super) fn service_is_to_end() -> bool {
    SERVICE_ENDS.load(Ordering::SeqCst)
}

extern "C" fn end_service(
    signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    if was_ignored(signal) {
        return;
    }
    SERVICE_ENDS.store(true, Ordering::SeqCst);
    // SAFETY: `shutdown` is async-signal-safe; a socket that is gone is an error, and nothing else. errno is put back.
    unsafe {
        let errno = *libc::__errno_location();
        libc::shutdown(LISTENER.load(Ordering::SeqCst), libc::SHUT_RDWR);
        *libc::__errno_location() = errno;
    }
}

/// The signal that arrived before the start, if one did.
pub(super) fn early() -> Option<i32> {
    match EARLY.load(Ordering::SeqCst) {
        0 => None,
        signal => Some(signal),
    }
}

/// From now on the command gets what is sent to us.
pub(super) fn command_started(process_id: u32) {
    let Ok(process_id) = i32::try_from(process_id) else {
        return;
    };
    COMMAND.store(process_id, Ordering::SeqCst);
    let early = EARLY.swap(0, Ordering::SeqCst);
    if early != 0 {
        // SAFETY: a plain system call; the command was not reaped yet.
        unsafe { libc::kill(process_id, early) };
    }
}

/// The command is dead, but not yet reaped.
pub(super) fn command_ended() {
    COMMAND.store(0, Ordering::SeqCst);
}

/// Ignores what was ignored when we were started. For the command, between fork and exec.
pub(super) fn ignore_as_before() -> io::Result<()> {
    for signal in PASSED_ON {
        if was_ignored(signal) {
            // SAFETY: a plain system call, allowed after a fork.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
    }
    Ok(())
}

fn was_ignored(signal: i32) -> bool {
    IGNORED.load(Ordering::SeqCst) & bit(signal) != 0
}

const fn bit(signal: i32) -> u64 {
    1 << (signal & 63)
}

/// A process in our group that does nothing but hold the signals that it got: one that reached it was sent to the group.
///
/// It blocks them all, so that whether one came stands in `/proc` as soon as the sender's system call is done, however
/// busy the machine is. It has no open files, and ends with us.
#[derive(Debug)]
pub(super) struct Witness(libc::pid_t);

impl Witness {
    fn start() -> io::Result<Self> {
        // SAFETY: the child calls nothing but plain system calls, and never returns.
        let witness = unsafe {
            let parent = libc::getpid();
            match libc::fork() {
                0 => stand_by(parent),
                -1 => return Err(io::Error::last_os_error()),
                witness => witness,
            }
        };
        WITNESS.store(witness, Ordering::SeqCst);
        Ok(Self(witness))
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        WITNESS.store(0, Ordering::SeqCst);
        // SAFETY: plain system calls on a child of ours that nobody else waits for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

/// What the witness does. SIGCONT, which also wakes who blocks it, makes it forget.
///
/// # Safety
/// In a forked child.
unsafe fn stand_by(parent: libc::pid_t) -> ! {
    // SAFETY: plain system calls on values of our own; all are allowed after a fork.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
        libc::prctl(libc::PR_SET_NAME, c"optape-witness".as_ptr());
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
        let mut wake: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut wake);
        libc::sigaddset(&mut wake, libc::SIGCONT);
        let at_once = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // The parent may have died before we asked to be told.
        while libc::getppid() == parent {
            let mut signal = 0;
            libc::sigwait(&wake, &mut signal);
            while libc::sigtimedwait(&all, std::ptr::null_mut(), &at_once) > 0 {}
        }
        libc::_exit(0)
    }
}

/// Whether the witness got the signal, too; it forgets it then. Allowed in handlers.
fn group_got(signal: i32) -> bool {
    let witness = WITNESS.load(Ordering::SeqCst);
    if witness == 0 {
        return false;
    }
    let wait = libc::timespec {
        tv_sec: 0,
        tv_nsec: GROUP_DELIVERY_NS,
    };
    // SAFETY: plain system calls on values of our own, all of which are async-signal-safe.
    unsafe {
        libc::nanosleep(&wait, std::ptr::null_mut());
        let mut path = [0u8; 32];
        status_path(witness, &mut path);
        let file = libc::open(path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC);
        if file < 0 {
            return false;
        }
        let mut text = [0u8; 4096];
        let length = libc::read(file, text.as_mut_ptr().cast(), text.len());
        libc::close(file);
        let text = text.get(..usize::try_from(length).unwrap_or(0));
        let got = text.is_some_and(|text| pending(text) & bit(signal - 1) != 0);
        if got {
            libc::kill(witness, libc::SIGCONT);
        }
        got
    }
}

/// `/proc/PID/status`, with a zero behind it.
fn status_path(process_id: libc::pid_t, path: &mut [u8; 32]) {
    let mut digits = [0u8; 10];
    let mut rest = process_id;
    let mut first = digits.len();
    while rest > 0 && first > 0 {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    let parts = b"/proc/".iter().chain(&digits[first..]).chain(b"/status");
    for (to, from) in path.iter_mut().zip(parts) {
        *to = *from;
    }
}

/// The signals that wait for a whole process, by its `/proc/PID/status`: bit n is signal n + 1.
fn pending(status: &[u8]) -> u64 {
    let mut lines = status.split(|byte| *byte == b'\n');
    let digits = lines.find_map(|line| line.strip_prefix(b"ShdPnd:"));
    digits
        .into_iter()
        .flatten()
        .filter_map(|byte| char::from(*byte).to_digit(16))
        .fold(0, |bits, digit| bits << 4 | u64::from(digit))
}

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

fn handle(signal: i32, handler: Handler) -> io::Result<()> {
    // SAFETY: zeroed sigactions are valid; both handlers only touch atomics and make system calls that are allowed in handlers.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        libc::sigemptyset(&mut action.sa_mask);
        if libc::sigaction(signal, std::ptr::null(), &mut before) != 0 {
            return Err(io::Error::last_os_error());
        }
        if before.sa_sigaction == libc::SIG_IGN {
            IGNORED.fetch_or(bit(signal), Ordering::SeqCst);
        }
        if libc::sigaction(signal, &action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn survive(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
}

extern "C" fn pass_on(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo to handlers installed with SA_SIGINFO.
    let code = unsafe { info.as_ref() }.map_or(0, |info| info.si_code);
    let command = COMMAND.load(Ordering::SeqCst);
    if command == 0 {
        if !was_ignored(signal) {
            EARLY.store(signal, Ordering::SeqCst);
        }
        return;
    }
    // From a process (SI_USER, SI_QUEUE, SI_TKILL), not from the kernel.
    if code <= 0 {
        // SAFETY: errno of whoever was interrupted is put back; `kill` is async-signal-safe.
        unsafe {
            let errno = *libc::__errno_location();
            if !group_got(signal) {
                // The command may have ended while we looked.
                let command = COMMAND.load(Ordering::SeqCst);
                if command != 0 {
                    libc::kill(command, signal);
                }
            }
            *libc::__errno_location() = errno;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pending_is_read_from_proc() {
        let status =
            b"Name:\tx\nSigPnd:\t0000000000000001\nShdPnd:\t0000000000004002\nSigBlk:\t0\n";
        assert_eq!(
            pending(status),
            bit(libc::SIGINT - 1) | bit(libc::SIGTERM - 1)
        );
        assert_eq!(pending(b"Name:\tx\n"), 0);
        let mut path = [0; 32];
        status_path(4_190_307, &mut path);
        assert!(path.starts_with(b"/proc/4190307/status\0"));
        status_path(i32::MAX, &mut path);
        assert!(path.starts_with(b"/proc/2147483647/status\0"));
    }
}
