//! Slots, counts and rows of all choices.
//!
//! ```text
//! for choice j in 0..K, for token t in order:   slot[t, j] = count[id[t, j]]++
//! row[t, j] = offset[id[t, j]] + slot[t, j]     where the slot is below the capacity
//! ```
//! Threads take blocks of tokens: each counts its choices, the counts are added up in the order of service, and each
//! walks its block again from there.
use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;

use tutel_core::{Error, NOT_ROUTED, Real, RoutingShape, check_len};

use crate::Parallel;
use crate::disjoint::{Chunks, fill, shared};
use crate::parallel::{each_task, items_per_task};

/// Outputs of [`assign_rows`]; see [`tutel_core::RoutePlan`] for their meaning.
pub struct AssignOutput<'a> {
    /// `[T, K]`.
    pub slots: &'a mut [MaybeUninit<i32>],
    /// `[E]`.
    pub tokens_per_expert: &'a mut [MaybeUninit<i64>],
    /// `[E]`.
    pub first_choices: &'a mut [MaybeUninit<i64>],
    /// `[E + 1]`.
    pub offsets: &'a mut [MaybeUninit<i64>],
    /// `[T, K]`.
    pub row_index: &'a mut [MaybeUninit<i64>],
    /// `[T * K]`.
    pub row_choice: &'a mut [MaybeUninit<i64>],
}

impl AssignOutput<'_> {
    fn check(&self, shape: RoutingShape) -> Result<(), Error> {
        check_len("slots", self.slots.len(), shape.choices())?;
        check_len("tokens_per_expert", self.tokens_per_expert.len(), shape.experts)?;
        check_len("first_choices", self.first_choices.len(), shape.experts)?;
        check_len("offsets", self.offsets.len(), shape.experts + 1)?;
        check_len("row_index", self.row_index.len(), shape.choices())?;
        check_len("row_choice", self.row_choice.len(), shape.choices())
    }
}

/// Gives every choice a slot in its expert and, below the capacity, a row. An id of -1 takes part in nothing.
/// With priorities `[T]`, tokens are served in their descending order (stable, NaN last) within each choice.
///
/// # Errors
/// Lengths that do not agree with the shape, ids out of range, more than 2^31 - 1 tokens for one expert.
pub fn assign_rows<A: Real>(
    ids: &[i32],
    priority: Option<&[A]>,
    shape: RoutingShape,
    capacity: Option<usize>,
    output: AssignOutput<'_>,
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    check_len("topk_ids", ids.len(), shape.choices())?;
    check_ids(ids, shape.experts)?;
    output.check(shape)?;
    let order = priority.map(|priority| service_order(priority, shape.tokens)).transpose()?;
    let slots = fill(output.slots, NOT_ROUTED as i32);
    // A block has more choices than it keeps counts, and is worth a thread.
    let least = items_per_task(1).max(4 * shape.top_k * shape.experts);
    let blocks = if order.is_some() { 1 } else { (ids.len() / least).min(parallel.threads()) };
    let counts = match blocks {
        0 | 1 => serve_in_order(ids, order.as_deref(), shape, slots),
        _ => serve_in_blocks(ids, blocks, shape, slots, parallel),
    };
    if let Some(expert) = counts.all.iter().position(|&count| i32::try_from(count).is_err()) {
        return Err(Error::SlotOverflow { expert });
    }
    output.first_choices.write_copy_of_slice(&counts.of_first);
    output.tokens_per_expert.write_copy_of_slice(&counts.all);

    let limit = capacity.map_or(i64::MAX, |capacity| i64::try_from(capacity).unwrap_or(i64::MAX));
    let offsets = fill(output.offsets, 0);
    for (expert, &count) in counts.all.iter().enumerate() {
        offsets[expert + 1] = offsets[expert] + count.min(limit);
    }
    let row_choice = shared(fill(output.row_choice, NOT_ROUTED));
    let block = items_per_task(1);
    let tasks = ids.len().div_ceil(block);
    let row_index = Chunks::new(output.row_index, block, tasks);
    each_task(parallel, tasks, &|claimed| {
        for task in claimed {
            let first = task * block;
            for ((position, row_index), &slot) in (first..).zip(row_index.take(task)).zip(&slots[first..]) {
                let slot = i64::from(slot);
                let row = if slot >= 0 && slot < limit { offsets[ids[position] as usize] + slot } else { NOT_ROUTED };
                if row >= 0 {
                    // Relaxed: each row has one choice, and the end of the loop is what orders memory.
                    row_choice[row as usize].store(position as i64, Ordering::Relaxed);
                }
                row_index.write(row);
            }
        }
    });
    Ok(())
}

/// Choices of each expert: the first ones, and all.
struct Counts {
    of_first: Vec<i64>,
    all: Vec<i64>,
}

/// One thread serves all choices, in the order that is given or in that of the tokens.
fn serve_in_order(ids: &[i32], order: Option<&[usize]>, shape: RoutingShape, slots: &mut [i32]) -> Counts {
    let mut all = vec![0i64; shape.experts];
    let mut of_first = Vec::new();
    for choice in 0..shape.top_k {
        for place in 0..shape.tokens {
            let token = order.map_or(place, |order| order[place]);
            let position = token * shape.top_k + choice;
            if let Ok(expert) = usize::try_from(ids[position]) {
                slots[position] = all[expert] as i32;
                all[expert] += 1;
            }
        }
        if choice == 0 {
            of_first.clone_from(&all);
        }
    }
    Counts { of_first, all }
}

/// Threads serve blocks of tokens, each choice from the number of those that come before it in other blocks.
fn serve_in_blocks(
    ids: &[i32],
    blocks: usize,
    shape: RoutingShape,
    slots: &mut [i32],
    parallel: &dyn Parallel,
) -> Counts {
    let RoutingShape { tokens, experts, top_k } = shape;
    let block = tokens.div_ceil(blocks) * top_k;
    // [blocks, K, E]: counts, then the sums of those that come before.
    let mut before = vec![0i64; blocks * top_k * experts];
    let counts = Chunks::new(&mut before, top_k * experts, blocks);
    let slots = Chunks::new(slots, block, blocks);
    each_task(parallel, blocks, &|claimed| {
        for task in claimed {
            let counts = counts.take(task);
            for ids in ids.chunks(block).nth(task).into_iter().flat_map(|ids| ids.chunks_exact(top_k)) {
                for (&id, counts) in ids.iter().zip(counts.chunks_exact_mut(experts)) {
                    if let Ok(expert) = usize::try_from(id) {
                        counts[expert] += 1;
                    }
                }
            }
        }
    });
    let mut all = vec![0; experts];
    let mut of_first = Vec::new();
    for choice in 0..top_k {
        for block in 0..blocks {
            let counts = &mut before[(block * top_k + choice) * experts..][..experts];
            for (total, count) in all.iter_mut().zip(counts) {
                (*total, *count) = (*total + *count, *total);
            }
        }
        if choice == 0 {
            of_first.clone_from(&all);
        }
    }
    let next = Chunks::new(&mut before, top_k * experts, blocks);
    each_task(parallel, blocks, &|claimed| {
        for task in claimed {
            let next = next.take(task);
            let slots = slots.take(task).chunks_exact_mut(top_k);
            for (slots, ids) in slots.zip(ids[(task * block).min(ids.len())..].chunks_exact(top_k)) {
                for ((slot, &id), next) in slots.iter_mut().zip(ids).zip(next.chunks_exact_mut(experts)) {
                    if let Ok(expert) = usize::try_from(id) {
                        *slot = next[expert] as i32;
                        next[expert] += 1;
                    }
                }
            }
        }
    });
    Counts { of_first, all }
}

/// Checks that each id is -1 or names an expert.
pub(crate) fn check_ids(ids: &[i32], experts: usize) -> Result<(), Error> {
    let limit = u32::try_from(experts).unwrap_or(u32::MAX);
    let bad = |id: &i32| id.wrapping_add(1).cast_unsigned() > limit;
    // Counting vectorises; a search would not.
    if ids.iter().filter(|id| bad(id)).count() == 0 {
        return Ok(());
    }
    ids.iter().position(bad).map_or(Ok(()), |position| {
        let allowed = format!("-1 (none) and 0 up to, not including, {experts}");
        Err(Error::Index { argument: "topk_ids", position, value: ids[position].into(), allowed })
    })
}

/// The tokens in descending order of their priority, NaN last; equal ones in their order.
fn service_order<A: Real>(priority: &[A], tokens: usize) -> Result<Vec<usize>, Error> {
    check_len("priority", priority.len(), tokens)?;
    // Integers in the reverse order of the numbers, which sort fast: negative numbers by their bits, before them others by
    // the complement. Zero is added to make a negative zero positive.
    let key = |value: A| match (value + A::zero()).to_f64() {
        value if value.is_nan() => u64::MAX,
        value if value.is_sign_negative() => value.to_bits(),
        value => i64::MAX as u64 - value.to_bits(),
    };
    let mut order: Vec<(u64, usize)> = priority.iter().map(|&value| key(value)).zip(0..).collect();
    order.sort_unstable();
    Ok(order.into_iter().map(|(_, token)| token).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_descend_with_ties_in_order_and_nan_last() {
        let priority = [0.0, f32::NAN, -0.0, 1.0, f32::NEG_INFINITY, -1.0, f32::INFINITY, -f32::NAN, 1.5, 1.0];
        assert_eq!(service_order(&priority, 10).unwrap(), [6, 8, 3, 9, 0, 2, 5, 4, 1, 7]);
        let close = [1.0, 1.0 + f64::EPSILON, -1.0, -1.0 - f64::EPSILON];
        assert_eq!(service_order(&close, 4).unwrap(), [1, 0, 2, 3]);
    }
}
