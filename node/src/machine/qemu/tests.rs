//! What needs no guest.
