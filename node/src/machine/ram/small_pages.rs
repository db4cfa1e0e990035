//! Has a program page its memory in by single pages.
//!
//! QEMU asks for huge pages (`madvise(MADV_HUGEPAGE)`) for all memory of a machine, whatever it lies on, and has no switch against it. For a file,
//! Linux then reads 2 MiB (4 MiB where it thinks that reading goes on) at each page fault, even where the file system has forbidden to read
//! ahead: a machine that touches 10 MiB would fetch 72. QEMU does not mind if the call fails, as it does where the kernel has no huge pages: so a
//! seccomp filter has it fail, and nothing else. (`PR_SET_THP_DISABLE` is about anonymous memory: reading ahead does not look at it.)

use std::io;

/// Where `struct seccomp_data` has the call's number, the architecture, and the lower half of the third argument.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ADVICE: u32 = if cfg!(target_endian = "big") { 36 } else { 32 };

/// By what name the kernel's audit knows the architecture.
#[cfg(target_arch = "x86_64")]
const HERE: Option<u32> = Some(0xC000_003E);
#[cfg(target_arch = "aarch64")]
const HERE: Option<u32> = Some(0xC000_00B7);
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const HERE: Option<u32> = None;

/// Has `madvise(MADV_HUGEPAGE)` fail with `EINVAL`, for this thread and all that it executes and starts, for ever.
///
/// To be called in a child between fork and exec: it allocates nothing. Without privileges it also gives up gaining any by executing
/// programs (`no_new_privs`), so that set-user-id helpers of QEMU do not work then.
///
/// # Errors
/// What the kernel said; it may be one without seccomp, or of an architecture that is not known here. The program works as well
/// without, but fetches more.
pub fn deny_huge_pages() -> io::Result<()> {
    let here = HERE.ok_or(io::ErrorKind::Unsupported)?;
    let load = |at| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at, 0, 0);
    let equals = |what, otherwise| {
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            what,
            0,
            otherwise,
        )
    };
    let end = |answer| step(libc::BPF_RET | libc::BPF_K, answer, 0, 0);
    // Each comparison that fails goes to the last step.
    let mut steps = [
        load(ARCHITECTURE),
        equals(here, 5),
        load(NUMBER),
        equals(libc::SYS_madvise as u32, 3),
        load(ADVICE),
        equals(libc::MADV_HUGEPAGE as u32, 1),
        end(libc::SECCOMP_RET_ERRNO | libc::EINVAL as u32),
        end(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    let install = || {
        // SAFETY: `program` points to as many steps as it says, which outlive the call; the kernel copies them.
        let done =
            unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) };
        match done {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    match install() {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            // SAFETY: it takes numbers only.
            if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
            install()
        }
        installed => installed,
    }
}

/// A step of a filter; where it compares and finds no match, so many steps are passed over.
fn step(code: u32, k: u32, matches: u8, otherwise: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: matches,
        jf: otherwise,
        k,
    }
}

#[cfg(all(test, any(target_arch = "x86_64", target_arch = "aarch64")))]
mod tests {
    use super::*;

    /// A thread's filter is its own.
    #[test]
    fn only_huge_pages_are_denied() {
        let thread = std::thread::spawn(|| {
            let len = 4 << 20;
            let how = libc::PROT_READ | libc::PROT_WRITE;
            let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new mapping, wherever the kernel likes.
            let memory = unsafe { libc::mmap(std::ptr::null_mut(), len, how, kind, -1, 0) };
            assert!(memory != libc::MAP_FAILED);
            deny_huge_pages().unwrap();
            // SAFETY: of a mapping that nobody looks at.
            let advise = |advice| unsafe { libc::madvise(memory, len, advice) };
            assert_eq!(advise(libc::MADV_HUGEPAGE), -1);
            let error = io::Error::last_os_error();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
            assert_eq!(advise(libc::MADV_DONTNEED), 0);
        });
        thread.join().unwrap();
    }
}
