//! Everything that can go wrong, with the values that were seen.

use std::any::Any;

use crate::{AbiVersion, DType, Device};

/// A boxed error of the kernel's own.
pub type BoxedError = Box<dyn std::error::Error + Send + Sync>;

/// Why a call failed. In Python each becomes a `RuntimeError` that starts with `namespace::operator: `.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No libtorch in this process, or [`initialise`](crate::initialise) was not called.
    #[error("libtorch is not loaded in this process ({reason}); `import torch` comes first")]
    NotLoaded {
        /// What was looked for.
        reason: String,
    },
    /// libtorch lacks a function of its stable ABI.
    #[error("this libtorch does not export `{symbol}`")]
    MissingSymbol {
        /// Name of the function.
        symbol: &'static str,
    },
    /// libtorch is older than [`AbiVersion::OLDEST`].
    #[error("torch {found} is too old: {} or newer is needed", AbiVersion::OLDEST)]
    TooOld {
        /// The version in this process.
        found: AbiVersion,
    },
    /// An operator's schema cannot be read, or disagrees with its Rust types, or with what was registered.
    #[error("schema `{schema}`: {reason}")]
    Schema {
        /// The schema as given.
        schema: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A namespace holds a character that torch's names cannot have.
    #[error("`{namespace}` is not a name for a namespace: letters, digits and underscores only")]
    Namespace {
        /// The namespace as given.
        namespace: String,
    },
    /// libtorch called a kernel with another number of values than its schema has.
    #[error(
        "called with {inputs} inputs for {outputs} outputs, but the operator has {expected_inputs} and {expected_outputs}"
    )]
    Arity {
        /// Values that were on the stack.
        inputs: u64,
        /// Results that were asked for.
        outputs: u64,
        /// Arguments of the schema.
        expected_inputs: usize,
        /// Results of the schema.
        expected_outputs: usize,
    },
    /// An argument of an operator cannot be used.
    #[error("argument {index} (`{name}`): {source}")]
    Argument {
        /// Position, from 0.
        index: usize,
        /// Name in the schema.
        name: String,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// A tensor without a value, which is how `None` for a `Tensor` argument arrives.
    #[error("expected a tensor, found None (an undefined tensor)")]
    Undefined,
    /// A tensor has another element type than the one asked for.
    #[error("expected a tensor of {expected}, found {found}")]
    Dtype {
        /// The type asked for.
        expected: DType,
        /// The tensor's type.
        found: DType,
    },
    /// A tensor's elements do not lie one after the other in row-major order.
    #[error("expected a contiguous tensor, found sizes {sizes:?} with strides {strides:?}")]
    NotContiguous {
        /// The tensor's sizes.
        sizes: Vec<i64>,
        /// The tensor's strides.
        strides: Vec<i64>,
    },
    /// A tensor's memory cannot be read from the CPU.
    #[error("expected a tensor on cpu, found one on {found}")]
    Device {
        /// The tensor's device.
        found: Device,
    },
    /// A tensor's storage is smaller than its sizes say, as after `untyped_storage().resize_(0)`.
    #[error("a tensor of sizes {sizes:?} needs {needed} bytes, but its storage holds {found}")]
    Storage {
        /// The tensor's sizes.
        sizes: Vec<i64>,
        /// Bytes up to the end of the last element.
        needed: usize,
        /// Bytes of the storage.
        found: i64,
    },
    /// A tensor's memory starts at an address that its element type does not allow.
    #[error("a tensor of {dtype} must start at a multiple of {alignment} bytes, found address {address:#x}")]
    Alignment {
        /// The tensor's type.
        dtype: DType,
        /// Alignment of the Rust type.
        alignment: usize,
        /// Where the tensor starts.
        address: usize,
    },
    /// The number of elements (or bytes) does not fit the machine's integers.
    #[error("a tensor of sizes {sizes:?} is too large to count its bytes")]
    Size {
        /// The sizes asked for.
        sizes: Vec<usize>,
    },
    /// A function of libtorch reported failure.
    #[error("{function} failed: {message}")]
    Call {
        /// Name of the function.
        function: &'static str,
        /// torch's message (before torch 2.13 it cannot be read; torch prints it on stderr).
        message: String,
    },
    /// A kernel panicked.
    #[error("Rust panic: {0}")]
    Panic(String),
    /// The kernel's own error, see [`Error::kernel`].
    #[error(transparent)]
    Kernel(BoxedError),
}

impl Error {
    /// Wraps an error of the kernel's own, or a plain message; its text is what Python shows.
    pub fn kernel(error: impl Into<BoxedError>) -> Self {
        Self::Kernel(error.into())
    }

    pub(crate) fn schema(schema: &str, reason: impl Into<String>) -> Self {
        Self::Schema { schema: schema.to_owned(), reason: reason.into() }
    }

    /// Adds what a failed call was about: before torch 2.13 its own message says nothing.
    pub(crate) fn about(self, subject: &str) -> Self {
        match self {
            Self::Call { function, message } => Self::Call { function, message: format!("{subject}: {message}") },
            other => other,
        }
    }

    /// The text of a caught panic. Never panics itself.
    pub(crate) fn panic(payload: Box<dyn Any + Send>) -> Self {
        let payload = match payload.downcast::<String>() {
            Ok(text) => return Self::Panic(*text),
            Err(payload) => payload,
        };
        match payload.downcast::<&'static str>() {
            Ok(text) => Self::Panic((*text).to_owned()),
            Err(other) => {
                // Dropping a value of unknown type could panic again, with nobody left to catch it.
                std::mem::forget(other);
                Self::Panic("(a payload that is not text)".to_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_hold_the_values() {
        let undefined = Error::Argument { index: 1, name: "weight".into(), source: Box::new(Error::Undefined) };
        for (error, text) in [
            (
                Error::TooOld { found: AbiVersion { major: 2, minor: 9, patch: 1 } },
                "torch 2.9.1 is too old: 2.10.0 or newer is needed",
            ),
            (
                Error::Dtype { expected: DType::Float32, found: DType::BFloat16 },
                "expected a tensor of float32, found bfloat16",
            ),
            (undefined, "argument 1 (`weight`): expected a tensor, found None (an undefined tensor)"),
            (Error::kernel("top_k must be positive, found -1"), "top_k must be positive, found -1"),
        ] {
            assert_eq!(error.to_string(), text);
        }
    }

    #[test]
    fn panics_keep_their_text() {
        assert_eq!(Error::panic(Box::new("static")).to_string(), "Rust panic: static");
        assert_eq!(Error::panic(Box::new("owned".to_owned())).to_string(), "Rust panic: owned");
        assert!(Error::panic(Box::new(7_u8)).to_string().starts_with("Rust panic: ("));
    }
}
