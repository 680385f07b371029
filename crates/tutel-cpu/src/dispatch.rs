//! Tokens to expert-major rows.
use std::mem::MaybeUninit;

use num_traits::Zero;
use tutel_core::{Error, RowShape, check_len};

use crate::disjoint::{Chunks, fill};
use crate::parallel::{each_task, items_per_task};
use crate::{Parallel, Scalar};

/// `rows[r] = weights[c] * tokens[c / K]` with `c = row_choice[r]`, or zero where c is -1. Without weights a row is a copy.
///
/// # Errors
/// Lengths that do not agree with the shape, choices out of range.
pub fn dispatch<T: Scalar>(
    tokens: &[T],
    row_choice: &[i64],
    weights: Option<&[T::Accumulator]>,
    shape: RowShape,
    rows: &mut [MaybeUninit<T>],
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    let RowShape { width, top_k, .. } = shape;
    check_len("tokens", tokens.len(), shape.tokens * width)?;
    check_len("rows", rows.len(), shape.rows * width)?;
    shape.check_row_choice(row_choice)?;
    if let Some(weights) = weights {
        check_len("weights", weights.len(), shape.choices())?;
    }
    if width == 0 {
        return Ok(());
    }
    let block = items_per_task(width);
    let tasks = shape.rows.div_ceil(block);
    let rows = Chunks::new(rows, block * width, tasks);
    each_task(parallel, tasks, &|claimed| {
        let mut wide = vec![T::Accumulator::zero(); width];
        let mut narrow = vec![T::default(); width];
        for task in claimed {
            for (row, &choice) in rows.take(task).chunks_exact_mut(width).zip(&row_choice[task * block..]) {
                let Ok(choice) = usize::try_from(choice) else {
                    fill(row, T::default());
                    continue;
                };
                let token = &tokens[choice / top_k * width..(choice / top_k + 1) * width];
                let Some(weights) = weights else {
                    row.write_copy_of_slice(token);
                    continue;
                };
                T::widen_slice(token, &mut wide);
                for value in &mut wide {
                    *value = weights[choice] * *value;
                }
                T::narrow_slice(&wide, &mut narrow);
                row.write_copy_of_slice(&narrow);
            }
        }
    });
    Ok(())
}
