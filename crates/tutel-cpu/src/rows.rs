//! Rows that need not stand where they are read.
use std::ops::Range;

use tutel_core::{Error, check_len};

use crate::operand::{Factor, View};

/// Rows `[R, width]`, or those rows of a matrix `[N, width]` that an index names.
#[derive(Debug, Clone, Copy)]
pub struct RowsOf<'a, T> {
    /// The matrix, row-major.
    pub matrix: &'a [T],
    /// `[R]`: row of the matrix for each row; without it, the matrix's own rows.
    pub index: Option<&'a [usize]>,
}

impl<'a, T> From<&'a [T]> for RowsOf<'a, T> {
    fn from(matrix: &'a [T]) -> Self {
        Self { matrix, index: None }
    }
}

impl<'a, T> From<&'a Vec<T>> for RowsOf<'a, T> {
    fn from(matrix: &'a Vec<T>) -> Self {
        Self { matrix, index: None }
    }
}

impl<'a, T> RowsOf<'a, T> {
    pub(crate) fn check(&self, argument: &'static str, rows: usize, width: usize) -> Result<(), Error> {
        let Some(index) = self.index else { return check_len(argument, self.matrix.len(), rows * width) };
        check_len(argument, index.len(), rows)?;
        let height = self.matrix.len().checked_div(width).unwrap_or(usize::MAX);
        match index.iter().position(|&row| row >= height) {
            None => Ok(()),
            Some(position) => Err(Error::Index {
                argument,
                position,
                value: index[position] as i64,
                allowed: format!("0 up to, not including, {height}"),
            }),
        }
    }

    /// Some rows and columns as a factor of a product.
    pub(crate) fn factor(&self, width: usize, rows: Range<usize>, columns: Range<usize>) -> Factor<'a, T> {
        let view = match self.index {
            None => View::block(self.matrix, width, rows, columns),
            Some(index) => View::gathered(self.matrix, width, &index[rows], columns),
        };
        Factor { view, transposed: false }
    }
}
