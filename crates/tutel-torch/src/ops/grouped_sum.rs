//! The gradient of the experts' biases.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};

use crate::arguments::{refused, sizes_of, slice_of};
use crate::scalar::{TorchScalar, with_scalar};
use crate::threads::TorchThreads;

pub(crate) struct GroupedSum;

impl Op for GroupedSum {
    /// Rows `[R, width]`: `[E, width]`, the sum of each expert's rows.
    const SCHEMA: &'static str = "grouped_sum(Tensor rows, Tensor offsets) -> Tensor";
    type Args = (Tensor, Tensor);
    type Output = Tensor;
}

impl Kernel<Cpu> for GroupedSum {
    fn call(args: Self::Args) -> Result<Tensor, Error> {
        with_scalar!(args.0, "rows", grouped_sum(args))
    }
}

fn grouped_sum<T: TorchScalar>((rows, offsets): <GroupedSum as Op>::Args) -> Result<Tensor, Error> {
    let [num_rows, width] = sizes_of(&rows, "rows")?;
    let [boundaries] = sizes_of(&offsets, "offsets")?;
    let mut output = UninitTensor::<T>::new(&[boundaries.saturating_sub(1), width], rows.device())?;
    tutel_cpu::grouped_sum(
        slice_of::<T>(&rows, "rows")?,
        slice_of(&offsets, "offsets")?,
        (num_rows, width),
        output.as_uninit_mut()?,
        &TorchThreads,
    )
    .map_err(refused)?;
    Ok(output.into_tensor())
}
