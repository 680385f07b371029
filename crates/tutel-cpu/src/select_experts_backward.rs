//! Gradient of scores and top-k: the scores are recomputed from the logits, row by row.
use std::mem::MaybeUninit;

use num_traits::{Float, Zero};
use tutel_core::{Error, RoutingShape, ScoreFunction, check_len};

use crate::arch::{Body, Features, Level, run_at};
use crate::disjoint::Chunks;
use crate::lanes::{blocks_of, dot, narrow_into, widen_into};
use crate::parallel::{Tasks, each_task, items_per_task};
use crate::select_experts::{divisor, raise};
use crate::{Parallel, Scalar};

/// Inputs of [`select_experts_backward`].
#[derive(Debug, Clone, Copy)]
pub struct SelectBackward<'a, T: Scalar> {
    /// `[T, E]`.
    pub logits: &'a [T],
    /// `[T, K]`, as chosen in the forward pass.
    pub ids: &'a [i32],
    /// `[T, K]`: gradient of the weights.
    pub grad_weights: Option<&'a [T::Accumulator]>,
    /// `[E]`: gradient of the score sums.
    pub grad_score_sums: Option<&'a [T::Accumulator]>,
    /// How logits became scores.
    pub function: ScoreFunction,
    /// Whether weights were divided by their sum.
    pub normalize: bool,
}

impl<T: Scalar> SelectBackward<'_, T> {
    fn check(&self, shape: RoutingShape) -> Result<(), Error> {
        check_len("logits", self.logits.len(), shape.tokens * shape.experts)?;
        check_len("topk_ids", self.ids.len(), shape.choices())?;
        if let Some(grad) = self.grad_weights {
            check_len("grad_weights", grad.len(), shape.choices())?;
        }
        if let Some(grad) = self.grad_score_sums {
            check_len("grad_score_sums", grad.len(), shape.experts)?;
        }
        match self.ids.iter().position(|&id| id < 0 || id as usize >= shape.experts) {
            None => Ok(()),
            Some(position) => Err(Error::Index {
                argument: "topk_ids",
                position,
                value: self.ids[position].into(),
                allowed: format!("0 up to, not including, {}", shape.experts),
            }),
        }
    }

    /// Adds the gradient that reaches the chosen scores through the weights. Scores are the row times the scale.
    #[inline(always)]
    fn add_weight_grad(
        &self,
        token: usize,
        ids: &[i32],
        (row, scale): (&[T::Accumulator], T::Accumulator),
        grad: &mut [T::Accumulator],
    ) {
        let top_k = ids.len();
        let Some(grad_weights) = self.grad_weights else { return };
        let grad_weights = &grad_weights[token * top_k..][..top_k];
        let chosen = || ids.iter().map(|&id| row[id as usize] * scale);
        let normalize = self.normalize && top_k > 1;
        let divisor = divisor::<T>(chosen(), normalize);
        let sum: T::Accumulator = chosen().sum();
        // Below the least divisor the divisor is a constant; else it depends on every chosen score.
        let at_least_divisor = sum < divisor;
        let through_divisor = if normalize && !at_least_divisor {
            chosen().zip(grad_weights).map(|(score, &grad)| grad * (score / divisor)).sum()
        } else {
            T::Accumulator::zero()
        };
        for (&id, &grad_weight) in ids.iter().zip(grad_weights) {
            grad[id as usize] += (grad_weight - through_divisor) / divisor;
        }
    }
}

/// Gradient of the logits, `[T, E]`.
///
/// # Errors
/// Lengths that do not agree with the shape, ids out of range.
pub fn select_experts_backward<T: Scalar>(
    input: &SelectBackward<'_, T>,
    shape: RoutingShape,
    grad_logits: &mut [MaybeUninit<T>],
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    input.check(shape)?;
    let RoutingShape { tokens, experts, .. } = shape;
    check_len("grad_logits", grad_logits.len(), tokens * experts)?;
    let block = items_per_task(experts);
    let tasks = tokens.div_ceil(block);
    let output = Chunks::new(grad_logits, block * experts, tasks);
    let level = Level::current();
    each_task(parallel, tasks, &|claimed| run_at(level, Worker { input, shape, block, output: &output, claimed }));
    Ok(())
}

struct Worker<'a, T: Scalar> {
    input: &'a SelectBackward<'a, T>,
    shape: RoutingShape,
    /// Tokens a task.
    block: usize,
    output: &'a Chunks<'a, MaybeUninit<T>>,
    claimed: Tasks<'a>,
}

impl<T: Scalar> Body for Worker<'_, T> {
    #[inline(always)]
    fn run<F: Features>(self, _: F) {
        let Self { input, shape: RoutingShape { experts, top_k, .. }, block, output, claimed } = self;
        let mut row = blocks_of(experts);
        // What reaches every token's scores; each token adds its own part and takes it away again.
        let mut base = blocks_of(experts);
        if let Some(sums) = input.grad_score_sums {
            widen_into(sums, T::Accumulator::zero(), &mut base);
        }
        let mut grad = base.clone();
        for task in claimed {
            for (token, output) in (task * block..).zip(output.take(task).chunks_exact_mut(experts)) {
                let ids = &input.ids[token * top_k..(token + 1) * top_k];
                widen_into(&input.logits[token * experts..][..experts], T::Accumulator::neg_infinity(), &mut row);
                let scale = raise(&mut row, input.function, ids[0] as usize);
                input.add_weight_grad(token, ids, (row.as_flattened(), scale), grad.as_flattened_mut());
                if input.function == ScoreFunction::Softmax {
                    let mean = dot(&row, &grad) * scale;
                    for (power, &grad) in row.as_flattened_mut().iter_mut().zip(grad.as_flattened()) {
                        *power = *power * scale * (grad - mean);
                    }
                } else {
                    row.copy_from_slice(&grad);
                }
                narrow_into(&row, output);
                for &id in ids {
                    grad.as_flattened_mut()[id as usize] = base.as_flattened()[id as usize];
                }
            }
        }
    }
}
