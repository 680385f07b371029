//! Arithmetic on sizes and strides, by torch's rules.

use crate::Error;

/// Number of elements, given that all their bytes can be counted in both Rust's and torch's signed integers.
pub(crate) fn count(sizes: &[usize], element_size: usize) -> Result<usize, Error> {
    if sizes.contains(&0) {
        return Ok(0);
    }
    sizes
        .iter()
        .try_fold(element_size, |bytes, &size| bytes.checked_mul(size))
        .filter(|&bytes| isize::try_from(bytes).is_ok())
        .map(|bytes| bytes / element_size)
        .ok_or_else(|| Error::Size { sizes: sizes.to_vec() })
}

/// The sizes, then torch's row-major strides (where an empty dimension counts as one long).
pub(crate) fn contiguous_layout(sizes: &[usize], element_size: usize) -> Result<Vec<i64>, Error> {
    let at_least_one: Vec<usize> = sizes.iter().map(|&size| size.max(1)).collect();
    // Everything below fits, because the product of it all does.
    count(&at_least_one, element_size).map_err(|_| Error::Size { sizes: sizes.to_vec() })?;
    let mut layout: Vec<i64> = sizes.iter().map(|&size| size as i64).collect();
    layout.resize(2 * sizes.len(), 1);
    let mut stride = 1;
    for (slot, &size) in layout[sizes.len()..].iter_mut().zip(&at_least_one).rev() {
        *slot = stride;
        stride *= size as i64;
    }
    Ok(layout)
}

/// torch's rule: strides of dimensions with one element do not matter, and an empty tensor is contiguous.
pub(crate) fn is_contiguous(sizes: &[i64], strides: &[i64]) -> bool {
    if sizes.contains(&0) {
        return true;
    }
    let mut expected = 1_i64;
    sizes.iter().zip(strides).rev().all(|(&size, &stride)| {
        let fits = size == 1 || stride == expected;
        expected = expected.saturating_mul(size);
        fits
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_are_torchs() {
        assert_eq!(contiguous_layout(&[], 4).unwrap(), []);
        assert_eq!(contiguous_layout(&[2, 3, 4], 4).unwrap(), [2, 3, 4, 12, 4, 1]);
        assert_eq!(contiguous_layout(&[2, 0, 4], 4).unwrap(), [2, 0, 4, 4, 4, 1]);
    }

    #[test]
    fn sizes_that_overflow_are_refused_by_name() {
        for sizes in [&[usize::MAX][..], &[1 << 40, 1 << 40], &[1 << 61], &[0, usize::MAX]] {
            let error = contiguous_layout(sizes, 4).unwrap_err();
            assert!(error.to_string().contains(&format!("{sizes:?}")), "{error}");
        }
        assert!(contiguous_layout(&[1 << 60], 4).is_ok());
        assert_eq!(count(&[0, usize::MAX, 2], 1).unwrap(), 0);
        assert_eq!(count(&[], 8).unwrap(), 1);
    }

    #[test]
    fn contiguity_is_torchs() {
        for (sizes, strides, expected) in [
            (&[][..], &[][..], true),
            (&[2, 3], &[3, 1], true),
            (&[2, 3], &[1, 2], false),
            (&[1, 3], &[77, 1], true),
            (&[3, 1], &[1, 77], true),
            (&[0, 3], &[9, 9], true),
            (&[2, 3], &[6, 2], false),
            (&[2, 3], &[0, 0], false),
        ] {
            assert_eq!(is_contiguous(sizes, strides), expected, "{sizes:?} {strides:?}");
        }
    }
}
