//! The one protocol between members: behaviour (peers), handler (one connection), frame (bytes), pace (caps).

mod behaviour;
mod buffers;
mod frame;
mod handler;
mod pace;

pub use behaviour::{Behaviour, Connected, Event};
pub use buffers::{Buffer, Buffers, Place};
pub use frame::{
    Arriving, CONTENT_HEADER, LaneError, MAX_CONTENT_FRAME, Response, control_frame,
    fill_content_header, reserve_content_header,
};
pub use pace::Pace;
