//! Gradient of scores and top-k: the scores are recomputed from the logits, row by row.
use std::mem::MaybeUninit;

use num_traits::Zero;
use tutel_core::{Error, RoutingShape, ScoreFunction, check_len};

use crate::disjoint::Chunks;
use crate::parallel::{each_task, items_per_task};
use crate::select_experts::{divisor, score};
use crate::{Parallel, Scalar, lanes};

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

    /// Adds the gradient that reaches the chosen scores through the weights.
    fn add_weight_grad(&self, token: usize, top_k: usize, scores: &[T::Accumulator], grad: &mut [T::Accumulator]) {
        let Some(grad_weights) = self.grad_weights else { return };
        let choices = token * top_k..(token + 1) * top_k;
        let (ids, grad_weights) = (&self.ids[choices.clone()], &grad_weights[choices]);
        let chosen = || ids.iter().map(|&id| scores[id as usize]);
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
    let RoutingShape { tokens, experts, top_k } = shape;
    check_len("grad_logits", grad_logits.len(), tokens * experts)?;
    let block = items_per_task(experts);
    let tasks = tokens.div_ceil(block);
    let output = Chunks::new(grad_logits, block * experts, tasks);
    each_task(parallel, tasks, &|claimed| {
        let mut scores = vec![T::Accumulator::zero(); experts];
        let mut grad = scores.clone();
        let mut narrow = vec![T::default(); experts];
        for task in claimed {
            for (token, output) in (task * block..).zip(output.take(task).chunks_exact_mut(experts)) {
                T::widen_slice(&input.logits[token * experts..(token + 1) * experts], &mut scores);
                let largest = scores[input.ids[token * top_k] as usize];
                score(&mut scores, input.function, largest);
                match input.grad_score_sums {
                    Some(sums) => grad.copy_from_slice(sums),
                    None => grad.fill(T::Accumulator::zero()),
                }
                input.add_weight_grad(token, top_k, &scores, &mut grad);
                if input.function == ScoreFunction::Softmax {
                    let mean = lanes::dot(&scores, &grad);
                    for (grad, &score) in grad.iter_mut().zip(&scores) {
                        *grad = score * (*grad - mean);
                    }
                }
                T::narrow_slice(&grad, &mut narrow);
                output.write_copy_of_slice(&narrow);
            }
        }
    });
    Ok(())
}
