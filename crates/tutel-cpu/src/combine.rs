//! Rows back to tokens, and the gradient of the weights.
use std::mem::MaybeUninit;

use num_traits::{One, Zero};
use tutel_core::{Error, RowShape, check_len};

use crate::arch::{Body, Features, Level, prefetch, run_at};
use crate::disjoint::Chunks;
use crate::lanes::{LANES, fold};
use crate::parallel::{Tasks, each_task, items_per_task};
use crate::{Parallel, Scalar};

/// Columns that are summed in registers.
const COLUMNS: usize = 64;

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
    let block = items_per_task(width.saturating_mul(top_k));
    let tasks = shape.tokens.div_ceil(block);
    let output = Chunks::new(output, block * width, tasks);
    let level = Level::current();
    each_task(parallel, tasks, &|claimed| {
        run_at(level, Combine { rows, row_index, weights, shape, block, output: &output, claimed });
    });
    Ok(())
}

struct Combine<'a, T: Scalar> {
    rows: &'a [T],
    row_index: &'a [i64],
    weights: Option<&'a [T::Accumulator]>,
    shape: RowShape,
    /// Tokens a task.
    block: usize,
    output: &'a Chunks<'a, MaybeUninit<T>>,
    claimed: Tasks<'a>,
}

impl<T: Scalar> Body for Combine<'_, T> {
    #[inline(always)]
    fn run<F: Features>(self, _: F) {
        let RowShape { width, top_k, .. } = self.shape;
        let row = |choice: usize| {
            let row = usize::try_from(*self.row_index.get(choice)?).ok()?;
            Some(&self.rows[row * width..][..width])
        };
        let mut kept = Vec::with_capacity(top_k);
        let mut next = Vec::with_capacity(top_k);
        for task in self.claimed {
            for (token, output) in (task * self.block..).zip(self.output.take(task).chunks_exact_mut(width)) {
                kept.clear();
                next.clear();
                for choice in token * top_k..(token + 1) * top_k {
                    let weight = self.weights.map_or(T::Accumulator::one(), |weights| weights[choice]);
                    kept.extend(row(choice).map(|row| (row, weight)));
                    next.extend(row(choice + top_k));
                }
                weighted_sum(&kept, &next, output);
            }
        }
    }
}

/// Adds the rows, each times its weight, and asks for the rows that come next: the processor foresees the way along
/// a row, but not to which row it leads.
#[inline(always)]
fn weighted_sum<T: Scalar>(rows: &[(&[T], T::Accumulator)], next: &[&[T]], output: &mut [MaybeUninit<T>]) {
    let line = 64 / size_of::<T>();
    let whole = output.len() / COLUMNS * COLUMNS;
    let (blocks, rest) = output.as_chunks_mut::<COLUMNS>();
    for (index, block) in blocks.iter_mut().enumerate() {
        let first = index * COLUMNS;
        for row in next {
            for line in row[first..][..COLUMNS].chunks(line) {
                prefetch(line);
            }
        }
        let mut sums = [T::Accumulator::zero(); COLUMNS];
        for (row, weight) in rows {
            add(&mut sums, &row[first..][..COLUMNS], *weight);
        }
        for (output, sum) in block.iter_mut().zip(sums) {
            output.write(T::from_wide(sum));
        }
    }
    let mut sums = [T::Accumulator::zero(); COLUMNS];
    for (row, weight) in rows {
        add(&mut sums[..rest.len()], &row[whole..], *weight);
    }
    for (output, sum) in rest.iter_mut().zip(sums) {
        output.write(T::from_wide(sum));
    }
}

#[inline(always)]
fn add<T: Scalar>(sums: &mut [T::Accumulator], values: &[T], weight: T::Accumulator) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += weight * value.to_wide();
    }
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
    let level = Level::current();
    each_task(parallel, tasks, &|claimed| {
        run_at(level, RowDot { rows, row_index, tokens, shape, block, output: &output, claimed });
    });
    Ok(())
}

struct RowDot<'a, T: Scalar> {
    rows: &'a [T],
    row_index: &'a [i64],
    tokens: &'a [T],
    shape: RowShape,
    /// Tokens a task.
    block: usize,
    output: &'a Chunks<'a, MaybeUninit<T::Accumulator>>,
    claimed: Tasks<'a>,
}

impl<T: Scalar> Body for RowDot<'_, T> {
    #[inline(always)]
    fn run<F: Features>(self, _: F) {
        let RowShape { width, top_k, .. } = self.shape;
        let row = |choice: usize| {
            let row = usize::try_from(*self.row_index.get(choice)?).ok()?;
            Some(&self.rows[row * width..][..width])
        };
        for task in self.claimed {
            let first = task * self.block * top_k;
            for (choice, output) in (first..).zip(self.output.take(task)) {
                let token = &self.tokens[choice / top_k * width..][..width];
                let dot = row(choice).map(|values| dot(values, token, row(choice + 1).unwrap_or(values)));
                output.write(dot.unwrap_or(T::Accumulator::zero()));
            }
        }
    }
}

/// The inner product, one partial sum a lane; asks for the row that comes next.
#[inline(always)]
fn dot<T: Scalar>(left: &[T], right: &[T], next: &[T]) -> T::Accumulator {
    let mut sums = [[T::Accumulator::zero(); LANES]; COLUMNS / LANES];
    let line = 64 / size_of::<T>();
    let ((left, left_rest), (right, right_rest)) = (left.as_chunks::<COLUMNS>(), right.as_chunks::<COLUMNS>());
    for ((left, right), next) in left.iter().zip(right).zip(next.as_chunks::<COLUMNS>().0) {
        for line in next.chunks(line) {
            prefetch(line);
        }
        let sums = sums.as_flattened_mut();
        for column in 0..COLUMNS {
            sums[column] += left[column].to_wide() * right[column].to_wide();
        }
    }
    for ((sum, left), right) in sums.as_flattened_mut().iter_mut().zip(left_rest).zip(right_rest) {
        *sum += left.to_wide() * right.to_wide();
    }
    let mut total = sums[0];
    for part in &sums[1..] {
        for lane in 0..LANES {
            total[lane] += part[lane];
        }
    }
    fold(total)
}
