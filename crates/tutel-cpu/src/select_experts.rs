//! Scores and top-k in one pass over the logits: nothing of size [T, E] is kept.
use std::mem::MaybeUninit;

use num_traits::{Float, One};
use tutel_core::{Element, Error, Real, RoutingShape, ScoreFunction, check_len};

use crate::arch::{Body, Features, Level, run_at};
use crate::disjoint::Chunks;
use crate::exponential::Exponential;
use crate::lanes::{Block, LANES, blocks_of, fold, widen_into};
use crate::parallel::{Tasks, each_task, items_per_task};
use crate::top_k::TopK;
use crate::{Parallel, Scalar};

/// Outputs of [`select_experts`].
pub struct SelectOutput<'a, A> {
    /// `[T, K]`: chosen experts, largest logit first; equal logits in ascending order of the id.
    pub ids: &'a mut [MaybeUninit<i32>],
    /// `[T, K]`: their scores, divided by their sum if asked for (K > 1 only).
    pub weights: &'a mut [MaybeUninit<A>],
    /// `[T]`: the largest score.
    pub top_scores: &'a mut [MaybeUninit<A>],
    /// `[E]`: scores summed over the tokens.
    pub score_sums: &'a mut [MaybeUninit<A>],
}

/// Chooses each token's K experts. NaN counts as the largest logit; a token with a NaN has NaN scores and ids in range.
///
/// # Errors
/// Lengths that do not agree with the shape.
pub fn select_experts<T: Scalar>(
    logits: &[T],
    shape: RoutingShape,
    function: ScoreFunction,
    normalize: bool,
    output: SelectOutput<'_, T::Accumulator>,
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    // A task keeps one row of score sums: enough tokens a task make these small against the logits.
    const LEAST_TOKENS: usize = 64;
    let RoutingShape { tokens, experts, top_k } = shape;
    check_len("logits", logits.len(), tokens * experts)?;
    check_len("topk_ids", output.ids.len(), shape.choices())?;
    check_len("topk_weights", output.weights.len(), shape.choices())?;
    check_len("top_scores", output.top_scores.len(), tokens)?;
    check_len("score_sums", output.score_sums.len(), experts)?;

    let block = items_per_task(experts).max(LEAST_TOKENS);
    let tasks = tokens.div_ceil(block);
    let blocks = experts.div_ceil(LANES);
    let mut partial_sums = blocks_of(tasks * blocks * LANES);
    let work = Select {
        logits,
        shape,
        function,
        normalize: normalize && top_k > 1,
        block,
        ids: Chunks::new(output.ids, block * top_k, tasks),
        weights: Chunks::new(output.weights, block * top_k, tasks),
        top_scores: Chunks::new(output.top_scores, block, tasks),
        sums: Chunks::new(&mut partial_sums, blocks, tasks),
    };
    let level = Level::current();
    each_task(parallel, tasks, &|claimed| run_at(level, Worker { work: &work, claimed }));
    let mut totals = blocks_of::<T::Accumulator>(experts);
    for sums in partial_sums.chunks_exact(blocks) {
        totals.as_flattened_mut().iter_mut().zip(sums.as_flattened()).for_each(|(total, &sum)| *total += sum);
    }
    output.score_sums.write_copy_of_slice(&totals.as_flattened()[..experts]);
    Ok(())
}

struct Select<'a, T: Scalar> {
    logits: &'a [T],
    shape: RoutingShape,
    function: ScoreFunction,
    normalize: bool,
    /// Tokens a task.
    block: usize,
    ids: Chunks<'a, MaybeUninit<i32>>,
    weights: Chunks<'a, MaybeUninit<T::Accumulator>>,
    top_scores: Chunks<'a, MaybeUninit<T::Accumulator>>,
    sums: Chunks<'a, Block<T::Accumulator>>,
}

struct Worker<'a, T: Scalar> {
    work: &'a Select<'a, T>,
    claimed: Tasks<'a>,
}

impl<T: Scalar> Body for Worker<'_, T> {
    #[inline(always)]
    fn run<F: Features>(self, features: F) {
        let Select { shape: RoutingShape { experts, top_k, .. }, function, normalize, block, .. } = *self.work;
        let mut row = blocks_of(experts);
        let mut top = TopK::new(top_k);
        for task in self.claimed {
            let mut ids = self.work.ids.take(task).chunks_exact_mut(top_k);
            let mut weights = self.work.weights.take(task).chunks_exact_mut(top_k);
            let sums = self.work.sums.take(task);
            let top_scores = self.work.top_scores.take(task);
            let logits = self.work.logits[task * block * experts..].chunks_exact(experts);
            for (((top_score, logits), ids), weights) in
                top_scores.iter_mut().zip(logits).zip(&mut ids).zip(&mut weights)
            {
                let padding = T::Accumulator::neg_infinity();
                widen_into(logits, padding, &mut row);
                let mut chosen = top.find(features, &row);
                let mut scale = raise(&mut row, function, chosen[0] as usize);
                // NaN among the logits, or infinities that make one, show in the sum of the powers.
                let with_nan = match function {
                    ScoreFunction::Softmax => scale.is_nan(),
                    ScoreFunction::Identity => has_nan(&row),
                };
                if with_nan {
                    widen_into(logits, padding, &mut row);
                    chosen = top.find_with_nan(&row.as_flattened()[..experts]);
                    scale = raise(&mut row, function, chosen[0] as usize);
                }
                for (sum, &power) in sums.as_flattened_mut().iter_mut().zip(row.as_flattened()) {
                    *sum += power * scale;
                }
                let score = |&id: &u32| row.as_flattened()[id as usize] * scale;
                top_score.write(score(&chosen[0]));
                let divisor = divisor::<T>(chosen.iter().map(score), normalize);
                for ((id, weight), chosen) in ids.iter_mut().zip(weights).zip(chosen) {
                    id.write(*chosen as i32);
                    weight.write(score(chosen) / divisor);
                }
            }
        }
    }
}

/// Turns logits into multiples of their scores, in place, and returns the factor that makes scores of them. Without
/// softmax that is 1. `largest` is the place of the largest logit.
#[inline(always)]
pub(crate) fn raise<A: Exponential>(row: &mut [Block<A>], function: ScoreFunction, largest: usize) -> A {
    if function == ScoreFunction::Identity {
        return A::one();
    }
    let largest = row.as_flattened()[largest];
    let mut sums = [A::zero(); LANES];
    for block in row {
        let mut powers = *block;
        for lane in 0..LANES {
            powers[lane] = (powers[lane] - largest).exp_of_nonpositive();
            sums[lane] += powers[lane];
        }
        *block = powers;
    }
    // The sum is at least 1, that of the largest logit.
    A::one() / fold(sums)
}

#[inline(always)]
fn has_nan<A: Real>(row: &[Block<A>]) -> bool {
    // A count, not a search, which would branch at every value.
    row.as_flattened().iter().map(|value| u32::from(value.is_nan())).sum::<u32>() > 0
}

/// What the chosen scores are divided by: their sum, at least the logits' epsilon.
#[inline(always)]
pub(crate) fn divisor<T: Element>(chosen: impl Iterator<Item = T::Accumulator>, normalize: bool) -> T::Accumulator {
    let least = T::Accumulator::from_f64(T::EPSILON);
    if !normalize {
        return T::Accumulator::one();
    }
    let sum: T::Accumulator = chosen.sum();
    // Not `max`, which would hide a NaN.
    if sum < least { least } else { sum }
}
