//! The CPU kernels of Tutel's Mixture-of-Experts layer: safe functions over slices, one file an act.
//!
//! Every kernel cuts its work by the shapes alone and adds in a fixed order, so results have equal bits for every
//! number of threads; who runs the pieces is the caller's business ([`Parallel`]). Outputs arrive uninitialised and
//! every element of them is written exactly once. Arguments are checked first: a kernel either refuses them with a
//! [`tutel_core::Error`] and has written nothing, or succeeds.
//!
//! `unsafe` stands in [`disjoint`] (writes from several threads), [`owned`] (outputs that become vectors) and `arch`
//! (calls below Rust's checks) only.
#![deny(unsafe_code)]
#![expect(
    clippy::inline_always,
    reason = "a function that is not inlined is compiled without the processor's features"
)]

mod activation;
mod arch;
mod assign_rows;
mod combine;
mod convert;
mod cut;
#[expect(unsafe_code, reason = "the one place where tasks on several threads share an output")]
pub mod disjoint;
mod dispatch;
mod epilogue;
mod exponential;
mod grouped_gemm;
mod grouped_sum;
mod hidden;
mod lanes;
mod normal;
mod operand;
#[expect(unsafe_code, reason = "the one place where what a kernel has written becomes a vector")]
pub mod owned;
mod padded_rows;
mod parallel;
mod prefix_count;
mod row_choice;
mod rows;
mod select_experts;
mod select_experts_backward;
mod top_k;

pub use activation::Activation;
pub use arch::{Level, UnknownLevel};
pub use assign_rows::{AssignOutput, assign_rows};
pub use combine::{combine, row_dot};
pub use dispatch::dispatch;
pub use exponential::Exponential;
pub use grouped_gemm::{GroupedGemm, grouped_gemm, grouped_gemm_weight_grad};
pub use grouped_sum::grouped_sum;
pub use hidden::{Hidden, HiddenGrad, HiddenGradOutput, HiddenOutput, hidden, hidden_grad};
pub use normal::Normal;
pub use padded_rows::padded_rows;
pub use parallel::{Parallel, ScopedThreads, Serial};
pub use prefix_count::{Along, prefix_count};
pub use row_choice::{by_choice, by_row, row_tokens};
pub use rows::RowsOf;
pub use select_experts::{SelectOutput, select_experts};
pub use select_experts_backward::{SelectBackward, select_experts_backward};

/// What a kernel computes with: f64, f32, bf16 and f16.
#[expect(private_bounds, reason = "how a type enters a matrix product is this crate's business")]
pub trait Scalar: operand::Operand {}
impl<T: operand::Operand> Scalar for T {}
