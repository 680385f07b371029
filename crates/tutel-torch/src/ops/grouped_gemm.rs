//! Ragged rows times one matrix an expert.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::GroupedShape;

use crate::arguments::{optional_slice, refused, same_size, sizes_of, slice_of};
use crate::scalar::{TorchScalar, with_scalar};
use crate::threads::TorchThreads;

pub(crate) struct GroupedGemm;

impl Op for GroupedGemm {
    /// Rows `[R, inner]`, weight `[E, inner, outer]` (`[E, outer, inner]` when transposed), bias `[E, outer]`,
    /// offsets `[E + 1]`: `[R, outer]`, zero behind the last offset.
    const SCHEMA: &'static str =
        "grouped_gemm(Tensor rows, Tensor weight, Tensor? bias, Tensor offsets, bool transposed) -> Tensor";
    type Args = (Tensor, Tensor, Option<Tensor>, Tensor, bool);
    type Output = Tensor;
}

impl Kernel<Cpu> for GroupedGemm {
    fn call(args: Self::Args) -> Result<Tensor, Error> {
        with_scalar!(args.0, "rows", grouped_gemm(args))
    }
}

fn grouped_gemm<T: TorchScalar>(
    (rows, weight, bias, offsets, transposed): <GroupedGemm as Op>::Args,
) -> Result<Tensor, Error> {
    let [num_rows, width] = sizes_of(&rows, "rows")?;
    let [experts, first, second] = sizes_of(&weight, "weight")?;
    let (inner, outer) = if transposed { (second, first) } else { (first, second) };
    same_size("the width of rows and the inner size of weight", width, inner)?;
    let shape = GroupedShape::new(experts, num_rows, inner, outer).map_err(refused)?;
    let mut output = UninitTensor::<T>::new(&[num_rows, outer], rows.device())?;
    let input = tutel_cpu::GroupedGemm::<T> {
        rows: slice_of(&rows, "rows")?.into(),
        weight: slice_of(&weight, "weight")?,
        second: None,
        bias: optional_slice(bias.as_ref(), "bias", &[experts, outer])?,
        offsets: slice_of(&offsets, "offsets")?,
        transposed,
    };
    tutel_cpu::grouped_gemm(input, shape, output.as_uninit_mut()?, &TorchThreads).map_err(refused)?;
    Ok(output.into_tensor())
}
