//! The gradient of the experts' biases.
use std::mem::MaybeUninit;

use num_traits::Zero;
use tutel_core::{Error, check_len, check_offsets, checked_product};

use crate::disjoint::Tiles;
use crate::parallel::{each_task, worthwhile};
use crate::{Parallel, Scalar};

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
    const RUN: usize = 128;
    const COLUMNS: usize = 256;
    let experts = offsets.len().saturating_sub(1);
    check_len("rows", rows.len(), checked_product("rows", &[num_rows, width])?)?;
    check_len("output", output.len(), checked_product("output", &[experts, width])?)?;
    let owned = check_offsets(offsets, experts, num_rows)?;
    let one_row_each = (0..experts).map(|expert| expert..expert + 1).collect();
    let tiles = Tiles::new(output, width, one_row_each, COLUMNS);
    each_task(worthwhile(parallel, rows.len()), tiles.len(), &|claimed| {
        let mut wide = Vec::new();
        for task in claimed {
            let mut tile = tiles.take(task);
            let columns = tile.columns();
            let zeros = vec![T::Accumulator::zero(); columns.len()];
            let (mut total, mut run_sum) = (zeros.clone(), zeros.clone());
            wide.resize(columns.len(), T::Accumulator::zero());
            let owned = owned[tile.row_block].clone();
            for run in owned.clone().step_by(RUN) {
                run_sum.copy_from_slice(&zeros);
                for row in run..(run + RUN).min(owned.end) {
                    T::widen_slice(&rows[row * width..][columns.clone()], &mut wide);
                    run_sum.iter_mut().zip(&wide).for_each(|(sum, &value)| *sum += value);
                }
                total.iter_mut().zip(&run_sum).for_each(|(sum, &value)| *sum += value);
            }
            for (output, &sum) in tile.row(0).iter_mut().zip(&total) {
                output.write(T::narrow(sum));
            }
        }
    });
    Ok(())
}
