//! Tokens `[T, D]` to rows `[R, D]`.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::RowShape;

use crate::arguments::{optional_slice, refused, size_argument, sizes_of, slice_of};
use crate::scalar::{TorchScalar, with_scalar};
use crate::threads::TorchThreads;

pub(crate) struct Dispatch;

impl Op for Dispatch {
    /// Row r is token `row_choice[r] / top_k`, times the choice's weight if there are weights.
    const SCHEMA: &'static str = "dispatch(Tensor tokens, Tensor row_choice, Tensor? weights, SymInt top_k) -> Tensor";
    type Args = (Tensor, Tensor, Option<Tensor>, i64);
    type Output = Tensor;
}

impl Kernel<Cpu> for Dispatch {
    fn call(args: Self::Args) -> Result<Tensor, Error> {
        with_scalar!(args.0, "tokens", dispatch(args))
    }
}

fn dispatch<T: TorchScalar>((tokens, row_choice, weights, top_k): <Dispatch as Op>::Args) -> Result<Tensor, Error> {
    let [num_tokens, width] = sizes_of(&tokens, "tokens")?;
    let [rows] = sizes_of(&row_choice, "row_choice")?;
    let top_k = size_argument(top_k, "top_k")?;
    let shape = RowShape::new(num_tokens, rows, width, top_k).map_err(refused)?;
    let mut output = UninitTensor::<T>::new(&[rows, width], tokens.device())?;
    tutel_cpu::dispatch(
        slice_of::<T>(&tokens, "tokens")?,
        slice_of(&row_choice, "row_choice")?,
        optional_slice(weights.as_ref(), "weights", &[num_tokens, top_k])?,
        shape,
        output.as_uninit_mut()?,
        &TorchThreads,
    )
    .map_err(refused)?;
    Ok(output.into_tensor())
}
