//! The experts' products: ragged rows times one matrix an expert.
//!
//! The output is cut into tiles (a block of one expert's rows, or of one expert's matrix, times a block of columns) by
//! the shapes alone; a tile is one task and its whole sum is made by one thread.
use std::mem::MaybeUninit;
use std::ops::Range;

use tutel_core::{Error, GroupedShape, check_len, check_offsets};

use crate::arch::{Level, Scratch};
use crate::disjoint::{Tiles, fill};
use crate::epilogue::Epilogue;
use crate::operand::{Factor, Term, View};
use crate::parallel::{each_task, worthwhile};
use crate::{Parallel, Scalar};

/// Inputs of [`grouped_gemm`].
#[derive(Debug, Clone, Copy)]
pub struct GroupedGemm<'a, T> {
    /// `[R, inner]`, expert by expert.
    pub rows: &'a [T],
    /// `[E, inner, outer]`, or `[E, outer, inner]` when `transposed`.
    pub weight: &'a [T],
    /// `[E, outer]`, added to each row.
    pub bias: Option<&'a [T]>,
    /// `[E + 1]`: expert e owns rows `offsets[e]..offsets[e + 1]`.
    pub offsets: &'a [i64],
    /// The layout of `weight`.
    pub transposed: bool,
}

/// Rows and columns of a tile at most. Packing a block of the right factor pays over a tile's rows, packing one of the left
/// factor over its columns.
const ROWS: usize = 512;
const COLUMNS: usize = 2048;

fn blocks_of(range: Range<usize>, block: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(block).map(move |start| start..start.saturating_add(block).min(end))
}

/// Columns of a tile: halved while there are fewer tiles than processors have cores to feed.
fn column_block(row_blocks: usize, columns: usize) -> usize {
    const ENOUGH_TILES: usize = 32;
    // Narrower ones would read a weight's rows in pieces too short for the processor's prefetching.
    const LEAST: usize = 256;
    let mut block = COLUMNS;
    while block > LEAST && row_blocks * columns.div_ceil(block) < ENOUGH_TILES {
        block /= 2;
    }
    block
}

/// `output[r] = rows[r] W_e + bias[e]` for the expert e that owns row r; zero for rows behind the last offset.
///
/// # Errors
/// Lengths that do not agree with the shape, offsets that do not ascend within the rows.
pub fn grouped_gemm<T: Scalar>(
    input: GroupedGemm<'_, T>,
    shape: GroupedShape,
    output: &mut [MaybeUninit<T>],
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    let GroupedShape { experts, rows, inner, outer } = shape;
    check_len("rows", input.rows.len(), rows * inner)?;
    check_len("weight", input.weight.len(), experts * inner * outer)?;
    check_len("output", output.len(), rows * outer)?;
    if let Some(bias) = input.bias {
        check_len("bias", bias.len(), experts * outer)?;
    }
    let owned = check_offsets(input.offsets, experts, rows)?;
    let last = owned.last().map_or(0, |range| range.end);
    let mut row_blocks: Vec<(Option<usize>, Range<usize>)> = Vec::new();
    for (expert, range) in owned.into_iter().enumerate() {
        row_blocks.extend(blocks_of(range, ROWS).map(|block| (Some(expert), block)));
    }
    row_blocks.extend(blocks_of(last..rows, ROWS).map(|block| (None, block)));

    let column_block = column_block(row_blocks.len(), outer);
    let tiles = Tiles::new(output, outer, row_blocks.iter().map(|(_, rows)| rows.clone()).collect(), column_block);
    let level = Level::current();
    let parallel = worthwhile(parallel, rows.saturating_mul(inner).saturating_mul(outer));
    each_task(parallel, tiles.len(), &|claimed| {
        let mut scratch = Scratch::new();
        for task in claimed {
            let mut tile = tiles.take(task);
            let Some(expert) = row_blocks[tile.row_block].0 else {
                for row in 0..tile.rows().len() {
                    fill(tile.row(row), T::default());
                }
                continue;
            };
            let columns = tile.columns();
            let weight = &input.weight[expert * inner * outer..(expert + 1) * inner * outer];
            let weight = if input.transposed {
                View::block(weight, inner, columns.clone(), 0..inner)
            } else {
                View::block(weight, outer, 0..inner, columns.clone())
            };
            let left = View::block(input.rows, inner, tile.rows(), 0..inner);
            let left = Factor { view: left, transposed: false };
            let term = Term { left, right: Factor { view: weight, transposed: input.transposed } };
            let bias = input.bias.map(|bias| &bias[expert * outer..][columns]);
            T::multiply(level, &mut scratch, &[term], None, &mut Epilogue { output: tile, bias });
        }
    });
    Ok(())
}

/// `output[e] = left_e^T right_e` over the rows of expert e: left `[R, inner]`, right `[R, outer]`, output
/// `[E, inner, outer]`; zero for an expert without rows.
///
/// # Errors
/// Lengths that do not agree with the shape, offsets that do not ascend within the rows.
pub fn grouped_gemm_weight_grad<T: Scalar>(
    left: &[T],
    right: &[T],
    offsets: &[i64],
    shape: GroupedShape,
    output: &mut [MaybeUninit<T>],
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    let GroupedShape { experts, rows, inner, outer } = shape;
    check_len("left", left.len(), rows * inner)?;
    check_len("right", right.len(), rows * outer)?;
    check_len("output", output.len(), experts * inner * outer)?;
    let owned = check_offsets(offsets, experts, rows)?;
    // Row blocks of the output seen as one [E * inner, outer] matrix.
    let mut blocks: Vec<(usize, Range<usize>)> = Vec::new();
    for expert in 0..experts {
        blocks.extend(blocks_of(0..inner, ROWS).map(|block| (expert, block)));
    }
    let matrix_rows = blocks.iter().map(|(e, block)| e * inner + block.start..e * inner + block.end).collect();
    let tiles = Tiles::new(output, outer, matrix_rows, column_block(blocks.len(), outer));
    let level = Level::current();
    let parallel = worthwhile(parallel, rows.saturating_mul(inner).saturating_mul(outer));
    each_task(parallel, tiles.len(), &|claimed| {
        let mut scratch = Scratch::new();
        for task in claimed {
            let tile = tiles.take(task);
            let (expert, block) = blocks[tile.row_block].clone();
            let owned = owned[expert].clone();
            let left = View::block(left, inner, owned.clone(), block);
            let right = View::block(right, outer, owned, tile.columns());
            let left = Factor { view: left, transposed: true };
            let term = Term { left, right: Factor { view: right, transposed: false } };
            T::multiply(level, &mut scratch, &[term], None, &mut Epilogue { output: tile, bias: None });
        }
    });
    Ok(())
}
