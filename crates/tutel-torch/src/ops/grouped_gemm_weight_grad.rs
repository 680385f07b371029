//! The gradient of the experts' matrices.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::GroupedShape;

use crate::arguments::{refused, same_size, sizes_of, slice_of};
use crate::scalar::{TorchScalar, with_scalar};
use crate::threads::TorchThreads;

pub(crate) struct GroupedGemmWeightGrad;

impl Op for GroupedGemmWeightGrad {
    /// Left `[R, inner]`, right `[R, outer]`: `[E, inner, outer]`, the product left^T right over each expert's rows.
    const SCHEMA: &'static str = "grouped_gemm_weight_grad(Tensor left, Tensor right, Tensor offsets) -> Tensor";
    type Args = (Tensor, Tensor, Tensor);
    type Output = Tensor;
}

impl Kernel<Cpu> for GroupedGemmWeightGrad {
    fn call(args: Self::Args) -> Result<Tensor, Error> {
        with_scalar!(args.0, "left", weight_grad(args))
    }
}

fn weight_grad<T: TorchScalar>((left, right, offsets): <GroupedGemmWeightGrad as Op>::Args) -> Result<Tensor, Error> {
    let [rows, inner] = sizes_of(&left, "left")?;
    let [right_rows, outer] = sizes_of(&right, "right")?;
    same_size("the numbers of rows of left and right", rows, right_rows)?;
    let [boundaries] = sizes_of(&offsets, "offsets")?;
    let experts = boundaries.saturating_sub(1);
    let shape = GroupedShape::new(experts, rows, inner, outer).map_err(refused)?;
    let mut output = UninitTensor::<T>::new(&[experts, inner, outer], left.device())?;
    tutel_cpu::grouped_gemm_weight_grad(
        slice_of::<T>(&left, "left")?.into(),
        slice_of::<T>(&right, "right")?.into(),
        slice_of(&offsets, "offsets")?,
        shape,
        output.as_uninit_mut()?,
        &TorchThreads,
    )
    .map_err(refused)?;
    Ok(output.into_tensor())
}
