//! One thread's matrix product, by the `gemm` crate (which finds AVX2 and AVX-512 at run time).
use tutel_core::Real;

use crate::operand::View;

/// A view as a factor: as it stands, or transposed.
#[derive(Clone, Copy)]
pub(crate) struct Factor<'a, A> {
    pub(crate) view: View<'a, A>,
    pub(crate) transposed: bool,
}

impl<A> Factor<'_, A> {
    fn rows(&self) -> usize {
        if self.transposed { self.view.columns() } else { self.view.rows() }
    }
    fn columns(&self) -> usize {
        if self.transposed { self.view.rows() } else { self.view.columns() }
    }
    /// Distance of neighbours in a column, and in a row.
    fn strides(&self) -> (isize, isize) {
        // A slice holds at most isize::MAX bytes, and the view lies in one.
        let stride = self.view.stride() as isize;
        if self.transposed { (1, stride) } else { (stride, 1) }
    }
}

/// `output (+)= left right` for a dense row-major output.
///
/// A product with one row would take a path of the crate that adds in another order than products with more rows; it
/// is computed with its row twice, so that a token's bits do not change when it is alone.
pub(crate) fn multiply<A: Real>(output: &mut [A], left: Factor<'_, A>, right: Factor<'_, A>, accumulate: bool) {
    let (rows, inner, columns) = (left.rows(), left.columns(), right.columns());
    assert_eq!(inner, right.rows(), "inner sizes of a product");
    assert_eq!(output.len(), rows * columns, "size of a product");
    if inner == 0 || output.is_empty() {
        if !accumulate {
            output.fill(A::zero());
        }
        return;
    }
    if rows == 1 {
        let mut twice = vec![A::zero(); 2 * columns];
        let (_, left_columns) = left.strides();
        product(&mut twice, (2, inner, columns), left.view.data(), (0, left_columns), right, false);
        for (output, &value) in output.iter_mut().zip(&twice) {
            *output = if accumulate { *output + value } else { value };
        }
    } else {
        product(output, (rows, inner, columns), left.view.data(), left.strides(), right, accumulate);
    }
}

fn product<A: Real>(
    output: &mut [A],
    (rows, inner, columns): (usize, usize, usize),
    left: &[A],
    (left_row, left_column): (isize, isize),
    right: Factor<'_, A>,
    accumulate: bool,
) {
    let (right_row, right_column) = right.strides();
    // SAFETY: `A` is f32 or f64 (the only `Real`s), which the crate computes with. `output` is exclusively borrowed and
    // has rows * columns elements, checked by the caller. The strides come from views whose constructor has checked
    // that their last element lies in their slice, so every element (i, j) of both factors does (a left row stride of
    // 0 reads the first row again).
    unsafe {
        gemm::gemm(
            rows,
            columns,
            inner,
            output.as_mut_ptr(),
            1,
            columns as isize,
            accumulate,
            left.as_ptr(),
            left_column,
            left_row,
            right.view.data().as_ptr(),
            right_column,
            right_row,
            A::one(),
            A::one(),
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
