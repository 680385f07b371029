//! The hidden units of the experts and their gradient: products with activation, gate and routing weight in the same pass.
//!
//! ```text
//! plain:  hidden = act(rows W + bias)
//! gated:  hidden = act(rows W + bias) * (rows V)
//! ```
use std::mem::MaybeUninit;

use num_traits::Zero;
use tutel_core::{Error, GroupedShape, check_len, check_offsets};

use crate::arch::{Level, Scratch};
use crate::cut::Cut;
use crate::epilogue::{Derive, Epilogue};
use crate::grouped_gemm::{Weights, fill_tile};
use crate::operand::Term;
use crate::parallel::{each_task, worthwhile};
use crate::rows::RowsOf;
use crate::{Activation, Parallel, Scalar};

/// Inputs of [`hidden`].
#[derive(Debug, Clone, Copy)]
pub struct Hidden<'a, T> {
    /// `[R, inner]`, expert by expert.
    pub rows: RowsOf<'a, T>,
    /// W: `[E, inner, outer]`, or `[E, outer, inner]` when `transposed`.
    pub weight: &'a [T],
    /// `[E, outer]`, added to the first product.
    pub bias: Option<&'a [T]>,
    /// V, of gated experts.
    pub value_weight: Option<&'a [T]>,
    /// `[E + 1]`: expert e owns rows `offsets[e]..offsets[e + 1]`.
    pub offsets: &'a [i64],
    /// The layout of the weights.
    pub transposed: bool,
    /// act.
    pub activation: Activation,
}

/// Outputs of [`hidden`]; rows behind the last offset are zero.
pub struct HiddenOutput<'a, T> {
    /// `[R, outer]`.
    pub hidden: &'a mut [MaybeUninit<T>],
    /// `[R, outer]`: what act was applied to, for the backward pass.
    pub pre: Option<&'a mut [MaybeUninit<T>]>,
    /// `[R, outer]`: rows V, for the backward pass of gated experts.
    pub value: Option<&'a mut [MaybeUninit<T>]>,
}

/// The hidden units. The shape's `outer` is the hidden size.
///
/// # Errors
/// Lengths that do not agree with the shape, offsets that do not ascend within the rows.
pub fn hidden<T: Scalar>(
    input: Hidden<'_, T>,
    shape: GroupedShape,
    output: HiddenOutput<'_, T>,
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    let GroupedShape { experts, rows, inner, outer } = shape;
    input.rows.check("rows", rows, inner)?;
    check_len("weight", input.weight.len(), experts * inner * outer)?;
    if let Some(value) = input.value_weight {
        check_len("value_weight", value.len(), experts * inner * outer)?;
    }
    if let Some(bias) = input.bias {
        check_len("bias", bias.len(), experts * outer)?;
    }
    check_len("hidden", output.hidden.len(), rows * outer)?;
    if let (Some(value), None) = (&output.value, input.value_weight) {
        // There is nothing to write.
        check_len("value without value_weight", value.len(), 0)?;
    }
    for (name, saved) in [("pre", &output.pre), ("value", &output.value)] {
        saved.as_ref().map_or(Ok(()), |saved| check_len(name, saved.len(), rows * outer))?;
    }
    let cut = Cut::new(check_offsets(input.offsets, experts, rows)?, rows, outer, parallel);
    let tiles = cut.tiles(output.hidden);
    let pre_tiles = output.pre.map(|matrix| cut.tiles(matrix));
    let value_tiles = output.value.map(|matrix| cut.tiles(matrix));
    let level = Level::current();
    let weights = |data| Weights { data, inner, outer, transposed: input.transposed };
    let work = rows.saturating_mul(inner).saturating_mul(outer);
    each_task(worthwhile(parallel, work), cut.len(), &|claimed| {
        let mut scratch = Scratch::new();
        let mut kept = Vec::new();
        let mut claimed = claimed.peekable();
        while let Some(task) = claimed.next() {
            let mut output = tiles.take(task);
            let mut pre = pre_tiles.as_ref().map(|tiles| tiles.take(task));
            let mut value = value_tiles.as_ref().map(|tiles| tiles.take(task));
            let (Some(expert), rows, columns) = cut.tile(task) else {
                [Some(&mut output), pre.as_mut(), value.as_mut()].into_iter().flatten().for_each(fill_tile);
                continue;
            };
            let left = input.rows.factor(inner, rows.clone(), 0..inner);
            let term = Term { left, right: weights(input.weight).factor(expert, columns.clone()) };
            let bias = input.bias.map(|bias| &bias[expert * outer..][columns.clone()]);
            let activation = input.activation;
            let after = claimed.peek().and_then(|&task| {
                let (owner, _, columns) = cut.tile(task);
                owner.map(|expert| weights(input.weight).factor(expert, columns))
            });
            let Some(value_weight) = input.value_weight else {
                let mut epilogue = Epilogue::Activate { output, pre, bias, activation };
                T::multiply(level, &mut scratch, &[term], after, &mut epilogue);
                continue;
            };
            kept.resize(rows.len() * columns.len(), T::Accumulator::zero());
            let right = weights(value_weight).factor(expert, columns.clone());
            let columns = columns.len();
            let mut epilogue = Epilogue::Keep { kept: &mut kept, columns, pre, bias, activation };
            T::multiply(level, &mut scratch, &[term], Some(right), &mut epilogue);
            let mut epilogue = Epilogue::Gate { output, value, kept: &kept };
            T::multiply(level, &mut scratch, &[Term { left, right }], after, &mut epilogue);
        }
    });
    Ok(())
}

/// Inputs of [`hidden_grad`], with G = grad Wᵀ, the gradient of the hidden units where every routing weight is 1.
#[derive(Debug, Clone, Copy)]
pub struct HiddenGrad<'a, T: Scalar> {
    /// `[R, inner]`: gradient of the experts' outputs, before routing weights are applied.
    pub grad: RowsOf<'a, T>,
    /// The experts' second matrix W as grad is multiplied by it, `[E, inner, outer]`, or `[E, outer, inner]` when
    /// `transposed`.
    pub weight: &'a [T],
    /// `[E + 1]`: expert e owns rows `offsets[e]..offsets[e + 1]`.
    pub offsets: &'a [i64],
    /// The layout of `weight`.
    pub transposed: bool,
    /// act.
    pub activation: Activation,
    /// `[R, outer]`, as [`hidden`] gave it.
    pub pre: &'a [T],
    /// `[R, outer]`, of gated experts.
    pub value: Option<&'a [T]>,
    /// `[R]`: what the experts' outputs are multiplied by; 1 where it is missing.
    pub weights: Option<&'a [T::Accumulator]>,
}

/// Outputs of [`hidden_grad`], with h the hidden units; rows behind the last offset are zero.
pub struct HiddenGradOutput<'a, T: Scalar> {
    /// `[R, outer]`: weight * G * value * act'(pre).
    pub grad_pre: &'a mut [MaybeUninit<T>],
    /// `[R, outer]`: weight * G * act(pre), of gated experts.
    pub grad_value: Option<&'a mut [MaybeUninit<T>]>,
    /// `[R, outer]`: weight * h, the left factor of the second matrix's gradient.
    pub hidden: Option<&'a mut [MaybeUninit<T>]>,
    /// `[R]`: G . h, the gradient of the weights but for what the second bias adds.
    pub dots: Option<&'a mut [MaybeUninit<T::Accumulator>]>,
}

impl<T: Scalar> HiddenGrad<'_, T> {
    fn check(&self, shape: GroupedShape, output: &HiddenGradOutput<'_, T>) -> Result<(), Error> {
        let GroupedShape { experts, rows, inner, outer } = shape;
        let size = rows * outer;
        self.grad.check("grad", rows, inner)?;
        check_len("weight", self.weight.len(), experts * inner * outer)?;
        check_len("pre", self.pre.len(), size)?;
        let optional = [
            ("value", self.value.map(<[T]>::len), size),
            ("weights", self.weights.map(<[_]>::len), rows),
            ("grad_value", output.grad_value.as_ref().map(|output| output.len()), size),
            ("hidden", output.hidden.as_ref().map(|output| output.len()), size),
            ("dots", output.dots.as_ref().map(|output| output.len()), rows),
        ];
        check_len("grad_pre", output.grad_pre.len(), size)?;
        for (name, found, expected) in optional {
            found.map_or(Ok(()), |found| check_len(name, found, expected))?;
        }
        Ok(())
    }
}

/// The gradient of [`hidden`] and of what it was multiplied by. The shape's `outer` is the hidden size, `inner` the width of
/// the experts' outputs.
///
/// # Errors
/// Lengths that do not agree with the shape, offsets that do not ascend within the rows.
pub fn hidden_grad<T: Scalar>(
    input: &HiddenGrad<'_, T>,
    shape: GroupedShape,
    output: HiddenGradOutput<'_, T>,
    parallel: &dyn Parallel,
) -> Result<(), Error> {
    input.check(shape, &output)?;
    let GroupedShape { experts, rows, inner, outer } = shape;
    let cut = Cut::new(check_offsets(input.offsets, experts, rows)?, rows, outer, parallel);
    let tiles = cut.tiles(output.grad_pre);
    let value_tiles = output.grad_value.map(|matrix| cut.tiles(matrix));
    let hidden_tiles = output.hidden.map(|matrix| cut.tiles(matrix));
    let units = outer.div_ceil(Derive::<T>::UNIT);
    let mut partial = vec![T::Accumulator::zero(); if output.dots.is_some() { rows * units } else { 0 }];
    let dot_tiles = output.dots.is_some().then(|| cut.coarse_tiles(&mut partial, Derive::<T>::UNIT));
    let level = Level::current();
    let weights = Weights { data: input.weight, inner, outer, transposed: input.transposed };
    let work = rows.saturating_mul(inner).saturating_mul(outer);
    each_task(worthwhile(parallel, work), cut.len(), &|claimed| {
        let mut scratch = Scratch::new();
        let mut claimed = claimed.peekable();
        while let Some(task) = claimed.next() {
            let mut grad_pre = tiles.take(task);
            let mut grad_value = value_tiles.as_ref().map(|tiles| tiles.take(task));
            let mut hidden = hidden_tiles.as_ref().map(|tiles| tiles.take(task));
            let (Some(expert), rows, columns) = cut.tile(task) else {
                [Some(&mut grad_pre), grad_value.as_mut(), hidden.as_mut()].into_iter().flatten().for_each(fill_tile);
                continue;
            };
            let left = input.grad.factor(inner, rows, 0..inner);
            let term = Term { left, right: weights.factor(expert, columns) };
            let after = claimed.peek().and_then(|&task| {
                let (owner, _, columns) = cut.tile(task);
                owner.map(|expert| weights.factor(expert, columns))
            });
            let mut epilogue = Epilogue::Derive(Box::new(Derive {
                activation: input.activation,
                pre: input.pre,
                value: input.value,
                weights: input.weights,
                hidden_size: outer,
                grad_pre,
                grad_value,
                hidden,
                dots: dot_tiles.as_ref().map(|tiles| tiles.take(task)),
            }));
            T::multiply(level, &mut scratch, &[term], after, &mut epilogue);
        }
    });
    drop(dot_tiles);
    if let Some(dots) = output.dots {
        // By index, so that every dot is written where there are no hidden units too.
        for (row, dot) in dots.iter_mut().enumerate() {
            dot.write(partial[row * units..(row + 1) * units].iter().copied().sum());
        }
    }
    Ok(())
}
