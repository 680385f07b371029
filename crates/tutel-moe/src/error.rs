//! What can be wrong with options and arguments.

/// An option or argument that the layer refuses. Every message names it, the value seen and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option of the builder that is missing or out of range.
    #[error("{option} must be {allowed}, got {value}")]
    Option {
        /// The builder's method.
        option: &'static str,
        /// The value given, or that there is none.
        value: String,
        /// The allowed values in words.
        allowed: String,
    },
    /// Tokens that are not `[T, D]` for any T.
    #[error("tokens must have a multiple of model_dim ({model_dim}) elements, got {found}")]
    Tokens {
        /// D.
        model_dim: usize,
        /// Elements seen.
        found: usize,
    },
    /// A gradient or a parameter's values of another length.
    #[error("{argument} must have {expected} elements (shape {shape:?}), got {found}")]
    Length {
        /// The argument or parameter.
        argument: &'static str,
        /// The shape it has to have.
        shape: Vec<usize>,
        /// The number of elements of that shape.
        expected: usize,
        /// Elements seen.
        found: usize,
    },
    /// A name that no parameter of the layer has.
    #[error("there is no parameter {name:?}; this layer has {known}")]
    UnknownParameter {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// What a forward pass of a layer with other sizes or options has saved.
    #[error("saved must come from a layer with the options {expected}, got one of {found}")]
    Saved {
        /// This layer's.
        expected: String,
        /// The other layer's.
        found: String,
    },
    /// What the kernels refuse, such as sizes that do not fit in memory.
    #[error(transparent)]
    Kernel(#[from] tutel_core::Error),
}

impl Error {
    pub(crate) fn option(option: &'static str, value: impl ToString, allowed: impl ToString) -> Self {
        Self::Option { option, value: value.to_string(), allowed: allowed.to_string() }
    }
}

/// Checks a slice against the shape that it should have.
pub(crate) fn check_shape(argument: &'static str, found: usize, shape: &[usize]) -> Result<(), Error> {
    let expected = tutel_core::checked_product(argument, shape)?;
    if found == expected { Ok(()) } else { Err(Error::Length { argument, shape: shape.to_vec(), expected, found }) }
}
