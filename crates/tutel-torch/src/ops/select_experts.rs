//! Logits `[T, E]` to the K best experts of each token.
use torch_stable::{Cpu, Error, Kernel, Op, Tensor, UninitTensor};
use tutel_core::RoutingShape;
use tutel_cpu::SelectOutput;

use crate::arguments::{refused, score_function, size_argument, sizes_of, slice_of};
use crate::scalar::{TorchScalar, with_scalar};
use crate::threads::TorchThreads;

pub(crate) struct SelectExperts;

impl Op for SelectExperts {
    /// Returns ids `[T, K]` int32, weights `[T, K]`, the largest score `[T]` and the sum of scores `[E]`.
    const SCHEMA: &'static str = "select_experts(Tensor logits, SymInt top_k, bool softmax, bool normalize) \
                                  -> (Tensor, Tensor, Tensor, Tensor)";
    type Args = (Tensor, i64, bool, bool);
    type Output = (Tensor, Tensor, Tensor, Tensor);
}

impl Kernel<Cpu> for SelectExperts {
    fn call(args: Self::Args) -> Result<Self::Output, Error> {
        with_scalar!(args.0, "logits", select(args))
    }
}

fn select<T: TorchScalar>(
    (logits, top_k, softmax, normalize): <SelectExperts as Op>::Args,
) -> Result<<SelectExperts as Op>::Output, Error> {
    let [tokens, experts] = sizes_of(&logits, "logits")?;
    let shape = RoutingShape::new(tokens, experts, size_argument(top_k, "top_k")?).map_err(refused)?;
    let device = logits.device();
    let mut ids = UninitTensor::<i32>::new(&[tokens, shape.top_k], device)?;
    let mut weights = UninitTensor::<T::Accumulator>::new(&[tokens, shape.top_k], device)?;
    let mut top_scores = UninitTensor::<T::Accumulator>::new(&[tokens], device)?;
    let mut score_sums = UninitTensor::<T::Accumulator>::new(&[experts], device)?;
    let output = SelectOutput {
        ids: ids.as_uninit_mut()?,
        weights: weights.as_uninit_mut()?,
        top_scores: top_scores.as_uninit_mut()?,
        score_sums: score_sums.as_uninit_mut()?,
    };
    let logits = slice_of::<T>(&logits, "logits")?;
    tutel_cpu::select_experts(logits, shape, score_function(softmax), normalize, output, &TorchThreads)
        .map_err(refused)?;
    Ok((ids.into_tensor(), weights.into_tensor(), top_scores.into_tensor(), score_sums.into_tensor()))
}
