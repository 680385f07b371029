//! Rows of a padded layout: every expert owns `capacity` rows, filled or not.
use std::mem::MaybeUninit;

use tutel_core::{Error, NOT_ROUTED, RoutingShape, check_len, checked_product};

use crate::assign_rows::check_ids;
use crate::disjoint::fill;

/// Row of (token t, choice j) is `ids[t, j] * capacity + slots[t, j]`; -1 where the id is -1, or the slot is negative or
/// not below the capacity. `row_choice` `[E * capacity]` is the inverse, -1 where a row is empty; where two choices
/// claim one row, the later keeps it.
///
/// # Errors
/// Lengths that do not agree with the shape, ids out of range.
pub fn padded_rows(
    ids: &[i32],
    slots: &[i32],
    shape: RoutingShape,
    capacity: usize,
    row_index: &mut [MaybeUninit<i64>],
    row_choice: &mut [MaybeUninit<i64>],
) -> Result<(), Error> {
    let rows = checked_product("padded rows", &[shape.experts, capacity])?;
    check_len("topk_ids", ids.len(), shape.choices())?;
    check_ids(ids, shape.experts)?;
    check_len("slots", slots.len(), shape.choices())?;
    check_len("row_index", row_index.len(), shape.choices())?;
    check_len("row_choice", row_choice.len(), rows)?;
    let row_choice = fill(row_choice, NOT_ROUTED);
    for (position, row_index) in row_index.iter_mut().enumerate() {
        let slot = usize::try_from(slots[position]).ok().filter(|&slot| slot < capacity);
        let row = match (usize::try_from(ids[position]), slot) {
            (Ok(expert), Some(slot)) => {
                let row = expert * capacity + slot;
                row_choice[row] = position as i64;
                row as i64
            }
            _ => NOT_ROUTED,
        };
        row_index.write(row);
    }
    Ok(())
}
