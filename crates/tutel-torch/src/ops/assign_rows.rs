//! Chosen experts to slots, counts and rows.
use torch_stable::{Cpu, DType, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::{Real, RoutingShape};
use tutel_cpu::AssignOutput;

use crate::arguments::{optional_slice, refused, size_argument, sizes_of, slice_of};
use crate::threads::TorchThreads;

pub(crate) struct AssignRows;

impl Op for AssignRows {
    /// A capacity of -1 drops nothing. Returns `slots [T, K]` in int32 and, all in int64, `tokens_per_expert [E]`,
    /// `first_choices [E]`, `offsets [E + 1]`, `row_index [T, K]`, `row_choice [T * K]`.
    const SCHEMA: &'static str = "assign_rows(Tensor topk_ids, Tensor? priority, SymInt num_experts, \
                                  SymInt capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
    type Args = (Tensor, Option<Tensor>, i64, i64);
    type Output = (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor);
}

impl Kernel<Cpu> for AssignRows {
    fn call(args: Self::Args) -> Result<Self::Output, Error> {
        match args.1.as_ref().map(Tensor::dtype) {
            None | Some(DType::Float32) => assign::<f32>(args),
            Some(DType::Float64) => assign::<f64>(args),
            Some(other) => {
                Err(Error::kernel(format!("priority must be float32 or float64 (as top_scores), got {other}")))
            }
        }
    }
}

fn assign<A: Real + torch_stable::Element>(
    (topk_ids, priority, num_experts, capacity): <AssignRows as Op>::Args,
) -> Result<<AssignRows as Op>::Output, Error> {
    let [tokens, top_k] = sizes_of(&topk_ids, "topk_ids")?;
    let experts = size_argument(num_experts, "num_experts")?;
    let capacity = match capacity {
        -1 => None,
        capacity => Some(size_argument(capacity, "capacity (-1 means unlimited)")?),
    };
    let shape = RoutingShape::new(tokens, experts, top_k).map_err(refused)?;
    let device = topk_ids.device();
    let int64 = |sizes: &[usize]| UninitTensor::<i64>::new(sizes, device);
    let mut slots = UninitTensor::<i32>::new(&[tokens, top_k], device)?;
    let mut tokens_per_expert = int64(&[experts])?;
    let mut first_choices = int64(&[experts])?;
    let mut offsets = int64(&[experts + 1])?;
    let mut row_index = int64(&[tokens, top_k])?;
    let mut row_choice = int64(&[shape.choices()])?;
    let output = AssignOutput {
        slots: slots.as_uninit_mut()?,
        tokens_per_expert: tokens_per_expert.as_uninit_mut()?,
        first_choices: first_choices.as_uninit_mut()?,
        offsets: offsets.as_uninit_mut()?,
        row_index: row_index.as_uninit_mut()?,
        row_choice: row_choice.as_uninit_mut()?,
    };
    let ids = slice_of(&topk_ids, "topk_ids")?;
    let priority = optional_slice::<A>(priority.as_ref(), "priority", &[tokens])?;
    tutel_cpu::assign_rows(ids, priority, shape, capacity, output, &TorchThreads).map_err(refused)?;
    Ok((
        slots.into_tensor(),
        tokens_per_expert.into_tensor(),
        first_choices.into_tensor(),
        offsets.into_tensor(),
        row_index.into_tensor(),
        row_choice.into_tensor(),
    ))
}
