#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod activation;
mod aux_loss;
mod builder;
mod elementwise;
mod error;
mod experts;
mod initial;
mod kernels;
mod layer;
mod parameters;
mod route;

pub use activation::Activation;
pub use builder::{MoeLayerBuilder, ScoreAt};
pub use error::Error;
pub use half;
pub use layer::{Gradients, MoeLayer, Output, Saved};
pub use parameters::{Parameter, ParameterMut, Parameters};
pub use tutel_core::{Element, Real};
pub use tutel_cpu::{Parallel, Scalar, ScopedThreads, Serial};
