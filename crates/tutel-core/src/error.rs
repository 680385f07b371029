//! What can be wrong with the arguments of a kernel.

/// An argument that a kernel refuses. Every message names the argument, the value seen and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer does not have the number of elements that its shape asks for.
    #[error("{argument} has {found} elements, expected {expected}")]
    Length {
        /// The argument's name.
        argument: &'static str,
        /// Elements that the shape asks for.
        expected: usize,
        /// Elements seen.
        found: usize,
    },
    /// A product of sizes does not fit the address space.
    #[error("{what} is too large: {factors:?} elements do not fit in {} bits", usize::BITS)]
    Overflow {
        /// What was to be sized.
        what: &'static str,
        /// The sizes that were multiplied.
        factors: Vec<usize>,
    },
    /// More choices per token than experts, or none.
    #[error("top_k must be between 1 and the number of experts ({experts}), got {top_k}")]
    TopK {
        /// K as given.
        top_k: usize,
        /// E.
        experts: usize,
    },
    /// Expert ids are 32-bit integers.
    #[error("at most {} experts are supported, got {experts}", i32::MAX)]
    TooManyExperts {
        /// E as given.
        experts: usize,
    },
    /// An index outside its range.
    #[error("{argument}[{position}] is {value}, allowed are {allowed}")]
    Index {
        /// The argument's name.
        argument: &'static str,
        /// Position in the flattened argument.
        position: usize,
        /// The value seen.
        value: i64,
        /// The allowed values in words.
        allowed: String,
    },
    /// Offsets that do not cut the rows into one ascending range an expert.
    #[error(
        "offsets must start at 0, never decrease and end at most at the {rows} rows; offsets[{position}] is {value}"
    )]
    Offsets {
        /// Position of the first offset that breaks the rule.
        position: usize,
        /// Its value.
        value: i64,
        /// Number of rows.
        rows: usize,
    },
    /// An expert received more tokens than a 32-bit slot can count.
    #[error("expert {expert} received more than {} tokens, which slots (int32) cannot number", i32::MAX)]
    SlotOverflow {
        /// The expert.
        expert: usize,
    },
}
