//! Sizes of the kernels' arguments, and the checks that all kernels share.
use std::ops::Range;

use crate::Error;

/// Sizes of the routing kernels: logits `[tokens, experts]`, choices `[tokens, top_k]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoutingShape {
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
}

impl RoutingShape {
    /// Checks 1 <= K <= E, that ids of E experts fit in int32, and that `[T, E]` fits in memory.
    ///
    /// # Errors
    /// [`Error::TopK`], [`Error::TooManyExperts`] or [`Error::Overflow`].
    pub fn new(tokens: usize, experts: usize, top_k: usize) -> Result<Self, Error> {
        if i32::try_from(experts).is_err() {
            return Err(Error::TooManyExperts { experts });
        }
        if top_k == 0 || top_k > experts {
            return Err(Error::TopK { top_k, experts });
        }
        checked_product("logits", &[tokens, experts])?;
        Ok(Self { tokens, experts, top_k })
    }

    /// T * K, which [`Self::new`] has checked.
    #[must_use]
    pub fn choices(&self) -> usize {
        self.tokens * self.top_k
    }
}

/// Sizes of dispatch, combine and row dot: tokens `[tokens, width]`, rows `[rows, width]`, choices `[tokens, top_k]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowShape {
    /// T.
    pub tokens: usize,
    /// R.
    pub rows: usize,
    /// D.
    pub width: usize,
    /// K.
    pub top_k: usize,
}

impl RowShape {
    /// Checks that each of the three arrays fits in memory.
    ///
    /// # Errors
    /// [`Error::Overflow`].
    pub fn new(tokens: usize, rows: usize, width: usize, top_k: usize) -> Result<Self, Error> {
        checked_product("tokens", &[tokens, width])?;
        checked_product("rows", &[rows, width])?;
        checked_product("choices", &[tokens, top_k])?;
        Ok(Self { tokens, rows, width, top_k })
    }

    /// T * K.
    #[must_use]
    pub fn choices(&self) -> usize {
        self.tokens * self.top_k
    }

    /// Checks that every row index is -1 (dropped) or names a row.
    ///
    /// # Errors
    /// [`Error::Length`] or [`Error::Index`].
    pub fn check_row_index(&self, row_index: &[i64]) -> Result<(), Error> {
        check_len("row_index", row_index.len(), self.choices())?;
        check_indices("row_index", row_index, self.rows)
    }

    /// Checks that every row's choice is -1 (empty row) or names a choice.
    ///
    /// # Errors
    /// [`Error::Length`] or [`Error::Index`].
    pub fn check_row_choice(&self, row_choice: &[i64]) -> Result<(), Error> {
        check_len("row_choice", row_choice.len(), self.rows)?;
        check_indices("row_choice", row_choice, self.choices())
    }
}

/// Sizes of the grouped products: rows `[rows, inner]` times one `[inner, outer]` matrix an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupedShape {
    /// E.
    pub experts: usize,
    /// R.
    pub rows: usize,
    /// Width of a row.
    pub inner: usize,
    /// Width of the result.
    pub outer: usize,
}

impl GroupedShape {
    /// Checks that rows, results and matrices fit in memory.
    ///
    /// # Errors
    /// [`Error::Overflow`].
    pub fn new(experts: usize, rows: usize, inner: usize, outer: usize) -> Result<Self, Error> {
        checked_product("rows", &[rows, inner])?;
        checked_product("output", &[rows, outer])?;
        checked_product("weight", &[experts, inner, outer])?;
        Ok(Self { experts, rows, inner, outer })
    }
}

/// The product of sizes.
///
/// # Errors
/// [`Error::Overflow`] where it exceeds `isize::MAX` (what a Rust slice can hold).
pub fn checked_product(what: &'static str, factors: &[usize]) -> Result<usize, Error> {
    factors
        .iter()
        .try_fold(1usize, |product, &factor| product.checked_mul(factor))
        .filter(|&product| isize::try_from(product).is_ok())
        .ok_or_else(|| Error::Overflow { what, factors: factors.to_vec() })
}

/// Checks a buffer's length.
///
/// # Errors
/// [`Error::Length`].
pub fn check_len(argument: &'static str, found: usize, expected: usize) -> Result<(), Error> {
    if found == expected { Ok(()) } else { Err(Error::Length { argument, expected, found }) }
}

fn check_indices(argument: &'static str, indices: &[i64], limit: usize) -> Result<(), Error> {
    let bad = |&index: &i64| index < -1 || (index >= 0 && index as u64 >= limit as u64);
    match indices.iter().position(bad) {
        None => Ok(()),
        Some(position) => Err(Error::Index {
            argument,
            position,
            value: indices[position],
            allowed: format!("-1 (none) and 0 up to, not including, {limit}"),
        }),
    }
}

/// Turns offsets `[experts + 1]` into one range of rows an expert.
///
/// # Errors
/// [`Error::Length`] or [`Error::Offsets`].
pub fn check_offsets(offsets: &[i64], experts: usize, rows: usize) -> Result<Vec<Range<usize>>, Error> {
    check_len("offsets", offsets.len(), experts + 1)?;
    let mut previous = 0;
    for (position, &value) in offsets.iter().enumerate() {
        let in_order = value >= previous && value as u64 <= rows as u64 && (position > 0 || value == 0);
        if !in_order {
            return Err(Error::Offsets { position, value, rows });
        }
        previous = value;
    }
    Ok(offsets.windows(2).map(|pair| pair[0] as usize..pair[1] as usize).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_cut_or_refused() {
        assert_eq!(check_offsets(&[0, 2, 2, 5], 3, 6).unwrap(), vec![0..2, 2..2, 2..5]);
        for (bad, position) in [([1, 2, 3], 0), ([0, 3, 2], 2), ([0, 2, 7], 2), ([0, -1, 2], 1)] {
            let error = check_offsets(&bad, 2, 6).unwrap_err();
            assert_eq!(error, Error::Offsets { position, value: bad[position], rows: 6 });
        }
        assert!(matches!(check_offsets(&[0, 1], 2, 6), Err(Error::Length { expected: 3, found: 2, .. })));
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let error = RowShape::new(usize::MAX / 2, 1, 3, 1).unwrap_err();
        assert!(error.to_string().contains("tokens is too large"), "{error}");
        assert!(RowShape::new(1 << 31, 1 << 33, 1 << 20, 8).is_ok(), "beyond 2^31 elements is normal");
    }

    #[test]
    fn top_k_is_between_one_and_the_experts() {
        for top_k in [0, 5] {
            let error = RoutingShape::new(3, 4, top_k).unwrap_err();
            assert_eq!(error, Error::TopK { top_k, experts: 4 });
        }
    }

    #[test]
    fn indices_name_the_first_bad_one() {
        let shape = RowShape::new(2, 3, 4, 2).unwrap();
        assert!(shape.check_row_index(&[0, -1, 2, 1]).is_ok());
        let error = shape.check_row_index(&[0, 3, -2, 1]).unwrap_err();
        assert_eq!(error.to_string(), "row_index[1] is 3, allowed are -1 (none) and 0 up to, not including, 3");
    }
}
