//! What becomes of the sums of a product while they are still in the cache.
#![expect(
    clippy::inline_always,
    reason = "a function that is not inlined is compiled without the processor's features"
)]
use std::mem::MaybeUninit;

use num_traits::{One, Zero};

use crate::Activation;
use crate::disjoint::Tile;
use crate::operand::Operand;

/// Columns that come at once, at most.
const MOST: usize = 32;

type Output<'a, T> = Tile<'a, MaybeUninit<T>>;

/// Where the rows of a product go. Tiles of one epilogue are the same part of several matrices.
pub(crate) enum Epilogue<'a, T: Operand> {
    /// `output = sums + bias`.
    Rows { output: Output<'a, T>, bias: Option<&'a [T]> },
    /// `pre = sums + bias`, `output = activation(pre)`.
    Activate { output: Output<'a, T>, pre: Option<Output<'a, T>>, bias: Option<&'a [T]>, activation: Activation },
    /// The same, but the activated sums are kept for [`Epilogue::Gate`], row by row.
    Keep {
        kept: &'a mut [T::Accumulator],
        columns: usize,
        pre: Option<Output<'a, T>>,
        bias: Option<&'a [T]>,
        activation: Activation,
    },
    /// `value = sums`, `output = kept * sums`.
    Gate { output: Output<'a, T>, value: Option<Output<'a, T>>, kept: &'a [T::Accumulator] },
    /// The gradient of activation and gate.
    Derive(Box<Derive<'a, T>>),
}

/// See [`crate::hidden_grad`].
pub(crate) struct Derive<'a, T: Operand> {
    pub(crate) activation: Activation,
    /// `[R, H]`.
    pub(crate) pre: &'a [T],
    /// `[R, H]`.
    pub(crate) value: Option<&'a [T]>,
    /// `[R]`.
    pub(crate) weights: Option<&'a [T::Accumulator]>,
    pub(crate) hidden_size: usize,
    pub(crate) grad_pre: Output<'a, T>,
    pub(crate) grad_value: Option<Output<'a, T>>,
    pub(crate) hidden: Option<Output<'a, T>>,
    /// One column for every [`Derive::UNIT`] of the others, zero at first.
    pub(crate) dots: Option<Tile<'a, T::Accumulator>>,
}

/// Columns of a row, by way of registers: the compiler cannot know that sums and output do not overlap.
#[inline(always)]
fn write<T: Operand>(output: &mut Output<'_, T>, row: usize, column: usize, sums: &[T::Accumulator]) {
    let mut narrow = [T::default(); MOST];
    narrow.iter_mut().zip(sums).for_each(|(narrow, &sum)| *narrow = T::from_wide(sum));
    output.row(row)[column..column + sums.len()].write_copy_of_slice(&narrow[..sums.len()]);
}

#[inline(always)]
fn read<T: Operand>(source: &[T]) -> [T::Accumulator; MOST] {
    let mut wide = [T::Accumulator::zero(); MOST];
    wide.iter_mut().zip(source).for_each(|(wide, source)| *wide = source.to_wide());
    wide
}

#[inline(always)]
fn add<T: Operand>(sums: &mut [T::Accumulator], bias: Option<&[T]>, column: usize) {
    if let Some(bias) = bias {
        let bias = &bias[column..column + sums.len()];
        sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias.to_wide());
    }
}

impl<T: Operand> Epilogue<'_, T> {
    /// Where columns of a row will be written, to have that memory ready.
    #[inline(always)]
    pub(crate) fn place(&mut self, row: usize, column: usize) -> *const MaybeUninit<T> {
        let output = match self {
            Self::Rows { output, .. } | Self::Activate { output, .. } | Self::Gate { output, .. } => output,
            Self::Derive(derive) => &mut derive.grad_pre,
            // Kept sums stay in the cache.
            Self::Keep { .. } => return std::ptr::null(),
        };
        output.row(row)[column..].as_ptr()
    }

    /// Takes some columns of a row of sums, both counted from the tile's first. Each is given once, in ascending order of
    /// the columns of a row.
    #[inline(always)]
    pub(crate) fn finish(&mut self, row: usize, column: usize, sums: &mut [T::Accumulator]) {
        match self {
            Self::Rows { output, bias } => {
                add(sums, *bias, column);
                write(output, row, column, sums);
            }
            Self::Activate { output, pre, bias, activation } => {
                add(sums, *bias, column);
                if let Some(pre) = pre {
                    write(pre, row, column, sums);
                }
                activation.apply(sums);
                write(output, row, column, sums);
            }
            Self::Keep { kept, columns, pre, bias, activation } => {
                add(sums, *bias, column);
                if let Some(pre) = pre {
                    write(pre, row, column, sums);
                }
                activation.apply(sums);
                kept[row * *columns + column..][..sums.len()].copy_from_slice(sums);
            }
            Self::Gate { output, value, kept } => {
                if let Some(value) = value {
                    write(value, row, column, sums);
                }
                let kept = &kept[row * output.columns().len() + column..][..sums.len()];
                sums.iter_mut().zip(kept).for_each(|(sum, &kept)| *sum = *sum * kept);
                write(output, row, column, sums);
            }
            Self::Derive(derive) => derive.finish(row, column, sums),
        }
    }
}

impl<T: Operand> Derive<'_, T> {
    /// Columns whose products are added up as one, whatever the tiles.
    pub(crate) const UNIT: usize = 256;

    /// With the gradient u of the unweighted expert output in terms of its hidden units: hidden = act(pre) * value,
    /// `grad_pre` = weight * u * value * act'(pre), `grad_value` = weight * u * act(pre), dot = u . hidden.
    #[inline(always)]
    fn finish(&mut self, row: usize, column: usize, grads: &mut [T::Accumulator]) {
        let count = grads.len();
        let first_row = self.grad_pre.rows().start + row;
        let start = first_row * self.hidden_size + self.grad_pre.columns().start + column;
        let mut act = read(&self.pre[start..start + count]);
        let mut slope = act;
        self.activation.apply(&mut act[..count]);
        self.activation.derive(&mut slope[..count]);
        let mut hidden = act;
        if let Some(value) = self.value {
            let value = read(&value[start..start + count]);
            for i in 0..count {
                hidden[i] = act[i] * value[i];
                slope[i] = slope[i] * value[i];
            }
        }
        if let Some(dots) = &mut self.dots {
            let mut products = [T::Accumulator::zero(); MOST];
            for i in 0..count {
                products[i] = grads[i] * hidden[i];
            }
            dots.row(row)[column / Self::UNIT] += fold(products);
        }
        let weight = self.weights.map_or(T::Accumulator::one(), |weights| weights[first_row]);
        for grad in grads.iter_mut() {
            *grad = *grad * weight;
        }
        if let Some(grad_value) = &mut self.grad_value {
            for i in 0..count {
                act[i] = act[i] * grads[i];
            }
            write(grad_value, row, column, &act[..count]);
        }
        if let Some(output) = &mut self.hidden {
            for hidden in &mut hidden {
                *hidden = *hidden * weight;
            }
            write(output, row, column, &hidden[..count]);
        }
        for i in 0..count {
            grads[i] = grads[i] * slope[i];
        }
        write(&mut self.grad_pre, row, column, grads);
    }
}

/// The sum, by halves.
#[inline(always)]
fn fold<A: tutel_core::Real>(mut values: [A; MOST]) -> A {
    let mut width = MOST / 2;
    while width > 0 {
        for lane in 0..width {
            values[lane] += values[lane + width];
        }
        width /= 2;
    }
    values[0]
}
