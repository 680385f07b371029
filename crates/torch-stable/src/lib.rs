#![doc = include_str!("../README.md")]
#![expect(clippy::doc_markdown, reason = "the README is read as plain text as well")]

#[cfg(not(unix))]
compile_error!("torch-stable looks functions up with dlopen and dlsym, which only Unix systems have");

mod api;
mod device;
mod dtype;
mod error;
mod ffi;
mod kernel;
mod layout;
mod library;
mod parallel;
mod schema;
mod stack;
mod tensor;
mod uninit;

pub use api::{AbiVersion, initialise};
pub use device::{Device, DeviceType};
pub use dtype::{DType, Element};
pub use error::{BoxedError, Error};
pub use library::{Backend, Cpu, Cuda, Kernel, Library, Op};
pub use parallel::{num_threads, parallel_for};
pub use schema::ArgumentType;
pub use stack::{FromStack, IntoStack};
pub use tensor::Tensor;
pub use uninit::UninitTensor;
