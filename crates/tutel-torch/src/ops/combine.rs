//! Rows `[R, D]` back to tokens `[T, D]`.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::RowShape;

use crate::arguments::{optional_slice, refused, sizes_of, slice_of};
use crate::scalar::{TorchScalar, with_scalar};
use crate::threads::TorchThreads;

pub(crate) struct Combine;

impl Op for Combine {
    /// Token t is the (weighted) sum of the rows that `row_index[t]` names; -1 names none.
    const SCHEMA: &'static str = "combine(Tensor rows, Tensor row_index, Tensor? weights) -> Tensor";
    type Args = (Tensor, Tensor, Option<Tensor>);
    type Output = Tensor;
}

impl Kernel<Cpu> for Combine {
    fn call(args: Self::Args) -> Result<Tensor, Error> {
        with_scalar!(args.0, "rows", combine(args))
    }
}

fn combine<T: TorchScalar>((rows, row_index, weights): <Combine as Op>::Args) -> Result<Tensor, Error> {
    let [num_rows, width] = sizes_of(&rows, "rows")?;
    let [tokens, top_k] = sizes_of(&row_index, "row_index")?;
    let shape = RowShape::new(tokens, num_rows, width, top_k).map_err(refused)?;
    let mut output = UninitTensor::<T>::new(&[tokens, width], rows.device())?;
    tutel_cpu::combine(
        slice_of::<T>(&rows, "rows")?,
        slice_of(&row_index, "row_index")?,
        optional_slice(weights.as_ref(), "weights", &[tokens, top_k])?,
        shape,
        output.as_uninit_mut()?,
        &TorchThreads,
    )
    .map_err(refused)?;
    Ok(output.into_tensor())
}
