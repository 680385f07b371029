//! What lies below Rust's checks: the matrix product of one tile.
#![expect(unsafe_code, reason = "calls that take raw pointers")]

mod gemm;

pub(crate) use gemm::{Factor, multiply};
