//! The kernels with their results in new vectors, for callers without memory of their own to fill.
//!
//! The kernels themselves write to `&mut [MaybeUninit<T>]`, of which safe code cannot make a vector; here is the one
//! place that does. Arguments and errors are those of the kernel of the same name.
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

use tutel_core::{Error, GroupedShape, Real, RoutePlan, RoutingShape, RowShape, ScoreFunction, checked_product};

use crate::{
    AssignOutput, GroupedGemm, Hidden, HiddenGrad, HiddenGradOutput, HiddenOutput, Parallel, RowsOf, Scalar,
    SelectBackward, SelectOutput,
};

/// What [`select_experts`] finds; see [`SelectOutput`].
#[derive(Debug, Clone, PartialEq)]
pub struct Selection<A> {
    /// `[T, K]`: chosen experts, largest logit first.
    pub ids: Vec<i32>,
    /// `[T, K]`: their scores, divided by their sum if asked for.
    pub weights: Vec<A>,
    /// `[T]`: the largest score.
    pub top_scores: Vec<A>,
    /// `[E]`: scores summed over the tokens.
    pub score_sums: Vec<A>,
}

/// What [`hidden_grad`] needs of the forward pass; see [`HiddenOutput`].
#[derive(Debug, Clone, PartialEq)]
pub struct KeptUnits<T> {
    /// `[R, outer]`.
    pub pre: Vec<T>,
    /// `[R, outer]`, of gated experts.
    pub value: Option<Vec<T>>,
}

/// What [`hidden_grad`] finds; see [`HiddenGradOutput`].
#[derive(Debug, Clone, PartialEq)]
pub struct HiddenGradients<T, A> {
    /// `[R, outer]`.
    pub grad_pre: Vec<T>,
    /// `[R, outer]`, of gated experts.
    pub grad_value: Option<Vec<T>>,
    /// `[R, outer]`: the hidden units, times the routing weights where these are given.
    pub hidden: Vec<T>,
    /// `[R]`, where routing weights are given.
    pub dots: Option<Vec<A>>,
}

/// Memory for a kernel's output.
fn uninit<T>(factors: &[usize]) -> Result<Vec<MaybeUninit<T>>, Error> {
    let len = checked_product("output", factors)?;
    let mut buffer = Vec::new();
    let too_large = |_| Error::Overflow { what: "output", factors: factors.to_vec() };
    buffer.try_reserve_exact(len).map_err(too_large)?;
    buffer.resize_with(len, MaybeUninit::uninit);
    Ok(buffer)
}

/// The shape, of which somebody may have set the fields: without a choice kernels would leave outputs unwritten.
fn checked(shape: RoutingShape) -> Result<RoutingShape, Error> {
    RoutingShape::new(shape.tokens, shape.experts, shape.top_k)
}

/// The same memory after a kernel has succeeded on all of it. Only the functions below may call this, which run kernels
/// on [`Checked`] threads.
fn written<T>(buffer: Vec<MaybeUninit<T>>) -> Vec<T> {
    let buffer = Box::into_raw(buffer.into_boxed_slice());
    // SAFETY: `MaybeUninit<T>` has the layout of `T`, and a kernel that returns Ok has written every element of its
    // output: all its workers have come to their ends. The box was given up just before, so that the memory has one
    // owner again.
    unsafe { Box::from_raw(buffer as *mut [T]) }.into_vec()
}

/// The caller's threads, of which it is made sure that they do what [`Parallel`] says: anybody may implement that
/// without `unsafe`, so no memory may be taken for written on its word.
struct Checked<'a>(&'a dyn Parallel);

impl Parallel for Checked<'_> {
    fn threads(&self) -> usize {
        self.0.threads().max(1)
    }

    /// # Panics
    /// When a worker has begun and not come to its end.
    fn run(&self, workers: usize, worker: &(dyn Fn() + Sync)) {
        let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let counted = || {
            begun.fetch_add(1, Ordering::Relaxed);
            worker();
            ended.fetch_add(1, Ordering::Relaxed);
        };
        self.0.run(workers, &counted);
        // A worker ends when no task is left to take, so one that ends is enough, if those that began have ended too.
        if begun.load(Ordering::Relaxed) == 0 {
            counted();
        }
        let (begun, ended) = (begun.into_inner(), ended.into_inner());
        assert!(begun == ended, "Parallel::run returned although {ended} of {begun} workers have ended");
    }
}

/// [`crate::select_experts()`] into new vectors.
///
/// # Errors
/// As the kernel.
pub fn select_experts<T: Scalar>(
    logits: &[T],
    shape: RoutingShape,
    function: ScoreFunction,
    normalize: bool,
    parallel: &dyn Parallel,
) -> Result<Selection<T::Accumulator>, Error> {
    let shape = checked(shape)?;
    let choices = [shape.tokens, shape.top_k];
    let (mut ids, mut weights) = (uninit(&choices)?, uninit(&choices)?);
    let (mut top_scores, mut score_sums) = (uninit(&[shape.tokens])?, uninit(&[shape.experts])?);
    let output =
        SelectOutput { ids: &mut ids, weights: &mut weights, top_scores: &mut top_scores, score_sums: &mut score_sums };
    crate::select_experts(logits, shape, function, normalize, output, &Checked(parallel))?;
    Ok(Selection {
        ids: written(ids),
        weights: written(weights),
        top_scores: written(top_scores),
        score_sums: written(score_sums),
    })
}

/// [`crate::select_experts_backward()`] into new vectors.
///
/// # Errors
/// As the kernel.
pub fn select_experts_backward<T: Scalar>(
    input: &SelectBackward<'_, T>,
    shape: RoutingShape,
    parallel: &dyn Parallel,
) -> Result<Vec<T>, Error> {
    let mut output = uninit(&[shape.tokens, shape.experts])?;
    crate::select_experts_backward(input, shape, &mut output, &Checked(parallel))?;
    Ok(written(output))
}

/// [`crate::assign_rows()`] into new vectors.
///
/// # Errors
/// As the kernel.
pub fn assign_rows<A: Real>(
    ids: &[i32],
    priority: Option<&[A]>,
    shape: RoutingShape,
    capacity: Option<usize>,
    parallel: &dyn Parallel,
) -> Result<RoutePlan, Error> {
    let shape = checked(shape)?;
    let (choices, experts) = ([shape.tokens, shape.top_k], [shape.experts]);
    let (mut slots, mut row_index, mut row_choice) = (uninit(&choices)?, uninit(&choices)?, uninit(&choices)?);
    let (mut tokens_per_expert, mut first_choices) = (uninit(&experts)?, uninit(&experts)?);
    let mut offsets = uninit(&[shape.experts + 1])?;
    let output = AssignOutput {
        slots: &mut slots,
        tokens_per_expert: &mut tokens_per_expert,
        first_choices: &mut first_choices,
        offsets: &mut offsets,
        row_index: &mut row_index,
        row_choice: &mut row_choice,
    };
    crate::assign_rows(ids, priority, shape, capacity, output, &Checked(parallel))?;
    Ok(RoutePlan {
        slots: written(slots),
        tokens_per_expert: written(tokens_per_expert),
        first_choices: written(first_choices),
        offsets: written(offsets),
        row_index: written(row_index),
        row_choice: written(row_choice),
    })
}

/// [`crate::dispatch()`] into new vectors.
///
/// # Errors
/// As the kernel.
pub fn dispatch<T: Scalar>(
    tokens: &[T],
    row_choice: &[i64],
    weights: Option<&[T::Accumulator]>,
    shape: RowShape,
    parallel: &dyn Parallel,
) -> Result<Vec<T>, Error> {
    let mut rows = uninit(&[shape.rows, shape.width])?;
    crate::dispatch(tokens, row_choice, weights, shape, &mut rows, &Checked(parallel))?;
    Ok(written(rows))
}

/// [`crate::combine()`] into new vectors.
///
/// # Errors
/// As the kernel.
pub fn combine<T: Scalar>(
    rows: &[T],
    row_index: &[i64],
    weights: Option<&[T::Accumulator]>,
    shape: RowShape,
    parallel: &dyn Parallel,
) -> Result<Vec<T>, Error> {
    let mut tokens = uninit(&[shape.tokens, shape.width])?;
    crate::combine(rows, row_index, weights, shape, &mut tokens, &Checked(parallel))?;
    Ok(written(tokens))
}

/// [`crate::row_dot()`] into new vectors.
///
/// # Errors
/// As the kernel.
pub fn row_dot<T: Scalar>(
    rows: &[T],
    row_index: &[i64],
    tokens: &[T],
    shape: RowShape,
    parallel: &dyn Parallel,
) -> Result<Vec<T::Accumulator>, Error> {
    let mut dots = uninit(&[shape.tokens, shape.top_k])?;
    crate::row_dot(rows, row_index, tokens, shape, &mut dots, &Checked(parallel))?;
    Ok(written(dots))
}

/// [`crate::grouped_gemm()`] into new vectors.
///
/// # Errors
/// As the kernel.
pub fn grouped_gemm<T: Scalar>(
    input: GroupedGemm<'_, T>,
    shape: GroupedShape,
    parallel: &dyn Parallel,
) -> Result<Vec<T>, Error> {
    let mut output = uninit(&[shape.rows, shape.outer])?;
    crate::grouped_gemm(input, shape, &mut output, &Checked(parallel))?;
    Ok(written(output))
}

/// [`crate::grouped_gemm_weight_grad()`] into new vectors.
///
/// # Errors
/// As the kernel.
pub fn grouped_gemm_weight_grad<T: Scalar>(
    left: RowsOf<'_, T>,
    right: RowsOf<'_, T>,
    offsets: &[i64],
    shape: GroupedShape,
    parallel: &dyn Parallel,
) -> Result<Vec<T>, Error> {
    let mut output = uninit(&[shape.experts, shape.inner, shape.outer])?;
    crate::grouped_gemm_weight_grad(left, right, offsets, shape, &mut output, &Checked(parallel))?;
    Ok(written(output))
}

/// [`crate::hidden()`] into a new vector, without what the backward pass needs.
///
/// # Errors
/// As the kernel.
pub fn hidden<T: Scalar>(input: Hidden<'_, T>, shape: GroupedShape, parallel: &dyn Parallel) -> Result<Vec<T>, Error> {
    let mut hidden = uninit(&[shape.rows, shape.outer])?;
    let output = HiddenOutput { hidden: &mut hidden, pre: None, value: None };
    crate::hidden(input, shape, output, &Checked(parallel))?;
    Ok(written(hidden))
}

/// [`crate::hidden()`] into new vectors: the hidden units, and what the backward pass needs.
///
/// # Errors
/// As the kernel.
pub fn hidden_kept<T: Scalar>(
    input: Hidden<'_, T>,
    shape: GroupedShape,
    parallel: &dyn Parallel,
) -> Result<(Vec<T>, KeptUnits<T>), Error> {
    let output = || uninit(&[shape.rows, shape.outer]);
    let (mut hidden, mut pre) = (output()?, output()?);
    // Without a gate the kernel would write no values.
    let mut value = input.value_weight.map(|_| output()).transpose()?;
    let output = HiddenOutput { hidden: &mut hidden, pre: Some(&mut pre), value: value.as_deref_mut() };
    crate::hidden(input, shape, output, &Checked(parallel))?;
    Ok((written(hidden), KeptUnits { pre: written(pre), value: value.map(written) }))
}

/// [`crate::hidden_grad()`] into new vectors: the gradient of the value where there is one, the dots where there are
/// weights.
///
/// # Errors
/// As the kernel.
pub fn hidden_grad<T: Scalar>(
    input: &HiddenGrad<'_, T>,
    shape: GroupedShape,
    parallel: &dyn Parallel,
) -> Result<HiddenGradients<T, T::Accumulator>, Error> {
    let output = || uninit(&[shape.rows, shape.outer]);
    let (mut grad_pre, mut hidden) = (output()?, output()?);
    let mut grad_value = input.value.map(|_| output()).transpose()?;
    let mut dots = input.weights.map(|_| uninit(&[shape.rows])).transpose()?;
    let output = HiddenGradOutput {
        grad_pre: &mut grad_pre,
        grad_value: grad_value.as_deref_mut(),
        hidden: Some(&mut hidden),
        dots: dots.as_deref_mut(),
    };
    crate::hidden_grad(input, shape, output, &Checked(parallel))?;
    Ok(HiddenGradients {
        grad_pre: written(grad_pre),
        grad_value: grad_value.map(written),
        hidden: written(hidden),
        dots: dots.map(written),
    })
}

/// [`crate::grouped_sum()`] into new vectors.
///
/// # Errors
/// As the kernel.
pub fn grouped_sum<T: Scalar>(
    rows: &[T],
    offsets: &[i64],
    (num_rows, width): (usize, usize),
    parallel: &dyn Parallel,
) -> Result<Vec<T>, Error> {
    let mut output = uninit(&[offsets.len().saturating_sub(1), width])?;
    crate::grouped_sum(rows, offsets, (num_rows, width), &mut output, &Checked(parallel))?;
    Ok(written(output))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Serial;

    /// Breaks the trait's promises in safe code.
    struct Idle(usize);

    impl Parallel for Idle {
        fn threads(&self) -> usize {
            self.0
        }
        fn run(&self, _workers: usize, _worker: &(dyn Fn() + Sync)) {}
    }

    /// Hides that a worker has not ended.
    struct Hushing;

    impl Parallel for Hushing {
        fn threads(&self) -> usize {
            2
        }
        fn run(&self, _workers: usize, worker: &(dyn Fn() + Sync)) {
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(worker));
        }
    }

    #[test]
    fn threads_that_do_nothing_leave_nothing_unwritten() {
        let (tokens, choices): (Vec<f32>, Vec<i64>) = ((0..300_000).map(|i| i as f32).collect(), (0..3000).collect());
        let shape = RowShape::new(3000, 3000, 100, 1).unwrap();
        for threads in [0, 2] {
            let rows = dispatch(&tokens, &choices, None, shape, &Idle(threads)).unwrap();
            assert!(rows == dispatch(&tokens, &choices, None, shape, &Serial).unwrap());
        }
    }

    #[test]
    fn a_shape_without_choices_is_refused() {
        let shape = RoutingShape { tokens: 2, experts: 3, top_k: 0 };
        assert_eq!(
            assign_rows::<f32>(&[], None, shape, None, &Serial).unwrap_err(),
            Error::TopK { top_k: 0, experts: 3 }
        );
    }

    #[test]
    #[should_panic(expected = "0 of 1 workers have ended")]
    fn a_worker_that_did_not_end_is_noticed() {
        Checked(&Hushing).run(2, &|| panic!("hushed up"));
    }
}
