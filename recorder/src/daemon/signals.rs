//! Signals while the command runs.
//!
//! What a terminal sends reaches the whole foreground group, so the command has it already: the daemon stays, to write what is
//! left. What somebody sends to the daemon alone is meant for the command and is passed on. Handlers rather than
//! ignored signals, since the command would inherit the latter; what was ignored when we were started (`nohup`) stays ignored.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// Survived: the terminal's, and a file that outgrew its limit (then an error of `write`).
const SURVIVED: [i32; 3] = [libc::SIGINT, libc::SIGQUIT, libc::SIGXFSZ];
/// Passed on where a process sent them. (The kernel sends SIGHUP to the whole group.)
const PASSED_ON: [i32; 4] = [libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1, libc::SIGUSR2];

/// The command, while it can be signalled. Its number cannot have been reused: it is taken back here before the command is reaped.
static COMMAND: AtomicI32 = AtomicI32::new(0);
/// A signal that came before the command was there.
static EARLY: AtomicI32 = AtomicI32::new(0);

/// Installs the handlers. Once per process.
pub(super) fn install() -> io::Result<()> {
    for signal in SURVIVED {
        handle(signal, note)?;
    }
    for signal in PASSED_ON {
        handle(signal, pass_on)?;
    }
    // A parent that ignores SIGCHLD would make the command's exit code vanish.
    // SAFETY: a plain system call; nobody else in this process waits for children by handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    Ok(())
}

/// The listening socket of `optape daemon`, while it serves.
static LISTENER: AtomicI32 = AtomicI32::new(-1);
/// A signal that ends `optape daemon` came.
static SERVICE_ENDS: AtomicBool = AtomicBool::new(false);

/// For `optape daemon`: SIGTERM, SIGINT and SIGHUP end it in order, by shutting the listening socket down. Once per process.
pub(super) fn install_for_service(listener: i32) -> io::Result<()> {
    LISTENER.store(listener, Ordering::SeqCst);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        handle(signal, end_service)?;
    }
    handle(libc::SIGXFSZ, note)
}

/// Whether one of these signals came.
pub(super) fn service_is_to_end() -> bool {
    SERVICE_ENDS.load(Ordering::SeqCst)
}

extern "C" fn end_service(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
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

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

fn handle(signal: i32, handler: Handler) -> io::Result<()> {
    // SAFETY: zeroed sigactions are valid; both handlers only touch atomics and call `kill`, which is allowed in handlers.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(signal, std::ptr::null(), &mut before) != 0 {
            return Err(io::Error::last_os_error());
        }
        if before.sa_sigaction == libc::SIG_IGN {
            return Ok(());
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        libc::sigemptyset(&mut action.sa_mask);
        if libc::sigaction(signal, &action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn note(signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    if COMMAND.load(Ordering::SeqCst) == 0 && signal != libc::SIGXFSZ {
        EARLY.store(signal, Ordering::SeqCst);
    }
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
        EARLY.store(signal, Ordering::SeqCst);
    } else if code <= 0 {
        // From a process (SI_USER, SI_QUEUE, SI_TKILL), not from the kernel.
        // SAFETY: `kill` is async-signal-safe; errno is put back for whoever was interrupted.
        unsafe {
            let errno = *libc::__errno_location();
            libc::kill(command, signal);
            *libc::__errno_location() = errno;
        }
    }
}
