//! What lies below Rust's checks: products in the registers of each kind of processor.
#![expect(unsafe_code, reason = "processor features and raw pointers")]
#![expect(
    clippy::inline_always,
    reason = "a function that is not inlined is compiled without the processor's features"
)]

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod choose;
mod compiled;
mod few;
mod kernel;
mod level;
mod memory;
mod pack;
mod portable;
mod product;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub(crate) use choose::Scratch;
pub(crate) use compiled::{Body, Features, run_at};
pub use level::{Level, UnknownLevel};
pub(crate) use memory::{end_streaming, prefetch, stream};
