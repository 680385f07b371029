//! The gradient of the experts' matrices.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::GroupedShape;
use tutel_cpu::RowsOf;

use crate::arguments::{refused, same_size, size_argument, sizes_of, slice_of};
use crate::ops::gather::gather;
use crate::scalar::{TorchScalar, with_scalar};
use crate::threads::TorchThreads;

pub(crate) struct GroupedGemmWeightGrad;

impl Op for GroupedGemmWeightGrad {
    /// Left `[R, inner]`, right `[R, outer]`: `[E, inner, outer]`, the product left^T right over each expert's rows. A factor
    /// with the choice of each row, `[R]`, is that row's token of a matrix `[T, .]`.
    const SCHEMA: &'static str = "grouped_gemm_weight_grad(Tensor left, Tensor right, Tensor offsets, \
                                  Tensor? left_choice, Tensor? right_choice, SymInt top_k) -> Tensor";
    type Args = (Tensor, Tensor, Tensor, Option<Tensor>, Option<Tensor>, i64);
    type Output = Tensor;
}

impl Kernel<Cpu> for GroupedGemmWeightGrad {
    fn call(args: Self::Args) -> Result<Tensor, Error> {
        with_scalar!(args.0, "left", weight_grad(args))
    }
}

fn weight_grad<T: TorchScalar>(
    (left, right, offsets, left_choice, right_choice, top_k): <GroupedGemmWeightGrad as Op>::Args,
) -> Result<Tensor, Error> {
    let [left_height, inner] = sizes_of(&left, "left")?;
    let [right_height, outer] = sizes_of(&right, "right")?;
    let top_k = size_argument(top_k, "top_k")?;
    let left_index = gather(left_choice.as_ref(), top_k, left_height)?;
    let right_index = gather(right_choice.as_ref(), top_k, right_height)?;
    let rows = left_index.as_ref().map_or(left_height, Vec::len);
    let right_rows = right_index.as_ref().map_or(right_height, Vec::len);
    same_size("the numbers of rows of left and right", rows, right_rows)?;
    let [boundaries] = sizes_of(&offsets, "offsets")?;
    let experts = boundaries.saturating_sub(1);
    let shape = GroupedShape::new(experts, rows, inner, outer).map_err(refused)?;
    let mut output = UninitTensor::<T>::new(&[experts, inner, outer], left.device())?;
    tutel_cpu::grouped_gemm_weight_grad(
        RowsOf { matrix: slice_of::<T>(&left, "left")?, index: left_index.as_deref() },
        RowsOf { matrix: slice_of::<T>(&right, "right")?, index: right_index.as_deref() },
        slice_of(&offsets, "offsets")?,
        shape,
        output.as_uninit_mut()?,
        &TorchThreads,
    )
    .map_err(refused)?;
    Ok(output.into_tensor())
}
