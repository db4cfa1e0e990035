//! Keeping an idle daemon small: what glibc's allocator does with memory that is free.

/// Heaps that threads share. By default each of a dozen short-lived threads would keep its own.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 2;

/// Sets the allocator up; to be called before threads are started.
pub fn limit_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only changes parameters of the allocator; no other thread runs yet that could race with it.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// Gives free memory back to the system, after work that took much of it.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes the allocator's own locks and touches only memory that nobody has allocated.
    unsafe {
        libc::malloc_trim(0);
    }
}
