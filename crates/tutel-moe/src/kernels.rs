//! Every call of a kernel that the layer makes, with its sizes.
use tutel_core::{GroupedShape, RoutePlan, RoutingShape, RowShape, ScoreFunction};
use tutel_cpu::owned::{self, Selection};
use tutel_cpu::{GroupedGemm, Parallel, Scalar, SelectBackward};

use crate::Error;

/// One `[inner, outer]` matrix an expert.
#[derive(Clone, Copy)]
pub(crate) struct Matrices<'a, T> {
    /// `[E, inner, outer]`, or `[E, outer, inner]` when `transposed`.
    pub(crate) values: &'a [T],
    pub(crate) inner: usize,
    pub(crate) outer: usize,
    pub(crate) transposed: bool,
}

/// The kernels on somebody's threads.
#[derive(Clone, Copy)]
pub(crate) struct Kernels<'a>(pub(crate) &'a dyn Parallel);

impl Kernels<'_> {
    /// `rows[r] W_e + bias[e]`.
    pub(crate) fn linear<T: Scalar>(
        self,
        rows: &[T],
        weight: Matrices<'_, T>,
        bias: Option<&[T]>,
        offsets: &[i64],
    ) -> Result<Vec<T>, Error> {
        let Matrices { values, inner, outer, transposed } = weight;
        let shape = GroupedShape::new(offsets.len() - 1, rows.len() / inner, inner, outer)?;
        let input = GroupedGemm { rows, weight: values, bias, offsets, transposed };
        Ok(owned::grouped_gemm(input, shape, self.0)?)
    }

    /// Gradient of [`Self::linear`] in `rows`.
    pub(crate) fn linear_rows_grad<T: Scalar>(
        self,
        grad: &[T],
        weight: Matrices<'_, T>,
        offsets: &[i64],
    ) -> Result<Vec<T>, Error> {
        let Matrices { values, inner, outer, transposed } = weight;
        let reversed = Matrices { values, inner: outer, outer: inner, transposed: !transposed };
        self.linear(grad, reversed, None, offsets)
    }

    /// Gradient of [`Self::linear`] in `weight`, in the layout of `weight`.
    pub(crate) fn linear_weight_grad<T: Scalar>(
        self,
        rows: &[T],
        grad: &[T],
        weight: Matrices<'_, T>,
        offsets: &[i64],
    ) -> Result<Vec<T>, Error> {
        let Matrices { inner, outer, transposed, .. } = weight;
        let num_rows = rows.len() / inner;
        let (left, right, inner, outer) =
            if transposed { (grad, rows, outer, inner) } else { (rows, grad, inner, outer) };
        let shape = GroupedShape::new(offsets.len() - 1, num_rows, inner, outer)?;
        Ok(owned::grouped_gemm_weight_grad(left, right, offsets, shape, self.0)?)
    }

    /// Gradient of [`Self::linear`] in `bias`: the sum of each expert's rows of this width.
    pub(crate) fn linear_bias_grad<T: Scalar>(
        self,
        grad: &[T],
        width: usize,
        offsets: &[i64],
    ) -> Result<Vec<T>, Error> {
        Ok(owned::grouped_sum(grad, offsets, (grad.len() / width, width), self.0)?)
    }

    /// Each token's best experts, their scores being the softmax of the logits.
    pub(crate) fn select<T: Scalar>(
        self,
        logits: &[T],
        shape: RoutingShape,
        normalize: bool,
    ) -> Result<Selection<T::Accumulator>, Error> {
        Ok(owned::select_experts(logits, shape, ScoreFunction::Softmax, normalize, self.0)?)
    }

    /// Gradient of [`Self::select`] in `logits`.
    pub(crate) fn select_grad<T: Scalar>(
        self,
        logits: &[T],
        ids: &[i32],
        (grad_weights, grad_score_sums): (&[T::Accumulator], &[T::Accumulator]),
        shape: RoutingShape,
        normalize: bool,
    ) -> Result<Vec<T>, Error> {
        let input = SelectBackward {
            logits,
            ids,
            grad_weights: Some(grad_weights),
            grad_score_sums: Some(grad_score_sums),
            function: ScoreFunction::Softmax,
            normalize,
        };
        Ok(owned::select_experts_backward(&input, shape, self.0)?)
    }

    /// Where each choice goes.
    pub(crate) fn assign<T: Scalar>(
        selection: &Selection<T::Accumulator>,
        prioritized: bool,
        shape: RoutingShape,
        capacity: Option<usize>,
    ) -> Result<RoutePlan, Error> {
        let priority = prioritized.then_some(&selection.top_scores[..]);
        Ok(owned::assign_rows(&selection.ids, priority, shape, capacity)?)
    }

    /// Tokens of this width to rows, times the weights of their choices where given.
    pub(crate) fn dispatch<T: Scalar>(
        self,
        tokens: &[T],
        plan: &RoutePlan,
        weights: Option<&[T::Accumulator]>,
        shape: RowShape,
    ) -> Result<Vec<T>, Error> {
        Ok(owned::dispatch(tokens, &plan.row_choice, weights, shape, self.0)?)
    }

    /// Rows back to tokens, summed with the weights of their choices where given.
    pub(crate) fn combine<T: Scalar>(
        self,
        rows: &[T],
        plan: &RoutePlan,
        weights: Option<&[T::Accumulator]>,
        shape: RowShape,
    ) -> Result<Vec<T>, Error> {
        Ok(owned::combine(rows, &plan.row_index, weights, shape, self.0)?)
    }

    /// The inner product of each choice's row with its token: the gradient of the weights of dispatch and combine.
    pub(crate) fn row_dot<T: Scalar>(
        self,
        rows: &[T],
        plan: &RoutePlan,
        tokens: &[T],
        shape: RowShape,
    ) -> Result<Vec<T::Accumulator>, Error> {
        Ok(owned::row_dot(rows, &plan.row_index, tokens, shape, self.0)?)
    }
}
