//! The gradient of the logits.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::RoutingShape;
use tutel_cpu::SelectBackward;

use crate::arguments::{optional_slice, refused, same_size, score_function, sizes_of, slice_of};
use crate::scalar::{TorchScalar, with_scalar};
use crate::threads::TorchThreads;

pub(crate) struct SelectExpertsBackward;

impl Op for SelectExpertsBackward {
    const SCHEMA: &'static str = "select_experts_backward(Tensor logits, Tensor topk_ids, Tensor? grad_weights, \
                                  Tensor? grad_score_sums, bool softmax, bool normalize) -> Tensor";
    type Args = (Tensor, Tensor, Option<Tensor>, Option<Tensor>, bool, bool);
    type Output = Tensor;
}

impl Kernel<Cpu> for SelectExpertsBackward {
    fn call(args: Self::Args) -> Result<Tensor, Error> {
        with_scalar!(args.0, "logits", backward(args))
    }
}

fn backward<T: TorchScalar>(
    (logits, topk_ids, grad_weights, grad_score_sums, softmax, normalize): <SelectExpertsBackward as Op>::Args,
) -> Result<Tensor, Error> {
    let [tokens, experts] = sizes_of(&logits, "logits")?;
    let [rows, top_k] = sizes_of(&topk_ids, "topk_ids")?;
    same_size("the numbers of tokens of logits and topk_ids", tokens, rows)?;
    let shape = RoutingShape::new(tokens, experts, top_k).map_err(refused)?;
    let mut output = UninitTensor::<T>::new(&[tokens, experts], logits.device())?;
    let input = SelectBackward::<T> {
        logits: slice_of(&logits, "logits")?,
        ids: slice_of(&topk_ids, "topk_ids")?,
        grad_weights: optional_slice(grad_weights.as_ref(), "grad_weights", &[tokens, top_k])?,
        grad_score_sums: optional_slice(grad_score_sums.as_ref(), "grad_score_sums", &[experts])?,
        function: score_function(softmax),
        normalize,
    };
    tutel_cpu::select_experts_backward(&input, shape, output.as_uninit_mut()?, &TorchThreads).map_err(refused)?;
    Ok(output.into_tensor())
}
