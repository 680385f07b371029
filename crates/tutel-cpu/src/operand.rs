//! Views of matrices as factors of products.
use std::ops::Range;

use tutel_core::Element;

use crate::arch::{Level, Scratch};
use crate::epilogue::Epilogue;
use crate::exponential::Exponential;

/// A block of a row-major matrix, or of some of its rows in any order.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a, T> {
    /// Begins with the block's first element, or with the matrix where rows are gathered.
    data: &'a [T],
    rows: usize,
    columns: usize,
    stride: usize,
    gathered: Option<Gathered<'a>>,
}

#[derive(Debug, Clone, Copy)]
struct Gathered<'a> {
    /// Row of the matrix for each row of the view.
    index: &'a [usize],
    first_column: usize,
}

impl<'a, T> View<'a, T> {
    /// Rows and columns of a whole matrix with `stride` columns.
    pub(crate) fn block(matrix: &'a [T], stride: usize, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(columns.end <= stride, "columns {columns:?} of a matrix with {stride} columns");
        let (rows_len, columns_len) = (rows.len(), columns.len());
        if rows_len == 0 || columns_len == 0 {
            return Self { data: &[], rows: rows_len, columns: columns_len, stride, gathered: None };
        }
        // Slicing checks the bounds of the first and of the last element.
        let data = &matrix[rows.start * stride + columns.start..(rows.end - 1) * stride + columns.end];
        Self { data, rows: rows_len, columns: columns_len, stride, gathered: None }
    }

    /// Some rows of a whole matrix, one for each index, and some of its columns.
    pub(crate) fn gathered(matrix: &'a [T], stride: usize, index: &'a [usize], columns: Range<usize>) -> Self {
        assert!(columns.end <= stride, "columns {columns:?} of a matrix with {stride} columns");
        let gathered = Some(Gathered { index, first_column: columns.start });
        Self { data: matrix, rows: index.len(), columns: columns.len(), stride, gathered }
    }

    /// Part of one row.
    ///
    /// # Panics
    /// When it leaves the view.
    #[inline]
    pub(crate) fn row(&self, row: usize, columns: Range<usize>) -> &'a [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert!(columns.end <= self.columns, "columns {columns:?} of {}", self.columns);
        let start = match self.gathered {
            None => row * self.stride,
            Some(Gathered { index, first_column }) => index[row] * self.stride + first_column,
        };
        &self.data[start + columns.start..start + columns.end]
    }

    /// How far apart neighbouring rows are, if all are equally far apart.
    pub(crate) fn stride(&self) -> Option<usize> {
        self.gathered.is_none().then_some(self.stride)
    }

    /// Where a block of the view begins, whose rows are [`View::stride`] apart.
    ///
    /// # Panics
    /// When the block is empty or leaves the view, or rows are gathered.
    pub(crate) fn pointer(&self, row: usize, column: usize, rows: usize, columns: usize) -> *const T {
        assert!(self.gathered.is_none(), "gathered rows are no block");
        assert!(rows > 0 && row + rows <= self.rows, "rows {row} + {rows} of {}", self.rows);
        assert!(columns > 0 && column + columns <= self.columns, "columns {column} + {columns} of {}", self.columns);
        self.data[row * self.stride + column..].as_ptr()
    }
}

/// A view as a factor: as it stands, or transposed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factor<'a, T> {
    pub(crate) view: View<'a, T>,
    pub(crate) transposed: bool,
}

impl<T> Factor<'_, T> {
    pub(crate) fn rows(&self) -> usize {
        if self.transposed { self.view.columns } else { self.view.rows }
    }

    pub(crate) fn columns(&self) -> usize {
        if self.transposed { self.view.rows } else { self.view.columns }
    }
}

/// `left right`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Term<'a, T> {
    pub(crate) left: Factor<'a, T>,
    pub(crate) right: Factor<'a, T>,
}

/// An element type that matrix products take.
pub(crate) trait Operand: Element<Accumulator: Exponential> {
    /// Gives the epilogue the sum of the terms, which have one shape; `next` is the right factor of the product after this
    /// one, to have it read meanwhile.
    fn multiply(
        level: Level,
        scratch: &mut Scratch<Self::Accumulator>,
        terms: &[Term<'_, Self>],
        next: Option<Factor<'_, Self>>,
        epilogue: &mut Epilogue<'_, Self>,
    );
}
