//! The gradient of the experts' hidden units and of the routing weights.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::GroupedShape;
use tutel_cpu::{HiddenGrad, HiddenGradOutput, RowsOf};

use crate::arguments::{activation_argument, optional_slice, refused, same_size, sizes_of, slice_of};
use crate::ops::gather::gather;
use crate::scalar::{TorchScalar, with_scalar};
use crate::threads::TorchThreads;

pub(crate) struct ExpertHiddenGrad;

impl Op for ExpertHiddenGrad {
    /// With G = grad Wᵀ: grad of the experts' output rows `[R, D]`, or of their tokens `[T, D]` with the choice of each row
    /// `[R]` and the weights of choices `[T, K]`; W `[E, H, D]` (`[E, D, H]` when transposed); pre and value as
    /// `expert_hidden` saved them. Returns weight * G * value * act'(pre), weight * G * act(pre), the hidden units times
    /// the weight, all `[R, H]`, and the weights' gradient `[T, K]` but for what a bias behind W adds: empty where it does
    /// not apply or is not asked for.
    const SCHEMA: &'static str = "expert_hidden_grad(Tensor grad, Tensor? row_choice, Tensor? weights, Tensor weight, \
                                  bool transposed, Tensor offsets, int activation, Tensor pre, Tensor? value, \
                                  bool hidden) -> (Tensor, Tensor, Tensor, Tensor)";
    type Args = (Tensor, Option<Tensor>, Option<Tensor>, Tensor, bool, Tensor, i64, Tensor, Option<Tensor>, bool);
    type Output = (Tensor, Tensor, Tensor, Tensor);
}

impl Kernel<Cpu> for ExpertHiddenGrad {
    fn call(args: Self::Args) -> Result<Self::Output, Error> {
        with_scalar!(args.0, "grad", hidden_grad(args))
    }
}

fn hidden_grad<T: TorchScalar>(
    (grad, row_choice, weights, weight, transposed, offsets, activation, pre, value, hidden): <ExpertHiddenGrad as Op>::Args,
) -> Result<<ExpertHiddenGrad as Op>::Output, Error> {
    let [height, width] = sizes_of(&grad, "grad")?;
    let [num_rows, outer] = sizes_of(&pre, "pre")?;
    let [experts, first, second] = sizes_of(&weight, "weight")?;
    // The product is with the transposed matrix.
    let (found_outer, inner) = if transposed { (second, first) } else { (first, second) };
    same_size("the width of grad and of the experts' output", width, inner)?;
    same_size("the width of pre and the hidden size of weight", outer, found_outer)?;
    if row_choice.is_some() != weights.is_some() {
        return Err(Error::kernel("row_choice and weights must be given together"));
    }
    let [tokens, top_k] = weights.as_ref().map_or(Ok([0, 0]), |weights| sizes_of(weights, "weights"))?;
    let index = gather(row_choice.as_ref(), top_k, height)?;
    same_size("the numbers of rows of pre and grad", num_rows, index.as_ref().map_or(height, Vec::len))?;
    let shape = GroupedShape::new(experts, num_rows, inner, outer).map_err(refused)?;
    let choices: &[i64] =
        row_choice.as_ref().map(|choices| slice_of(choices, "row_choice")).transpose()?.unwrap_or(&[]);
    let weights: Option<&[T::Accumulator]> = optional_slice(weights.as_ref(), "weights", &[height, top_k])?;
    // `gather` has checked the choices.
    let row_weights = weights.map(|weights| tutel_cpu::by_row(weights, choices));
    let sizes = |wanted: bool| if wanted { [num_rows, outer] } else { [0, 0] };
    let mut grad_pre = UninitTensor::<T>::new(&sizes(true), grad.device())?;
    let mut grad_value = UninitTensor::<T>::new(&sizes(value.is_some()), grad.device())?;
    let mut weighted = UninitTensor::<T>::new(&sizes(hidden), grad.device())?;
    let mut grad_weights = UninitTensor::<T::Accumulator>::new(&[tokens, top_k], grad.device())?;
    let mut dots = row_weights.is_some().then(|| Box::<[T::Accumulator]>::new_uninit_slice(num_rows));
    let input = HiddenGrad::<T> {
        grad: RowsOf { matrix: slice_of(&grad, "grad")?, index: index.as_deref() },
        weight: slice_of(&weight, "weight")?,
        offsets: slice_of(&offsets, "offsets")?,
        transposed: !transposed,
        activation: activation_argument(activation)?,
        pre: slice_of(&pre, "pre")?,
        value: optional_slice(value.as_ref(), "value", &[num_rows, outer])?,
        weights: row_weights.as_deref(),
    };
    let output = HiddenGradOutput {
        grad_pre: grad_pre.as_uninit_mut()?,
        grad_value: value.is_some().then(|| grad_value.as_uninit_mut()).transpose()?,
        hidden: hidden.then(|| weighted.as_uninit_mut()).transpose()?,
        dots: dots.as_deref_mut(),
    };
    tutel_cpu::hidden_grad(&input, shape, output, &TorchThreads).map_err(refused)?;
    if let Some(dots) = dots {
        let by_choice = grad_weights.as_uninit_mut()?;
        by_choice.fill(std::mem::MaybeUninit::new(T::Accumulator::default()));
        tutel_cpu::by_choice(&dots, choices, by_choice);
    }
    Ok((grad_pre.into_tensor(), grad_value.into_tensor(), weighted.into_tensor(), grad_weights.into_tensor()))
}
