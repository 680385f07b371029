//! Views of matrices, and how each element type enters a product that accumulates in the accumulator type.
use std::ops::Range;

use num_traits::Zero;
use tutel_core::Element;

/// A block of a row-major matrix.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T> {
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

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    pub(crate) fn data(&self) -> &'a [T] {
        self.data
    }

    fn row(&self, row: usize) -> &'a [T] {
        &self.data[row * self.stride..row * self.stride + self.columns]
    }
}

/// An element type that matrix products take.
pub trait Operand: Element {
    /// How many rows or columns of an operand a task takes at most: half types are widened block by block, so that
    /// the widened block stays in the second-level cache.
    const BLOCK: usize;
    /// How much of the summed-over dimension is taken at once, for the same reason.
    const DEPTH: usize;

    /// The block in the accumulator type; half types are widened into `scratch`.
    fn widened<'a>(block: View<'a, Self>, scratch: &'a mut Vec<Self::Accumulator>) -> View<'a, Self::Accumulator>;
}

macro_rules! as_it_stands {
    ($($t:ty),*) => { $(
        impl Operand for $t {
            const BLOCK: usize = 512;
            const DEPTH: usize = usize::MAX;
            fn widened<'a>(block: View<'a, $t>, _scratch: &'a mut Vec<$t>) -> View<'a, $t> {
                block
            }
        }
    )* };
}
as_it_stands!(f32, f64);

macro_rules! widened_first {
    ($($t:ty),*) => { $(
        impl Operand for $t {
            const BLOCK: usize = 256;
            const DEPTH: usize = 1024;
            fn widened<'a>(block: View<'a, $t>, scratch: &'a mut Vec<f32>) -> View<'a, f32> {
                let View { rows, columns, .. } = block;
                if columns > 0 {
                    scratch.resize(rows * columns, f32::zero());
                    for (row, target) in scratch.chunks_exact_mut(columns).enumerate() {
                        <$t>::widen_slice(block.row(row), target);
                    }
                }
                View::block(scratch, columns, 0..rows, 0..columns)
            }
        }
    )* };
}
widened_first!(half::bf16, half::f16);
