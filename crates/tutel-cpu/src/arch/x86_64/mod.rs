//! Kernels for x86-64, each with the features that it needs.
pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod avx512_bf16;
mod transpose;
mod widen;
