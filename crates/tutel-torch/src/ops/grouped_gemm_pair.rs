//! The sum of two products with one matrix an expert each.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::GroupedShape;

use crate::arguments::{optional_slice, refused, same_size, sizes_of, slice_of};
use crate::scalar::{TorchScalar, with_scalar};
use crate::threads::TorchThreads;

pub(crate) struct GroupedGemmPair;

impl Op for GroupedGemmPair {
    /// As `grouped_gemm` twice and an addition, rounded once.
    const SCHEMA: &'static str = "grouped_gemm_pair(Tensor rows, Tensor weight, Tensor other_rows, \
                                  Tensor other_weight, Tensor offsets, bool transposed) -> Tensor";
    type Args = (Tensor, Tensor, Tensor, Tensor, Tensor, bool);
    type Output = Tensor;
}

impl Kernel<Cpu> for GroupedGemmPair {
    fn call(args: Self::Args) -> Result<Tensor, Error> {
        with_scalar!(args.0, "rows", grouped_gemm_pair(args))
    }
}

fn grouped_gemm_pair<T: TorchScalar>(
    (rows, weight, other_rows, other_weight, offsets, transposed): <GroupedGemmPair as Op>::Args,
) -> Result<Tensor, Error> {
    let [num_rows, width] = sizes_of(&rows, "rows")?;
    let [experts, first, second] = sizes_of(&weight, "weight")?;
    let (inner, outer) = if transposed { (second, first) } else { (first, second) };
    same_size("the width of rows and the inner size of weight", width, inner)?;
    let shape = GroupedShape::new(experts, num_rows, inner, outer).map_err(refused)?;
    let mut output = UninitTensor::<T>::new(&[num_rows, outer], rows.device())?;
    let other: Option<&[T]> = optional_slice(Some(&other_rows), "other_rows", &[num_rows, inner])?;
    let other_weight = optional_slice(Some(&other_weight), "other_weight", &[experts, first, second])?;
    let input = tutel_cpu::GroupedGemm::<T> {
        rows: slice_of(&rows, "rows")?.into(),
        weight: slice_of(&weight, "weight")?,
        second: other.map(Into::into).zip(other_weight),
        bias: None,
        offsets: slice_of(&offsets, "offsets")?,
        transposed,
    };
    tutel_cpu::grouped_gemm(input, shape, output.as_uninit_mut()?, &TorchThreads).map_err(refused)?;
    Ok(output.into_tensor())
}
