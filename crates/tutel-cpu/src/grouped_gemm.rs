//! The experts' products: ragged rows times one matrix an expert.
//!
//! The output is cut into tiles (a block of one expert's rows, or of one expert's matrix, times a block of columns); a
//! tile is one task, and a sum is made by one thread and in the same order however the output is cut.
use std::mem::MaybeUninit;
use std::ops::Range;

use tutel_core::{Error, GroupedShape, check_len, check_offsets};

use crate::arch::{Level, Scratch};
use crate::cut::Cut;
use crate::disjoint::{Tile, fill};
use crate::epilogue::Epilogue;
use crate::operand::{Factor, Term, View};
use crate::parallel::{each_task, worthwhile};
use crate::rows::RowsOf;
use crate::{Parallel, Scalar};

/// Inputs of [`grouped_gemm`].
#[derive(Debug, Clone, Copy)]
pub struct GroupedGemm<'a, T> {
    /// `[R, inner]`, expert by expert.
    pub rows: RowsOf<'a, T>,
    /// `[E, inner, outer]`, or `[E, outer, inner]` when `transposed`.
    pub weight: &'a [T],
    /// A second product of the same sizes, added to the first before anything is rounded.
    pub second: Option<(RowsOf<'a, T>, &'a [T])>,
    /// `[E, outer]`, added to each row.
    pub bias: Option<&'a [T]>,
    /// `[E + 1]`: expert e owns rows `offsets[e]..offsets[e + 1]`.
    pub offsets: &'a [i64],
    /// The layout of the weights.
    pub transposed: bool,
}

/// One matrix an expert.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) inner: usize,
    pub(crate) outer: usize,
    pub(crate) transposed: bool,
}

impl<'a, T> Weights<'a, T> {
    /// Some columns of an expert's matrix.
    pub(crate) fn factor(&self, expert: usize, columns: Range<usize>) -> Factor<'a, T> {
        let Self { data, inner, outer, transposed } = *self;
        let matrix = &data[expert * inner * outer..(expert + 1) * inner * outer];
        let view = if transposed {
            View::block(matrix, inner, columns, 0..inner)
        } else {
            View::block(matrix, outer, 0..inner, columns)
        };
        Factor { view, transposed }
    }
}

/// Fills a tile of rows that no expert owns.
pub(crate) fn fill_tile<T: Scalar>(tile: &mut Tile<'_, MaybeUninit<T>>) {
    for row in 0..tile.rows().len() {
        fill(tile.row(row), T::default());
    }
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
    input.rows.check("rows", rows, inner)?;
    check_len("weight", input.weight.len(), experts * inner * outer)?;
    check_len("output", output.len(), rows * outer)?;
    if let Some((second, weight)) = input.second {
        second.check("second rows", rows, inner)?;
        check_len("second weight", weight.len(), experts * inner * outer)?;
    }
    if let Some(bias) = input.bias {
        check_len("bias", bias.len(), experts * outer)?;
    }
    let owned = check_offsets(input.offsets, experts, rows)?;
    let cut = Cut::new(owned, rows, outer, parallel);
    let tiles = cut.tiles(output);
    let level = Level::current();
    let weights = |data| Weights { data, inner, outer, transposed: input.transposed };
    let next = |task: usize| {
        let (owner, _, columns) = cut.tile(task);
        owner.map(|expert| weights(input.weight).factor(expert, columns))
    };
    each_task(worthwhile(parallel, rows.saturating_mul(inner).saturating_mul(outer)), cut.len(), &|claimed| {
        let mut scratch = Scratch::new();
        let mut claimed = claimed.peekable();
        while let Some(task) = claimed.next() {
            let mut tile = tiles.take(task);
            let (Some(expert), rows, columns) = cut.tile(task) else {
                fill_tile(&mut tile);
                continue;
            };
            let left = input.rows.factor(inner, rows.clone(), 0..inner);
            let first = Term { left, right: weights(input.weight).factor(expert, columns.clone()) };
            let bias = input.bias.map(|bias| &bias[expert * outer..][columns.clone()]);
            let mut epilogue = Epilogue::Rows { output: tile, bias };
            let next = claimed.peek().and_then(|&task| next(task));
            match input.second {
                None => T::multiply(level, &mut scratch, &[first], next, &mut epilogue),
                Some((source, data)) => {
                    let left = source.factor(inner, rows, 0..inner);
                    let second = Term { left, right: weights(data).factor(expert, columns) };
                    T::multiply(level, &mut scratch, &[first, second], next, &mut epilogue);
                }
            }
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
    left: RowsOf<'_, T>,
    right: RowsOf<'_, T>,
    offsets: &[i64],
    shape: GroupedShape,
    output: &mut [MaybeUninit<T>],
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    let GroupedShape { experts, rows, inner, outer } = shape;
    left.check("left", rows, inner)?;
    right.check("right", rows, outer)?;
    check_len("output", output.len(), experts * inner * outer)?;
    let owned = check_offsets(offsets, experts, rows)?;
    // The output is one [E * inner, outer] matrix.
    let cut = Cut::new((0..experts).map(|e| e * inner..(e + 1) * inner), experts * inner, outer, parallel);
    let tiles = cut.tiles(output);
    let level = Level::current();
    each_task(worthwhile(parallel, rows.saturating_mul(inner).saturating_mul(outer)), cut.len(), &|claimed| {
        let mut scratch = Scratch::new();
        for task in claimed {
            let output = tiles.take(task);
            let (Some(expert), matrix_rows, columns) = cut.tile(task) else {
                unreachable!("every row of the output is some expert's");
            };
            let block = matrix_rows.start - expert * inner..matrix_rows.end - expert * inner;
            let left = left.factor(inner, owned[expert].clone(), block);
            let term = Term {
                left: Factor { transposed: true, ..left },
                right: right.factor(outer, owned[expert].clone(), columns),
            };
            T::multiply(level, &mut scratch, &[term], None, &mut Epilogue::Rows { output, bias: None });
        }
    });
    Ok(())
}
