//! Slots, counts and rows of all choices.
//!
//! ```text
//! for choice j in 0..K, for token t in order:   slot[t, j] = count[id[t, j]]++
//! row[t, j] = offset[id[t, j]] + slot[t, j]     where the slot is below the capacity
//! ```
//! One thread: a few instructions a choice, and the order is what defines the result.
use std::mem::MaybeUninit;

use tutel_core::{Error, NOT_ROUTED, Real, RoutingShape, check_len};

use crate::disjoint::fill;

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
) -> Result<(), Error> {
    let RoutingShape { tokens, experts, top_k } = shape;
    check_len("topk_ids", ids.len(), shape.choices())?;
    check_ids(ids, experts)?;
    output.check(shape)?;
    let order = priority.map(|priority| service_order(priority, tokens)).transpose()?;

    let mut counts = vec![0i64; experts];
    let slots = fill(output.slots, -1);
    for choice in 0..top_k {
        for place in 0..tokens {
            let token = order.as_ref().map_or(place, |order| order[place]);
            let position = token * top_k + choice;
            if let Ok(expert) = usize::try_from(ids[position]) {
                slots[position] = i32::try_from(counts[expert]).map_err(|_| Error::SlotOverflow { expert })?;
                counts[expert] += 1;
            }
        }
        if choice == 0 {
            output.first_choices.write_copy_of_slice(&counts);
        }
    }
    output.tokens_per_expert.write_copy_of_slice(&counts);

    let limit = capacity.map_or(i64::MAX, |capacity| i64::try_from(capacity).unwrap_or(i64::MAX));
    let offsets = fill(output.offsets, 0);
    for (expert, &count) in counts.iter().enumerate() {
        offsets[expert + 1] = offsets[expert] + count.min(limit);
    }
    let row_choice = fill(output.row_choice, NOT_ROUTED);
    for (position, row_index) in output.row_index.iter_mut().enumerate() {
        let slot = i64::from(slots[position]);
        let row = if slot >= 0 && slot < limit { offsets[ids[position] as usize] + slot } else { NOT_ROUTED };
        if row >= 0 {
            row_choice[row as usize] = position as i64;
        }
        row_index.write(row);
    }
    Ok(())
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

fn service_order<A: Real>(priority: &[A], tokens: usize) -> Result<Vec<usize>, Error> {
    check_len("priority", priority.len(), tokens)?;
    let mut order: Vec<usize> = (0..tokens).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (priority[a], priority[b]);
        // Only NaN leaves two values without an order.
        b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
    });
    Ok(order)
}
