//! Scores and top-k in one pass over the logits: nothing of size [T, E] is kept.
use std::mem::MaybeUninit;

use num_traits::{Float, One, Zero};
use tutel_core::{Element, Error, Real, RoutingShape, ScoreFunction, check_len};

use crate::disjoint::Chunks;
use crate::exponential::Exponential;
use crate::parallel::{each_task, items_per_task};
use crate::{Parallel, Scalar, lanes};

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
    let ids = Chunks::new(output.ids, block * top_k, tasks);
    let weights = Chunks::new(output.weights, block * top_k, tasks);
    let top_scores = Chunks::new(output.top_scores, block, tasks);
    let mut partial_sums = vec![T::Accumulator::zero(); tasks * experts];
    let sums = Chunks::new(&mut partial_sums, experts, tasks);
    let normalize = normalize && top_k > 1;
    each_task(parallel, tasks, &|claimed| {
        let mut scores = vec![T::Accumulator::zero(); experts];
        let mut best = TopK::new(top_k);
        for task in claimed {
            let mut ids = ids.take(task).chunks_exact_mut(top_k);
            let mut weights = weights.take(task).chunks_exact_mut(top_k);
            let sums = sums.take(task);
            for (top_score, row) in
                top_scores.take(task).iter_mut().zip(logits[task * block * experts..].chunks_exact(experts))
            {
                T::widen_slice(row, &mut scores);
                best.find(&scores);
                score(&mut scores, function, best.keys[0]);
                for (sum, &score) in sums.iter_mut().zip(&scores) {
                    *sum += score;
                }
                top_score.write(scores[best.ids[0]]);
                let divisor = divisor::<T>(best.ids.iter().map(|&id| scores[id]), normalize);
                for (slot, &id) in ids.next().into_iter().flatten().zip(&best.ids) {
                    slot.write(id as i32);
                }
                for (slot, &id) in weights.next().into_iter().flatten().zip(&best.ids) {
                    slot.write(scores[id] / divisor);
                }
            }
        }
    });
    let mut totals = vec![T::Accumulator::zero(); experts];
    for sums in partial_sums.chunks_exact(experts) {
        totals.iter_mut().zip(sums).for_each(|(total, &sum)| *total += sum);
    }
    output.score_sums.write_copy_of_slice(&totals);
    Ok(())
}

/// Turns a row of logits into scores, in place. `largest` is the largest logit.
pub(crate) fn score<A: Exponential>(row: &mut [A], function: ScoreFunction, largest: A) {
    match function {
        ScoreFunction::Identity => {}
        ScoreFunction::Softmax => {
            for value in row.iter_mut() {
                *value = (*value - largest).exp_of_nonpositive();
            }
            let sum = lanes::sum(row);
            for value in row.iter_mut() {
                *value = *value / sum;
            }
        }
    }
}

/// What the chosen scores are divided by: their sum, at least the logits' epsilon.
pub(crate) fn divisor<T: Element>(chosen: impl Iterator<Item = T::Accumulator>, normalize: bool) -> T::Accumulator {
    let least = T::Accumulator::from_f64(T::EPSILON);
    if !normalize {
        return T::Accumulator::one();
    }
    let sum: T::Accumulator = chosen.sum();
    // Not `max`, which would hide a NaN.
    if sum < least { least } else { sum }
}

/// The K largest keys of a row and where they stand, in descending order.
struct TopK<A> {
    keys: Vec<A>,
    ids: Vec<usize>,
}

impl<A: Real> TopK<A> {
    fn new(top_k: usize) -> Self {
        Self { keys: vec![A::zero(); top_k], ids: vec![0; top_k] }
    }

    fn find(&mut self, row: &[A]) {
        // Keys are compared in blocks against the smallest chosen one; few blocks hold a larger key.
        const BLOCK: usize = 16;
        let top_k = self.keys.len();
        for (id, &key) in row[..top_k].iter().enumerate() {
            self.insert(id, key, id);
        }
        let mut first = top_k;
        for block in row[top_k..].chunks(BLOCK) {
            let smallest = self.keys[top_k - 1];
            // `!(key <= smallest)` also finds NaN; the bitwise or keeps the loop free of branches.
            #[expect(
                clippy::needless_bitwise_bool,
                clippy::neg_cmp_op_on_partial_ord,
                reason = "a lazy `or` would branch on every key, and NaN must count as larger"
            )]
            if block.iter().fold(false, |found, key| found | !(*key <= smallest)) {
                for (id, &key) in (first..).zip(block) {
                    if exceeds(key, self.keys[top_k - 1]) {
                        self.insert(top_k - 1, key, id);
                    }
                }
            }
            first += block.len();
        }
    }

    /// Puts a key in its place among the first `filled` keys; behind equal ones, which came with lower ids.
    fn insert(&mut self, filled: usize, key: A, id: usize) {
        let mut place = filled;
        while place > 0 && exceeds(key, self.keys[place - 1]) {
            self.keys[place] = self.keys[place - 1];
            self.ids[place] = self.ids[place - 1];
            place -= 1;
        }
        self.keys[place] = key;
        self.ids[place] = id;
    }
}

fn exceeds<A: Float>(a: A, b: A) -> bool {
    a > b || (a.is_nan() && !b.is_nan())
}
