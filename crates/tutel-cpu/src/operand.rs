//! Views of matrices as factors of products.
use std::ops::Range;

use tutel_core::Element;

use crate::arch::{Level, Scratch};

/// A block of a row-major matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a, T> {
    /// Starts at the block's first element and reaches at least to its last.
    data: &'a [T],
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<'a, T> View<'a, T> {
    /// Rows and columns of a whole matrix with `stride` columns.
    pub(crate) fn block(matrix: &'a [T], stride: usize, rows: Range<usize>, columns: Range<usize>) -> Self {
        assert!(columns.end <= stride, "columns {columns:?} of a matrix with {stride} columns");
        let (rows_len, columns_len) = (rows.len(), columns.len());
        if rows_len == 0 || columns_len == 0 {
            return Self { data: &[], rows: rows_len, columns: columns_len, stride };
        }
        // Slicing checks the bounds of the first and of the last element.
        let data = &matrix[rows.start * stride + columns.start..(rows.end - 1) * stride + columns.end];
        Self { data, rows: rows_len, columns: columns_len, stride }
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Where a block of the view begins.
    ///
    /// # Panics
    /// When the block is empty or leaves the view.
    pub(crate) fn pointer(&self, row: usize, column: usize, rows: usize, columns: usize) -> *const T {
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

/// An element type that matrix products take.
pub(crate) trait Operand: Element {
    /// Leaves `left right` in `scratch`, summed in the accumulator type.
    fn multiply(
        level: Level,
        scratch: &mut Scratch<Self::Accumulator>,
        left: Factor<'_, Self>,
        right: Factor<'_, Self>,
    );
}
