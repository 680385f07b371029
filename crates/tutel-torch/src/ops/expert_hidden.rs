//! The experts' hidden units.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::GroupedShape;
use tutel_cpu::{Hidden, HiddenOutput, RowsOf};

use crate::arguments::{activation_argument, optional_slice, refused, same_size, size_argument, sizes_of, slice_of};
use crate::ops::gather::gather;
use crate::scalar::{TorchScalar, with_scalar};
use crate::threads::TorchThreads;

pub(crate) struct ExpertHidden;

impl Op for ExpertHidden {
    /// `act(rows W + bias)`, times `rows V` for gated experts. Rows `[R, inner]`, or tokens `[T, inner]` and the choice
    /// of each row, `[R]`; W and V `[E, inner, outer]` (`[E, outer, inner]` when transposed). Returns the hidden units
    /// `[R, outer]` and, to save for the gradient, what act was applied to and `rows V`: empty where not asked for.
    const SCHEMA: &'static str = "expert_hidden(Tensor rows, Tensor? row_choice, SymInt top_k, Tensor weight, \
                                  Tensor? bias, Tensor? value_weight, Tensor offsets, bool transposed, \
                                  int activation, bool save) -> (Tensor, Tensor, Tensor)";
    type Args = (Tensor, Option<Tensor>, i64, Tensor, Option<Tensor>, Option<Tensor>, Tensor, bool, i64, bool);
    type Output = (Tensor, Tensor, Tensor);
}

impl Kernel<Cpu> for ExpertHidden {
    fn call(args: Self::Args) -> Result<Self::Output, Error> {
        with_scalar!(args.0, "rows", expert_hidden(args))
    }
}

fn expert_hidden<T: TorchScalar>(
    (rows, row_choice, top_k, weight, bias, value_weight, offsets, transposed, activation, save): <ExpertHidden as Op>::Args,
) -> Result<<ExpertHidden as Op>::Output, Error> {
    let [height, width] = sizes_of(&rows, "rows")?;
    let [experts, first, second] = sizes_of(&weight, "weight")?;
    let (inner, outer) = if transposed { (second, first) } else { (first, second) };
    same_size("the width of rows and the inner size of weight", width, inner)?;
    let index = gather(row_choice.as_ref(), size_argument(top_k, "top_k")?, height)?;
    let num_rows = index.as_ref().map_or(height, Vec::len);
    let shape = GroupedShape::new(experts, num_rows, inner, outer).map_err(refused)?;
    let sizes = |wanted: bool| if wanted { [num_rows, outer] } else { [0, 0] };
    let mut output = UninitTensor::<T>::new(&sizes(true), rows.device())?;
    let mut pre = UninitTensor::<T>::new(&sizes(save), rows.device())?;
    let mut value = UninitTensor::<T>::new(&sizes(save && value_weight.is_some()), rows.device())?;
    let input = Hidden::<T> {
        rows: RowsOf { matrix: slice_of(&rows, "rows")?, index: index.as_deref() },
        weight: slice_of(&weight, "weight")?,
        bias: optional_slice(bias.as_ref(), "bias", &[experts, outer])?,
        value_weight: optional_slice(value_weight.as_ref(), "value_weight", &[experts, first, second])?,
        offsets: slice_of(&offsets, "offsets")?,
        transposed,
        activation: activation_argument(activation)?,
    };
    let results = HiddenOutput {
        hidden: output.as_uninit_mut()?,
        pre: save.then(|| pre.as_uninit_mut()).transpose()?,
        value: (save && value_weight.is_some()).then(|| value.as_uninit_mut()).transpose()?,
    };
    tutel_cpu::hidden(input, shape, results, &TorchThreads).map_err(refused)?;
    Ok((output.into_tensor(), pre.into_tensor(), value.into_tensor()))
}
