//! Running counts of an integer mask.
use torch_stable::{Cpu, DType, Element, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_cpu::Along;

use crate::arguments::{refused, sizes_of, slice_of};
use crate::threads::TorchThreads;

pub(crate) struct PrefixCount;

impl Op for PrefixCount {
    /// Mask `[rows, columns]` of integers: its cumulative sum along dimension 0 or 1, minus 1, in int64.
    const SCHEMA: &'static str = "prefix_count(Tensor mask, int dim) -> Tensor";
    type Args = (Tensor, i64);
    type Output = Tensor;
}

impl Kernel<Cpu> for PrefixCount {
    fn call(args: Self::Args) -> Result<Tensor, Error> {
        match args.0.dtype() {
            DType::Int64 => count::<i64>(args),
            DType::Int32 => count::<i32>(args),
            DType::Int16 => count::<i16>(args),
            DType::Int8 => count::<i8>(args),
            DType::UInt8 => count::<u8>(args),
            other => Err(Error::kernel(format!("mask must be int64, int32, int16, int8 or uint8, got {other}"))),
        }
    }
}

fn count<M: Element + Into<i64>>((mask, dim): <PrefixCount as Op>::Args) -> Result<Tensor, Error> {
    let [rows, columns] = sizes_of(&mask, "mask")?;
    let along = match dim {
        0 => Along::Columns,
        1 => Along::Rows,
        _ => return Err(Error::kernel(format!("dim must be 0 or 1, got {dim}"))),
    };
    let mut output = UninitTensor::<i64>::new(&[rows, columns], mask.device())?;
    let mask = slice_of::<M>(&mask, "mask")?;
    tutel_cpu::prefix_count(mask, (rows, columns), along, output.as_uninit_mut()?, &TorchThreads).map_err(refused)?;
    Ok(output.into_tensor())
}
