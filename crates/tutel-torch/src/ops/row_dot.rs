//! The gradient of combine's weights.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::RowShape;

use crate::arguments::{refused, same_size, sizes_of, slice_of};
use crate::scalar::{TorchScalar, with_scalar};
use crate::threads::TorchThreads;

pub(crate) struct RowDot;

impl Op for RowDot {
    /// `[T, K]`: the inner product of each token with each of its rows, 0 where `row_index` is -1.
    const SCHEMA: &'static str = "row_dot(Tensor rows, Tensor row_index, Tensor tokens) -> Tensor";
    type Args = (Tensor, Tensor, Tensor);
    type Output = Tensor;
}

impl Kernel<Cpu> for RowDot {
    fn call(args: Self::Args) -> Result<Tensor, Error> {
        with_scalar!(args.0, "rows", row_dot(args))
    }
}

fn row_dot<T: TorchScalar>((rows, row_index, tokens): <RowDot as Op>::Args) -> Result<Tensor, Error> {
    let [num_rows, width] = sizes_of(&rows, "rows")?;
    let [indexed, top_k] = sizes_of(&row_index, "row_index")?;
    let [num_tokens, token_width] = sizes_of(&tokens, "tokens")?;
    same_size("the widths of rows and tokens", width, token_width)?;
    same_size("the numbers of tokens of row_index and tokens", indexed, num_tokens)?;
    let shape = RowShape::new(num_tokens, num_rows, width, top_k).map_err(refused)?;
    let mut output = UninitTensor::<T::Accumulator>::new(&[num_tokens, top_k], rows.device())?;
    tutel_cpu::row_dot(
        slice_of::<T>(&rows, "rows")?,
        slice_of(&row_index, "row_index")?,
        slice_of::<T>(&tokens, "tokens")?,
        shape,
        output.as_uninit_mut()?,
        &TorchThreads,
    )
    .map_err(refused)?;
    Ok(output.into_tensor())
}
