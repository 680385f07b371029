//! Tokens to expert-major rows.
use std::mem::MaybeUninit;

use num_traits::One;
use tutel_core::{Error, RowShape, check_len};

use crate::arch::{Body, Features, Level, end_streaming, run_at, stream};
use crate::disjoint::{Chunks, fill};
use crate::lanes::LANES;
use crate::parallel::{Tasks, each_task, items_per_task};
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
    let RowShape { width, .. } = shape;
    check_len("tokens", tokens.len(), shape.tokens * width)?;
    check_len("rows", rows.len(), shape.rows * width)?;
    shape.check_row_choice(row_choice)?;
    if let Some(weights) = weights {
        check_len("weights", weights.len(), shape.choices())?;
    }
    if width == 0 {
        return Ok(());
    }
    let streamed = size_of_val(rows) >= STREAM_FROM;
    let order = in_order_of_tokens::<T>(row_choice, shape);
    let block = items_per_task(width);
    let tasks = shape.rows.div_ceil(block);
    let rows = Chunks::new(rows, width, shape.rows);
    let level = Level::current();
    each_task(parallel, tasks, &|claimed| {
        let order = order.as_deref();
        run_at(level, Dispatch { tokens, row_choice, weights, shape, order, block, streamed, rows: &rows, claimed });
    });
    Ok(())
}

/// Outputs of this size are written around the caches, which they would only sweep.
const STREAM_FROM: usize = 32 << 20;

/// The rows, those of one token together: a token that is read from memory then stays in the cache for all of its
/// rows. `None` where the tokens fit the last cache as they are, or rows are too short for the detour.
fn in_order_of_tokens<T>(row_choice: &[i64], shape: RowShape) -> Option<Vec<u32>> {
    const CACHE: usize = 16 << 20;
    const LEAST_ROW: usize = 512;
    let row_bytes = shape.width * size_of::<T>();
    if shape.top_k < 2
        || row_bytes < LEAST_ROW
        || shape.tokens * row_bytes < CACHE
        || u32::try_from(shape.rows).is_err()
    {
        return None;
    }
    // A counting sort; empty rows come last.
    let token_of = |choice: i64| usize::try_from(choice).map_or(shape.tokens, |choice| choice / shape.top_k);
    let mut places = vec![0u32; shape.tokens + 2];
    for &choice in row_choice {
        places[token_of(choice) + 1] += 1;
    }
    for token in 0..=shape.tokens {
        places[token + 1] += places[token];
    }
    let mut order = vec![0; shape.rows];
    for (row, &choice) in row_choice.iter().enumerate() {
        let place = &mut places[token_of(choice)];
        order[*place as usize] = row as u32;
        *place += 1;
    }
    Some(order)
}

struct Dispatch<'a, T: Scalar> {
    tokens: &'a [T],
    row_choice: &'a [i64],
    weights: Option<&'a [T::Accumulator]>,
    shape: RowShape,
    order: Option<&'a [u32]>,
    /// Rows a task.
    block: usize,
    streamed: bool,
    rows: &'a Chunks<'a, MaybeUninit<T>>,
    claimed: Tasks<'a>,
}

impl<T: Scalar> Body for Dispatch<'_, T> {
    #[inline(always)]
    fn run<F: Features>(self, _: F) {
        let RowShape { width, top_k, .. } = self.shape;
        for task in self.claimed {
            for place in task * self.block..((task + 1) * self.block).min(self.shape.rows) {
                let row = self.order.map_or(place, |order| order[place] as usize);
                let output = self.rows.take(row);
                let Ok(choice) = usize::try_from(self.row_choice[row]) else {
                    fill(output, T::default());
                    continue;
                };
                let token = &self.tokens[choice / top_k * width..][..width];
                match (self.weights, self.streamed) {
                    (None, false) => drop(output.write_copy_of_slice(token)),
                    (None, true) => write_streamed::<T, false>(token, T::Accumulator::one(), output),
                    (Some(weights), false) => write(token, weights[choice], output),
                    (Some(weights), true) => write_streamed::<T, true>(token, weights[choice], output),
                }
            }
        }
        end_streaming();
    }
}

#[inline(always)]
fn write<T: Scalar>(token: &[T], weight: T::Accumulator, row: &mut [MaybeUninit<T>]) {
    for (output, value) in row.iter_mut().zip(token) {
        output.write(T::from_wide(weight * value.to_wide()));
    }
}

#[inline(always)]
fn write_streamed<T: Scalar, const WEIGHTED: bool>(token: &[T], weight: T::Accumulator, row: &mut [MaybeUninit<T>]) {
    const COLUMNS: usize = 2 * LANES;
    let ((blocks, rest), (values, values_rest)) = (row.as_chunks_mut::<COLUMNS>(), token.as_chunks::<COLUMNS>());
    for (block, values) in blocks.iter_mut().zip(values) {
        let mut values = *values;
        if WEIGHTED {
            for value in &mut values {
                *value = T::from_wide(weight * value.to_wide());
            }
        }
        stream(block, &values);
    }
    if WEIGHTED {
        write(values_rest, weight, rest);
    } else {
        rest.write_copy_of_slice(values_rest);
    }
}
