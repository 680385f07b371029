//! Slots to rows of a padded layout.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::{RoutingShape, checked_product};

use crate::arguments::{refused, size_argument, sizes_of, slice_of};

pub(crate) struct PaddedRows;

impl Op for PaddedRows {
    /// Ids and slots `[T, K]` in int32. Returns, in int64, `row_index [T, K]` and its inverse `row_choice [E * capacity]`.
    const SCHEMA: &'static str = "padded_rows(Tensor topk_ids, Tensor slots, SymInt num_experts, SymInt capacity) \
                                  -> (Tensor, Tensor)";
    type Args = (Tensor, Tensor, i64, i64);
    type Output = (Tensor, Tensor);
}

impl Kernel<Cpu> for PaddedRows {
    fn call((topk_ids, slots, num_experts, capacity): Self::Args) -> Result<Self::Output, Error> {
        let [tokens, top_k] = sizes_of(&topk_ids, "topk_ids")?;
        let experts = size_argument(num_experts, "num_experts")?;
        let capacity = size_argument(capacity, "capacity")?;
        // Choices made elsewhere may name one expert twice: K is not limited to E here.
        checked_product("topk_ids", &[tokens, top_k]).map_err(refused)?;
        let rows = checked_product("padded rows", &[experts, capacity]).map_err(refused)?;
        let shape = RoutingShape { tokens, experts, top_k };
        let mut row_index = UninitTensor::<i64>::new(&[tokens, top_k], topk_ids.device())?;
        let mut row_choice = UninitTensor::<i64>::new(&[rows], topk_ids.device())?;
        tutel_cpu::padded_rows(
            slice_of(&topk_ids, "topk_ids")?,
            slice_of(&slots, "slots")?,
            shape,
            capacity,
            row_index.as_uninit_mut()?,
            row_choice.as_uninit_mut()?,
        )
        .map_err(refused)?;
        Ok((row_index.into_tensor(), row_choice.into_tensor()))
    }
}
