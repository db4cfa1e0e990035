//! The documents beside the program: what they name exists, and what exists is named. The command line's options are
//! compared where they are defined (`cli::documented`), the demo's keys where it runs (`tests/demo.rs`).

mod control;
mod home;
mod markdown;
mod printed;
mod samples;
mod values;
