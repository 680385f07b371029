//! The naive twin of every kernel: plain loops, right by eye, one accumulator a sum, no early exits.
//!
//! Run in f64 it is the truth that kernels are compared with; run in the kernel's own type it says how large an
//! error plain arithmetic makes there. Arguments are as in the kernels of `tutel-cpu`, sizes are trusted.
use num_traits::{Float, One, Zero};

use crate::{Element, Error, GroupedShape, NOT_ROUTED, Real, RoutePlan, RoutingShape, RowShape, ScoreFunction};

/// What [`select_experts`] finds for each token.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection<A> {
    /// `[T, K]`: chosen experts, best first.
    pub ids: Vec<i32>,
    /// `[T, K]`: their scores, normalised over the choices if asked for.
    pub weights: Vec<A>,
    /// `[T]`: the largest score.
    pub top_scores: Vec<A>,
    /// `[E]`: scores summed over the tokens.
    pub score_sums: Vec<A>,
}

fn scores_of<T: Element>(logits: &[T], function: ScoreFunction) -> Vec<T::Accumulator> {
    let logits: Vec<T::Accumulator> = logits.iter().map(|x| x.widen()).collect();
    match function {
        ScoreFunction::Identity => logits,
        ScoreFunction::Softmax => {
            let largest = logits.iter().copied().fold(T::Accumulator::neg_infinity(), T::Accumulator::max);
            let powers: Vec<_> = logits.iter().map(|&x| (x - largest).exp()).collect();
            let sum: T::Accumulator = powers.iter().copied().sum();
            powers.iter().map(|&x| x / sum).collect()
        }
    }
}

/// NaN counts as the largest value, as in torch.
fn exceeds<A: Real>(a: A, b: A) -> bool {
    a > b || (a.is_nan() && !b.is_nan())
}

fn top_ids<A: Real>(keys: &[A], top_k: usize) -> Vec<usize> {
    let mut ids = Vec::new();
    for _ in 0..top_k {
        let mut best: Option<usize> = None;
        for id in (0..keys.len()).filter(|id| !ids.contains(id)).collect::<Vec<_>>() {
            if best.is_none_or(|best| exceeds(keys[id], keys[best])) {
                best = Some(id);
            }
        }
        ids.extend(best);
    }
    ids
}

/// K largest logits of each token (ties go to the lower id) and their scores.
#[must_use]
pub fn select_experts<T: Element>(
    logits: &[T],
    shape: RoutingShape,
    function: ScoreFunction,
    normalize: bool,
) -> Selection<T::Accumulator> {
    let RoutingShape { experts, top_k, .. } = shape;
    let zero = T::Accumulator::zero();
    let mut found = Selection { ids: vec![], weights: vec![], top_scores: vec![], score_sums: vec![zero; experts] };
    for row in logits.chunks_exact(experts) {
        let keys: Vec<T::Accumulator> = row.iter().map(|x| x.widen()).collect();
        let scores = scores_of(row, function);
        let ids = top_ids(&keys, top_k);
        let chosen: Vec<_> = ids.iter().map(|&id| scores[id]).collect();
        found.top_scores.push(chosen[0]);
        found.weights.extend(normalized::<T>(&chosen, normalize && top_k > 1));
        found.ids.extend(ids.iter().map(|&id| id as i32));
        for (sum, &score) in found.score_sums.iter_mut().zip(&scores) {
            *sum += score;
        }
    }
    found
}

fn normalized<T: Element>(chosen: &[T::Accumulator], normalize: bool) -> Vec<T::Accumulator> {
    let sum: T::Accumulator = chosen.iter().copied().sum();
    let least = T::Accumulator::from_f64(T::EPSILON);
    let divisor = match normalize {
        false => T::Accumulator::one(),
        true if sum < least => least,
        true => sum,
    };
    chosen.iter().map(|&score| score / divisor).collect()
}

/// Gradient of [`select_experts`] with respect to the logits, from those of the weights and of the score sums.
#[must_use]
pub fn select_experts_backward<T: Element>(
    logits: &[T],
    ids: &[i32],
    grad_weights: &[T::Accumulator],
    grad_score_sums: &[T::Accumulator],
    shape: RoutingShape,
    function: ScoreFunction,
    normalize: bool,
) -> Vec<T::Accumulator> {
    let RoutingShape { experts, top_k, .. } = shape;
    let least = T::Accumulator::from_f64(T::EPSILON);
    let mut grad_logits = Vec::new();
    for (token, row) in logits.chunks_exact(experts).enumerate() {
        let scores = scores_of(row, function);
        let choices = token * top_k..(token + 1) * top_k;
        let (ids, grad_weights) = (&ids[choices.clone()], &grad_weights[choices]);
        let mut grad_scores = grad_score_sums.to_vec();
        let chosen: Vec<_> = ids.iter().map(|&id| scores[id as usize]).collect();
        let sum: T::Accumulator = chosen.iter().copied().sum();
        let weights = normalized::<T>(&chosen, normalize && top_k > 1);
        let inner: T::Accumulator = grad_weights.iter().zip(&weights).map(|(&g, &w)| g * w).sum();
        for (&id, &grad) in ids.iter().zip(grad_weights) {
            grad_scores[id as usize] += match normalize && top_k > 1 {
                false => grad,
                true if sum < least => grad / least,
                true => (grad - inner) / sum,
            };
        }
        match function {
            ScoreFunction::Identity => grad_logits.extend(grad_scores),
            ScoreFunction::Softmax => {
                let mean: T::Accumulator = scores.iter().zip(&grad_scores).map(|(&p, &g)| p * g).sum();
                grad_logits.extend(scores.iter().zip(&grad_scores).map(|(&p, &g)| p * (g - mean)));
            }
        }
    }
    grad_logits
}

/// Slots of all choices (first choices before second ones; within a choice token order, or descending priority) and
/// the rows of those below the capacity.
///
/// # Errors
/// [`Error::Index`] for an id that is neither -1 nor an expert.
pub fn assign_rows(
    ids: &[i32],
    priority: Option<&[f64]>,
    shape: RoutingShape,
    capacity: Option<usize>,
) -> Result<RoutePlan, Error> {
    let RoutingShape { tokens, experts, top_k } = shape;
    let mut order: Vec<usize> = (0..tokens).collect();
    if let Some(priority) = priority {
        // Stable; NaN comes last.
        order.sort_by(|&a, &b| {
            let key = |t: usize| if priority[t].is_nan() { f64::NEG_INFINITY } else { priority[t] };
            let by_nan = priority[a].is_nan().cmp(&priority[b].is_nan());
            by_nan.then(key(b).total_cmp(&key(a)))
        });
    }
    let mut slots = vec![-1; tokens * top_k];
    let mut tokens_per_expert = vec![0i64; experts];
    let mut first_choices = vec![0i64; experts];
    for choice in 0..top_k {
        for &token in &order {
            let position = token * top_k + choice;
            let id = ids[position];
            if id == -1 {
                continue;
            }
            if id < 0 || id as usize >= experts {
                let allowed = format!("-1 (none) and 0 up to, not including, {experts}");
                return Err(Error::Index { argument: "topk_ids", position, value: id.into(), allowed });
            }
            slots[position] = tokens_per_expert[id as usize] as i32;
            tokens_per_expert[id as usize] += 1;
            first_choices[id as usize] += i64::from(choice == 0);
        }
    }
    let mut offsets = vec![0i64];
    for &count in &tokens_per_expert {
        let kept = capacity.map_or(count, |capacity| count.min(capacity as i64));
        offsets.push(offsets[offsets.len() - 1] + kept);
    }
    let mut row_index = vec![NOT_ROUTED; tokens * top_k];
    let mut row_choice = vec![NOT_ROUTED; tokens * top_k];
    for position in 0..tokens * top_k {
        let slot = slots[position];
        if slot >= 0 && capacity.is_none_or(|capacity| (slot as usize) < capacity) {
            let row = offsets[ids[position] as usize] + i64::from(slot);
            row_index[position] = row;
            row_choice[row as usize] = position as i64;
        }
    }
    Ok(RoutePlan { slots, tokens_per_expert, first_choices, offsets, row_index, row_choice })
}

/// Row of each choice, and choice of each row, where every expert owns `capacity` rows: `(row_index, row_choice)`.
#[must_use]
pub fn padded_rows(ids: &[i32], slots: &[i32], shape: RoutingShape, capacity: usize) -> (Vec<i64>, Vec<i64>) {
    let mut row_index = vec![NOT_ROUTED; shape.choices()];
    let mut row_choice = vec![NOT_ROUTED; shape.experts * capacity];
    for position in 0..shape.choices() {
        if ids[position] >= 0 && slots[position] >= 0 && (slots[position] as usize) < capacity {
            let row = ids[position] as usize * capacity + slots[position] as usize;
            row_index[position] = row as i64;
            row_choice[row] = position as i64;
        }
    }
    (row_index, row_choice)
}

/// Cumulative sums of a `[rows, columns]` mask, minus 1: down the columns, or along the rows.
#[must_use]
pub fn prefix_count(mask: &[i64], rows: usize, columns: usize, along_rows: bool) -> Vec<i64> {
    let mut output = mask.to_vec();
    for row in 0..rows {
        for column in 0..columns {
            let before = if along_rows {
                column.checked_sub(1).map(|column| output[row * columns + column])
            } else {
                row.checked_sub(1).map(|row| output[row * columns + column])
            };
            output[row * columns + column] += before.unwrap_or(-1);
        }
    }
    output
}

/// `rows[r] = weights[c] * tokens[c / K]` with `c = row_choice[r]`; zero where there is none.
#[must_use]
pub fn dispatch<T: Element>(
    tokens: &[T],
    row_choice: &[i64],
    weights: Option<&[T::Accumulator]>,
    shape: RowShape,
) -> Vec<T::Accumulator> {
    let mut rows = Vec::new();
    for &choice in row_choice {
        for column in 0..shape.width {
            rows.push(if choice < 0 {
                T::Accumulator::zero()
            } else {
                let value = tokens[choice as usize / shape.top_k * shape.width + column].widen();
                weights.map_or(value, |weights| weights[choice as usize] * value)
            });
        }
    }
    rows
}

/// `output[t] = sum_j weights[t, j] * rows[row_index[t, j]]` over the kept choices.
#[must_use]
pub fn combine<T: Element>(
    rows: &[T],
    row_index: &[i64],
    weights: Option<&[T::Accumulator]>,
    shape: RowShape,
) -> Vec<T::Accumulator> {
    let mut output = Vec::new();
    for token in 0..shape.tokens {
        for column in 0..shape.width {
            let mut sum = T::Accumulator::zero();
            for choice in token * shape.top_k..(token + 1) * shape.top_k {
                if row_index[choice] >= 0 {
                    let value = rows[row_index[choice] as usize * shape.width + column].widen();
                    sum += weights.map_or(value, |weights| weights[choice] * value);
                }
            }
            output.push(sum);
        }
    }
    output
}

/// `output[t, j] = rows[row_index[t, j]] . tokens[t]`; zero where the choice is dropped.
#[must_use]
pub fn row_dot<T: Element>(rows: &[T], row_index: &[i64], tokens: &[T], shape: RowShape) -> Vec<T::Accumulator> {
    let mut output = Vec::new();
    for (choice, &row) in row_index.iter().enumerate() {
        let mut sum = T::Accumulator::zero();
        if row >= 0 {
            for column in 0..shape.width {
                let token = choice / shape.top_k;
                sum += rows[row as usize * shape.width + column].widen() * tokens[token * shape.width + column].widen();
            }
        }
        output.push(sum);
    }
    output
}

/// `output[r] = rows[r] W_e (+ bias[e])` for the expert e that owns row r; zero for rows behind the last offset.
/// `W_e` is `[inner, outer]`, or `[outer, inner]` when `transposed`.
#[must_use]
pub fn grouped_gemm<T: Element>(
    rows: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    offsets: &[i64],
    shape: GroupedShape,
    transposed: bool,
) -> Vec<T::Accumulator> {
    let GroupedShape { experts, inner, outer, .. } = shape;
    let mut output = vec![T::Accumulator::zero(); shape.rows * outer];
    for expert in 0..experts {
        let weight = &weight[expert * inner * outer..(expert + 1) * inner * outer];
        for row in offsets[expert] as usize..offsets[expert + 1] as usize {
            for column in 0..outer {
                let mut sum = T::Accumulator::zero();
                for i in 0..inner {
                    let w = if transposed { weight[column * inner + i] } else { weight[i * outer + column] };
                    sum += rows[row * inner + i].widen() * w.widen();
                }
                if let Some(bias) = bias {
                    sum += bias[expert * outer + column].widen();
                }
                output[row * outer + column] = sum;
            }
        }
    }
    output
}

/// `output[e] = left_e^T right_e`, `[inner, outer]`, over the rows of expert e: left `[R, inner]`, right `[R, outer]`.
#[must_use]
pub fn grouped_gemm_weight_grad<T: Element>(
    left: &[T],
    right: &[T],
    offsets: &[i64],
    shape: GroupedShape,
) -> Vec<T::Accumulator> {
    let GroupedShape { experts, inner, outer, .. } = shape;
    let mut output = Vec::new();
    for expert in 0..experts {
        for i in 0..inner {
            for o in 0..outer {
                let mut sum = T::Accumulator::zero();
                for row in offsets[expert] as usize..offsets[expert + 1] as usize {
                    sum += left[row * inner + i].widen() * right[row * outer + o].widen();
                }
                output.push(sum);
            }
        }
    }
    output
}

/// `output[e] = sum of the rows of expert e`, `[E, width]`.
#[must_use]
pub fn grouped_sum<T: Element>(rows: &[T], offsets: &[i64], width: usize) -> Vec<T::Accumulator> {
    let mut output = Vec::new();
    for range in offsets.windows(2) {
        for column in 0..width {
            let owned = range[0] as usize..range[1] as usize;
            output.push(owned.map(|row| rows[row * width + column].widen()).sum());
        }
    }
    output
}
