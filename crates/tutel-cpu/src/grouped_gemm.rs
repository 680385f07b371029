//! The experts' products: ragged rows times one matrix an expert.
//!
//! The output is cut into tiles (a block of one expert's rows, or of one expert's matrix, times a block of columns) by
//! the shapes alone; a tile is one task and its whole sum is made by one thread.
use std::mem::MaybeUninit;
use std::ops::Range;

use num_traits::Zero;
use tutel_core::{Error, GroupedShape, check_len, check_offsets};

use crate::arch::{Factor, multiply};
use crate::disjoint::{Tile, Tiles, fill};
use crate::operand::View;
use crate::parallel::each_task;
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

/// One worker's memory.
struct Scratch<T: Scalar> {
    left: Vec<T::Accumulator>,
    right: Vec<T::Accumulator>,
    sum: Vec<T::Accumulator>,
    narrow: Vec<T>,
}

impl<T: Scalar> Scratch<T> {
    fn new() -> Self {
        Self { left: Vec::new(), right: Vec::new(), sum: Vec::new(), narrow: Vec::new() }
    }

    fn sum_of(&mut self, rows: usize, columns: usize) {
        self.sum.resize(rows * columns, T::Accumulator::zero());
        self.narrow.resize(columns, T::default());
    }

    /// Rounds the sums once and writes them, with the bias added before.
    fn write(&mut self, tile: &mut Tile<'_, MaybeUninit<T>>, bias: Option<&[T]>) {
        let columns = tile.columns().len();
        for (row, sum) in self.sum.chunks_exact_mut(columns).enumerate() {
            for (sum, bias) in sum.iter_mut().zip(bias.into_iter().flatten()) {
                *sum += bias.widen();
            }
            T::narrow_slice(sum, &mut self.narrow);
            tile.row(row).write_copy_of_slice(&self.narrow);
        }
    }
}

fn blocks_of(range: Range<usize>, block: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(block).map(move |start| start..start.saturating_add(block).min(end))
}

/// Columns of a tile: halved from the largest block while there are fewer tiles than a processor has cores to feed.
fn column_block(row_blocks: usize, columns: usize, largest: usize) -> usize {
    const ENOUGH_TILES: usize = 64;
    const SMALLEST: usize = 64;
    let mut block = largest;
    while block > SMALLEST && row_blocks * columns.div_ceil(block) < ENOUGH_TILES {
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
        row_blocks.extend(blocks_of(range, T::BLOCK).map(|block| (Some(expert), block)));
    }
    row_blocks.extend(blocks_of(last..rows, T::BLOCK).map(|block| (None, block)));

    let column_block = column_block(row_blocks.len(), outer, T::BLOCK);
    let tiles = Tiles::new(output, outer, row_blocks.iter().map(|(_, rows)| rows.clone()).collect(), column_block);
    each_task(parallel, tiles.len(), &|claimed| {
        let mut scratch = Scratch::<T>::new();
        for task in claimed {
            let mut tile = tiles.take(task);
            match row_blocks[tile.row_block].0 {
                Some(expert) => multiply_tile(&input, shape, expert, &mut tile, &mut scratch),
                None => (0..tile.rows().len()).for_each(|row| {
                    fill(tile.row(row), T::default());
                }),
            }
        }
    });
    Ok(())
}

fn multiply_tile<T: Scalar>(
    input: &GroupedGemm<'_, T>,
    shape: GroupedShape,
    expert: usize,
    tile: &mut Tile<'_, MaybeUninit<T>>,
    scratch: &mut Scratch<T>,
) {
    let GroupedShape { inner, outer, .. } = shape;
    let (rows, columns) = (tile.rows(), tile.columns());
    let weight = &input.weight[expert * inner * outer..(expert + 1) * inner * outer];
    scratch.sum_of(rows.len(), columns.len());
    if inner == 0 {
        scratch.sum.fill(T::Accumulator::zero());
    }
    for depth in blocks_of(0..inner, T::DEPTH) {
        let left = View::block(input.rows, inner, rows.clone(), depth.clone());
        let right = if input.transposed {
            View::block(weight, inner, columns.clone(), depth.clone())
        } else {
            View::block(weight, outer, depth.clone(), columns.clone())
        };
        multiply(
            &mut scratch.sum,
            Factor { view: T::widened(left, &mut scratch.left), transposed: false },
            Factor { view: T::widened(right, &mut scratch.right), transposed: input.transposed },
            depth.start > 0,
        );
    }
    let bias = input.bias.map(|bias| &bias[expert * outer..][columns.clone()]);
    scratch.write(tile, bias);
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
        blocks.extend(blocks_of(0..inner, T::BLOCK).map(|block| (expert, block)));
    }
    let matrix_rows = blocks.iter().map(|(e, block)| e * inner + block.start..e * inner + block.end).collect();
    let tiles = Tiles::new(output, outer, matrix_rows, column_block(blocks.len(), outer, T::BLOCK));
    each_task(parallel, tiles.len(), &|claimed| {
        let mut scratch = Scratch::<T>::new();
        for task in claimed {
            let mut tile = tiles.take(task);
            let (expert, block) = blocks[tile.row_block].clone();
            let columns = tile.columns();
            scratch.sum_of(block.len(), columns.len());
            let owned = owned[expert].clone();
            if owned.is_empty() {
                scratch.sum.fill(T::Accumulator::zero());
            }
            for depth in blocks_of(owned.clone(), T::DEPTH) {
                let left = View::block(left, inner, depth.clone(), block.clone());
                let right = View::block(right, outer, depth.clone(), columns.clone());
                multiply(
                    &mut scratch.sum,
                    Factor { view: T::widened(left, &mut scratch.left), transposed: true },
                    Factor { view: T::widened(right, &mut scratch.right), transposed: false },
                    depth.start > owned.start,
                );
            }
            scratch.write(&mut tile, None);
        }
    });
    Ok(())
}
