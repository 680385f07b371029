//! The gradient of the experts' biases.
use std::mem::MaybeUninit;
use std::ops::Range;

use num_traits::Zero;
use tutel_core::{Error, check_len, check_offsets, checked_product};

use crate::arch::{Body, Features, Level, run_at};
use crate::disjoint::Tiles;
use crate::parallel::{Tasks, each_task, worthwhile};
use crate::{Parallel, Scalar};

/// Columns of a task.
const COLUMNS: usize = 256;

/// `output[e] = sum of the rows of expert e`: rows `[R, width]`, output `[E, width]`. Runs of 128 rows are summed
/// first and then their sums, so that the rounding error grows with the number of runs only.
///
/// # Errors
/// Lengths that do not agree, offsets that do not ascend within the rows.
pub fn grouped_sum<T: Scalar>(
    rows: &[T],
    offsets: &[i64],
    (num_rows, width): (usize, usize),
    output: &mut [MaybeUninit<T>],
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    let experts = offsets.len().saturating_sub(1);
    check_len("rows", rows.len(), checked_product("rows", &[num_rows, width])?)?;
    check_len("output", output.len(), checked_product("output", &[experts, width])?)?;
    let owned = check_offsets(offsets, experts, num_rows)?;
    let one_row_each = (0..experts).map(|expert| expert..expert + 1).collect();
    let tiles = Tiles::new(output, width, one_row_each, COLUMNS);
    let level = Level::current();
    each_task(worthwhile(parallel, rows.len()), tiles.len(), &|claimed| {
        run_at(level, GroupedSum { rows, owned: &owned, width, tiles: &tiles, claimed });
    });
    Ok(())
}

struct GroupedSum<'a, T: Scalar> {
    rows: &'a [T],
    owned: &'a [Range<usize>],
    width: usize,
    tiles: &'a Tiles<'a, MaybeUninit<T>>,
    claimed: Tasks<'a>,
}

impl<T: Scalar> Body for GroupedSum<'_, T> {
    #[inline(always)]
    fn run<F: Features>(self, _: F) {
        const RUN: usize = 128;
        for task in self.claimed {
            let mut tile = self.tiles.take(task);
            let columns = tile.columns();
            let owned = self.owned[tile.row_block].clone();
            let mut total = [T::Accumulator::zero(); COLUMNS];
            for run in owned.clone().step_by(RUN) {
                let mut sums = [T::Accumulator::zero(); COLUMNS];
                for row in run..(run + RUN).min(owned.end) {
                    let row = &self.rows[row * self.width..][columns.clone()];
                    for (sum, value) in sums.iter_mut().zip(row) {
                        *sum += value.to_wide();
                    }
                }
                for (total, sum) in total.iter_mut().zip(sums) {
                    *total += sum;
                }
            }
            for (output, &sum) in tile.row(0).iter_mut().zip(&total) {
                output.write(T::from_wide(sum));
            }
        }
    }
}
