//! The vocabulary of Tutel's Mixture-of-Experts layer, and [`mod@reference`]: the naive twin of every kernel.
//!
//! Symbols, used in every crate: T tokens, D width of a token, E experts, K choices per token, R rows (all
//! choices that reach an expert stand in rows `0..kept`, expert by expert), H hidden width, C capacity.
//!
//! Nothing here knows torch, Python, SIMD, threads, the environment or I/O.
#![forbid(unsafe_code)]

mod element;
mod error;
mod plan;
pub mod reference;
mod shape;

pub use element::{Element, Real};
pub use error::Error;
pub use plan::{NOT_ROUTED, RoutePlan, ScoreFunction};
pub use shape::{GroupedShape, RoutingShape, RowShape, check_len, check_offsets, checked_product};
