//! Every call of a kernel that the layer makes, with its sizes.
use std::sync::Mutex;

use tutel_core::{GroupedShape, Real, RoutePlan, RoutingShape, RowShape, ScoreFunction};
use tutel_cpu::owned::{self, HiddenGradients, KeptUnits, Selection};
use tutel_cpu::{GroupedGemm, Hidden, HiddenGrad, Parallel, RowsOf, Scalar, SelectBackward};

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

/// R, of rows of this width.
fn count<T>(rows: RowsOf<'_, T>, width: usize) -> usize {
    rows.index.map_or(rows.matrix.len() / width, <[usize]>::len)
}

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
        let input = GroupedGemm { rows: rows.into(), weight: values, second: None, bias, offsets, transposed };
        Ok(owned::grouped_gemm(input, shape, self.0)?)
    }

    /// Gradient of [`Self::linear`] in `rows`. `second` is the gradient and the weight, in the same layout, of another
    /// product that the rows enter.
    pub(crate) fn linear_rows_grad<T: Scalar>(
        self,
        grad: &[T],
        weight: Matrices<'_, T>,
        second: Option<(&[T], &[T])>,
        offsets: &[i64],
    ) -> Result<Vec<T>, Error> {
        let Matrices { values, inner, outer, transposed } = weight;
        let shape = GroupedShape::new(offsets.len() - 1, grad.len() / outer, outer, inner)?;
        let second = second.map(|(grad, weight)| (grad.into(), weight));
        let transposed = !transposed;
        let input = GroupedGemm { rows: grad.into(), weight: values, second, bias: None, offsets, transposed };
        Ok(owned::grouped_gemm(input, shape, self.0)?)
    }

    /// Gradient of [`Self::linear`] in `weight`, in the layout of `weight`.
    pub(crate) fn linear_weight_grad<T: Scalar>(
        self,
        rows: RowsOf<'_, T>,
        grad: RowsOf<'_, T>,
        weight: Matrices<'_, T>,
        offsets: &[i64],
    ) -> Result<Vec<T>, Error> {
        let Matrices { inner, outer, transposed, .. } = weight;
        let num_rows = count(rows, inner);
        let (left, right, inner, outer) =
            if transposed { (grad, rows, outer, inner) } else { (rows, grad, inner, outer) };
        let shape = GroupedShape::new(offsets.len() - 1, num_rows, inner, outer)?;
        Ok(owned::grouped_gemm_weight_grad(left, right, offsets, shape, self.0)?)
    }

    /// The experts' hidden units, `outer` of them from rows of width `inner`.
    pub(crate) fn hidden<T: Scalar>(
        self,
        input: Hidden<'_, T>,
        (inner, outer): (usize, usize),
    ) -> Result<Vec<T>, Error> {
        let shape = GroupedShape::new(input.offsets.len() - 1, count(input.rows, inner), inner, outer)?;
        Ok(owned::hidden(input, shape, self.0)?)
    }

    /// The same, and what [`Self::hidden_grad`] needs.
    pub(crate) fn hidden_kept<T: Scalar>(
        self,
        input: Hidden<'_, T>,
        (inner, outer): (usize, usize),
    ) -> Result<(Vec<T>, KeptUnits<T>), Error> {
        let shape = GroupedShape::new(input.offsets.len() - 1, count(input.rows, inner), inner, outer)?;
        Ok(owned::hidden_kept(input, shape, self.0)?)
    }

    /// Gradient of [`Self::hidden`], from that of outputs of width `inner`.
    pub(crate) fn hidden_grad<T: Scalar>(
        self,
        input: &HiddenGrad<'_, T>,
        (inner, outer): (usize, usize),
    ) -> Result<HiddenGradients<T, T::Accumulator>, Error> {
        let shape = GroupedShape::new(input.offsets.len() - 1, count(input.grad, inner), inner, outer)?;
        Ok(owned::hidden_grad(input, shape, self.0)?)
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
        self,
        selection: &Selection<T::Accumulator>,
        prioritized: bool,
        shape: RoutingShape,
        capacity: Option<usize>,
    ) -> Result<RoutePlan, Error> {
        let priority = prioritized.then_some(&selection.top_scores[..]);
        Ok(owned::assign_rows(&selection.ids, priority, shape, capacity, self.0)?)
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

    /// The inner product of the row that the index gives each choice with the choice's token; 0 where it gives none.
    pub(crate) fn row_dot<T: Scalar>(
        self,
        rows: &[T],
        row_index: &[i64],
        tokens: &[T],
        shape: RowShape,
    ) -> Result<Vec<T::Accumulator>, Error> {
        Ok(owned::row_dot(rows, row_index, tokens, shape, self.0)?)
    }

    /// `target += addend`.
    pub(crate) fn add<T: Scalar>(self, target: &mut [T], addend: &[T]) {
        // A few chunks in f64 still fit in the nearest cache.
        const CHUNK: usize = 2048;
        // Waking a thread costs about as much as this many elements.
        const LEAST: usize = 1 << 15;
        let threads = self.0.threads().min(target.len() / LEAST);
        let chunks = Mutex::new(target.chunks_mut(CHUNK).zip(addend.chunks(CHUNK)));
        let work = || {
            let next = || chunks.lock().expect("nothing panics while it is locked").next();
            let mut sums = [T::Accumulator::from_f64(0.0); CHUNK];
            let mut addends = sums;
            while let Some((target, addend)) = next() {
                let (sums, addends) = (&mut sums[..target.len()], &mut addends[..target.len()]);
                T::widen_slice(target, sums);
                T::widen_slice(addend, addends);
                sums.iter_mut().zip(addends).for_each(|(sum, addend)| *sum += *addend);
                T::narrow_slice(sums, target);
            }
        };
        if threads > 1 {
            self.0.run(threads, &work);
        }
        // Alone, or for what the others have left.
        work();
    }
}
