//! Running counts of a mask.
use std::mem::MaybeUninit;

use tutel_core::{Error, check_len, checked_product};

use crate::Parallel;
use crate::disjoint::{Chunks, Tiles};
use crate::parallel::{each_task, items_per_task};

/// Along which dimension of a matrix to count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Along {
    /// Down each column (dimension 0).
    Columns,
    /// Along each row (dimension 1).
    Rows,
}

/// `output = cumulative sum of the mask - 1` for a mask `[rows, columns]` of integers; wraps on overflow, as torch does.
///
/// # Errors
/// Lengths that do not agree.
pub fn prefix_count<M: Copy + Into<i64> + Sync>(
    mask: &[M],
    (rows, columns): (usize, usize),
    along: Along,
    output: &mut [MaybeUninit<i64>],
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    check_len("mask", mask.len(), checked_product("mask", &[rows, columns])?)?;
    check_len("output", output.len(), mask.len())?;
    if mask.is_empty() {
        return Ok(());
    }
    match along {
        Along::Columns => count_columns(mask, rows, columns, output, parallel),
        Along::Rows => count_rows(mask, rows, columns, output, parallel),
    }
    Ok(())
}

fn count_columns<M: Copy + Into<i64> + Sync>(
    mask: &[M],
    rows: usize,
    columns: usize,
    output: &mut [MaybeUninit<i64>],
    parallel: &dyn Parallel,
) {
    const COLUMNS: usize = 64;
    let tiles = Tiles::new(output, columns, std::iter::once(0..rows).collect(), COLUMNS);
    each_task(parallel, tiles.len(), &|claimed| {
        for task in claimed {
            let mut tile = tiles.take(task);
            let range = tile.columns();
            let mut counts = [-1i64; COLUMNS];
            for row in 0..rows {
                let mask = &mask[row * columns..][range.clone()];
                for ((output, count), &value) in tile.row(row).iter_mut().zip(&mut counts).zip(mask) {
                    *count = count.wrapping_add(value.into());
                    output.write(*count);
                }
            }
        }
    });
}

fn count_rows<M: Copy + Into<i64> + Sync>(
    mask: &[M],
    rows: usize,
    columns: usize,
    output: &mut [MaybeUninit<i64>],
    parallel: &dyn Parallel,
) {
    let block = items_per_task(columns);
    let tasks = rows.div_ceil(block);
    let output = Chunks::new(output, block * columns, tasks);
    each_task(parallel, tasks, &|claimed| {
        for task in claimed {
            let mask = mask[task * block * columns..].chunks_exact(columns);
            for (output, mask) in output.take(task).chunks_exact_mut(columns).zip(mask) {
                let mut count = -1i64;
                for (output, &value) in output.iter_mut().zip(mask) {
                    count = count.wrapping_add(value.into());
                    output.write(count);
                }
            }
        }
    });
}
