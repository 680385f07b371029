//! Rows back to tokens, and the gradient of the weights.
use std::mem::MaybeUninit;

use num_traits::{One, Zero};
use tutel_core::{Error, RowShape, check_len};

use crate::disjoint::Chunks;
use crate::parallel::{each_task, items_per_task};
use crate::{Parallel, Scalar, lanes};

/// `output[t] = sum_j weights[t, j] * rows[row_index[t, j]]` over the choices whose row index is not -1, added in the
/// order of the choices in the accumulator type. Without weights, a plain sum.
///
/// # Errors
/// Lengths that do not agree with the shape, rows out of range.
pub fn combine<T: Scalar>(
    rows: &[T],
    row_index: &[i64],
    weights: Option<&[T::Accumulator]>,
    shape: RowShape,
    output: &mut [MaybeUninit<T>],
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    let RowShape { width, top_k, .. } = shape;
    check_len("rows", rows.len(), shape.rows * width)?;
    check_len("output", output.len(), shape.tokens * width)?;
    shape.check_row_index(row_index)?;
    if let Some(weights) = weights {
        check_len("weights", weights.len(), shape.choices())?;
    }
    if width == 0 {
        return Ok(());
    }
    let block = items_per_task(width);
    let tasks = shape.tokens.div_ceil(block);
    let output = Chunks::new(output, block * width, tasks);
    each_task(parallel, tasks, &|claimed| {
        let mut sum = vec![T::Accumulator::zero(); width];
        let mut wide = sum.clone();
        let mut narrow = vec![T::default(); width];
        for task in claimed {
            for (token, output) in (task * block..).zip(output.take(task).chunks_exact_mut(width)) {
                sum.fill(T::Accumulator::zero());
                for choice in token * top_k..(token + 1) * top_k {
                    let Ok(row) = usize::try_from(row_index[choice]) else { continue };
                    let weight = weights.map_or(T::Accumulator::one(), |weights| weights[choice]);
                    T::widen_slice(&rows[row * width..(row + 1) * width], &mut wide);
                    for (sum, &value) in sum.iter_mut().zip(&wide) {
                        *sum += weight * value;
                    }
                }
                T::narrow_slice(&sum, &mut narrow);
                output.write_copy_of_slice(&narrow);
            }
        }
    });
    Ok(())
}

/// `output[t, j] = rows[row_index[t, j]] . tokens[t]`, zero where the row index is -1: the gradient of combine's weights
/// when `tokens` is the gradient of its output.
///
/// # Errors
/// Lengths that do not agree with the shape, rows out of range.
pub fn row_dot<T: Scalar>(
    rows: &[T],
    row_index: &[i64],
    tokens: &[T],
    shape: RowShape,
    output: &mut [MaybeUninit<T::Accumulator>],
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    let RowShape { width, top_k, .. } = shape;
    check_len("rows", rows.len(), shape.rows * width)?;
    check_len("tokens", tokens.len(), shape.tokens * width)?;
    check_len("output", output.len(), shape.choices())?;
    shape.check_row_index(row_index)?;
    if top_k == 0 {
        return Ok(());
    }
    let block = items_per_task(width.saturating_mul(top_k));
    let tasks = shape.tokens.div_ceil(block);
    let output = Chunks::new(output, block * top_k, tasks);
    each_task(parallel, tasks, &|claimed| {
        let mut wide_token = vec![T::Accumulator::zero(); width];
        let mut wide_row = wide_token.clone();
        for task in claimed {
            for (token, output) in (task * block..).zip(output.take(task).chunks_exact_mut(top_k)) {
                T::widen_slice(&tokens[token * width..(token + 1) * width], &mut wide_token);
                for (output, &row) in output.iter_mut().zip(&row_index[token * top_k..]) {
                    let dot = match usize::try_from(row) {
                        Ok(row) => {
                            T::widen_slice(&rows[row * width..(row + 1) * width], &mut wide_row);
                            lanes::dot(&wide_row, &wide_token)
                        }
                        Err(_) => T::Accumulator::zero(),
                    };
                    output.write(dot);
                }
            }
        }
    });
    Ok(())
}
