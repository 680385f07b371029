//! The model: a layer whose outputs are summed to one logit a token, its loss, its training step.
use tutel_moe::{Activation, Error, MoeLayer, Real, Scalar};

use crate::options::Options;
use crate::torch_random::{Generator, Uniform};

const LEARNING_RATE: f64 = 1e-5;

pub(crate) struct Model<'a, T> {
    options: &'a Options,
    pub(crate) layer: MoeLayer<T>,
}

/// Rounds to the element type, as torch does between operators.
fn narrow<T: Scalar>(value: f64) -> T {
    T::narrow(T::Accumulator::from_f64(value))
}

fn wide<T: Scalar>(value: T) -> f64 {
    value.widen().to_f64()
}

fn transposed<T: Copy>(matrix: &[T], columns: usize) -> impl Iterator<Item = T> {
    (0..columns).flat_map(move |column| matrix.iter().skip(column).step_by(columns).copied())
}

/// The experts' weights from the seed of the local rank, the gate's from the shared one; both are 1.
fn draw_weights<T: Scalar + Uniform>(layer: &mut MoeLayer<T>, hidden_size: usize) -> Result<(), Error> {
    let (model_dim, experts) = (layer.model_dim(), layer.experts());
    let mut generator = Generator::seeded(1);
    let (mut fc1, mut fc1_bias, mut fc2, mut fc2_bias) = (vec![], vec![], vec![], vec![]);
    for _ in 0..experts {
        let linear = generator.linear::<T>(model_dim, hidden_size, true);
        fc1.extend(linear.weight);
        fc1_bias.extend(linear.bias);
        let linear = generator.linear::<T>(hidden_size, model_dim, true);
        fc2.extend(transposed(&linear.weight, hidden_size));
        fc2_bias.extend(linear.bias);
    }
    let gate = Generator::seeded(1).linear(model_dim, experts, false);
    let parameters = layer.parameters_mut();
    parameters.set("experts.batched_fc1_w", &fc1)?;
    parameters.set("experts.batched_fc1_bias", &fc1_bias)?;
    parameters.set("experts.batched_fc2_w", &fc2)?;
    parameters.set("experts.batched_fc2_bias", &fc2_bias)?;
    parameters.set("gates.0.wg.weight", &gate.weight)
}

impl<'a, T: Scalar + Uniform> Model<'a, T> {
    pub(crate) fn new(options: &'a Options) -> Result<Self, Error> {
        let mut layer = MoeLayer::builder()
            .model_dim(options.model_dim)
            .hidden_size(options.hidden_size)
            .experts(options.num_local_experts)
            .top_k(options.top.min(options.num_local_experts))
            .capacity_factor(options.capacity_factor)
            .activation(Activation::Relu)
            .build()?;
        draw_weights(&mut layer, options.hidden_size)?;
        Ok(Self { options, layer })
    }

    /// `torch.randn` in f32 whatever the dtype is, then rounded.
    pub(crate) fn draw_tokens(&self) -> Vec<T> {
        let len = self.options.batch_size * self.options.num_tokens * self.options.model_dim;
        Generator::seeded(0).normal(len).into_iter().map(|value| narrow(value.into())).collect()
    }

    /// One step on tokens `[batch, tokens, D]`: the loss, and unless evaluating, gradients and update.
    pub(crate) fn step(&mut self, tokens: &[T]) -> Result<f64, Error> {
        let aux_weight = self.options.l_aux_wt;
        if self.options.eval {
            let output = self.layer.forward(tokens)?;
            return Ok(self.total(self.loss(&output.tokens).0, output.aux_loss));
        }
        let (output, saved) = self.layer.forward_train(tokens)?;
        let (loss, slopes) = self.loss(&output.tokens);
        let grad_output: Vec<T> =
            slopes.iter().flat_map(|&slope| std::iter::repeat_n(slope, self.options.model_dim)).collect();
        let gradients = self.layer.backward(saved, &grad_output, aux_weight)?;
        let rate = T::Accumulator::from_f64(LEARNING_RATE);
        for (parameter, gradient) in self.layer.parameters_mut().iter_mut().zip(gradients.parameters.iter()) {
            for (value, slope) in parameter.values.iter_mut().zip(gradient.values) {
                *value = T::narrow(value.widen() - rate * slope.widen());
            }
        }
        Ok(self.total(loss, output.aux_loss))
    }

    fn total(&self, loss: f64, aux_loss: f64) -> f64 {
        let weighted: T = narrow(self.options.l_aux_wt * aux_loss);
        wide::<T>(narrow(loss + wide(weighted)))
    }

    /// The negative log-probability of the first token of each sequence, averaged, where a token's logit is the sum
    /// of its outputs `[batch * tokens, D]`; and the gradient of each logit, `[batch * tokens]`.
    fn loss(&self, outputs: &[T]) -> (f64, Vec<T>) {
        let Options { batch_size, num_tokens, model_dim, .. } = *self.options;
        let sum = |token: &[T]| wide::<T>(narrow(token.iter().map(|&value| wide(value)).sum()));
        let logits: Vec<f64> = outputs.chunks_exact(model_dim).map(sum).collect();
        let (mut loss, mut slopes) = (0.0, vec![]);
        for logits in logits.chunks_exact(num_tokens) {
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = logits.iter().map(|logit| (logit - largest).exp()).sum::<f64>().ln();
            let log_probability = |logit: f64| wide::<T>(narrow(logit - largest - log_sum));
            loss -= log_probability(logits[0]);
            for (token, &logit) in logits.iter().enumerate() {
                let target = if token == 0 { 1.0 } else { 0.0 };
                slopes.push(narrow((log_probability(logit).exp() - target) / batch_size as f64));
            }
        }
        (wide::<T>(narrow(loss / batch_size as f64)), slopes)
    }
}
