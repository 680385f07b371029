//! The layer: gate, route, dispatch, experts, combine; and back.
use std::fmt;
use std::sync::Arc;

use tutel_cpu::{Parallel, Scalar};

use crate::builder::MoeLayerBuilder;
use crate::error::check_shape;
use crate::experts::{ExpertGradients, Experts, SavedExperts};
use crate::kernels::{Kernels, Matrices};
use crate::parameters::{Parameters, Role, Sizes};
use crate::route::{Routed, Routing, check_capacity_factor};
use crate::{Activation, Error, ScoreAt};

/// What has to be the same where something is saved and where it is used.
type Comparable = (Sizes, Routing, Activation, ScoreAt);

/// What does not change once a layer is made.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) sizes: Sizes,
    pub(crate) routing: Routing,
    pub(crate) activation: Activation,
    pub(crate) score_at: ScoreAt,
    pub(crate) parallel: Arc<dyn Parallel + Send>,
}

impl Options {
    fn comparable(&self) -> Comparable {
        (self.sizes, self.routing, self.activation, self.score_at)
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sizes, routing, activation, score_at, parallel } = self;
        f.debug_struct("Options")
            .field("sizes", sizes)
            .field("routing", routing)
            .field("activation", activation)
            .field("score_at", score_at)
            .field("threads", &parallel.threads())
            .finish()
    }
}

/// A Mixture-of-Experts layer: each token is computed by the few experts that its gate chooses.
///
/// Symbols: T tokens of width D, E experts with H hidden units, K choices a token, outputs of width `D_out`. T may
/// change from call to call and may be 0. All slices are row-major.
///
/// The gate gives each token the logits `x W_g` and their softmax, the scores. The K experts with the largest logits
/// are chosen (ties go to the lower id), their scores are the weights, divided by their sum for K > 1. An expert is
/// `y = act(x W1 + b1) W2 + b2`, or gated, `y = (act(x W1) * (x W2)) W3`, and the layer's output is the weighted sum of
/// the chosen experts' outputs.
///
/// Sums are made in f32 (f64 for f64) and rounded once; routing weights stay in f32 (f64). The same inputs give the
/// same bits, whatever the number of threads.
#[derive(Debug, Clone)]
pub struct MoeLayer<T> {
    options: Options,
    parameters: Parameters<T>,
}

/// What a forward pass gives.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Output<T> {
    /// `[T, D_out]`; 0 for a token whose choices were all dropped.
    pub tokens: Vec<T>,
    /// GShard's load-balancing loss (Lepikhin et al., 2020), to be added to the model's own with a small factor. About
    /// 1 when experts are chosen evenly, E at worst, 0 without tokens.
    pub aux_loss: f64,
    /// `[E]`: choices that name each expert, dropped ones included.
    pub tokens_per_expert: Vec<usize>,
}

/// What [`MoeLayer::forward_train`] keeps for [`MoeLayer::backward`].
#[derive(Debug, Clone)]
pub struct Saved<T: Scalar> {
    /// Of the layer that made it.
    options: Comparable,
    tokens: Vec<T>,
    routed: Routed<T>,
    experts: SavedExperts<T>,
    /// `[R, D_out]`, where weights multiply outputs.
    outputs: Option<Vec<T>>,
}

/// What a backward pass gives.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Gradients<T> {
    /// `[T, D]`: of the layer's input.
    pub tokens: Vec<T>,
    /// Of each parameter, by the same names and in the same order.
    pub parameters: Parameters<T>,
}

impl<T: Scalar> MoeLayer<T> {
    /// Begins a layer; see there for its options.
    pub fn builder() -> MoeLayerBuilder<T> {
        MoeLayerBuilder::new()
    }

    pub(crate) fn new(options: Options, parameters: Parameters<T>) -> Self {
        Self { options, parameters }
    }

    /// D, the width of a token.
    pub fn model_dim(&self) -> usize {
        self.options.sizes.model_dim
    }

    /// `D_out`, the width of an output.
    pub fn output_dim(&self) -> usize {
        self.options.sizes.output_dim
    }

    /// E.
    pub fn experts(&self) -> usize {
        self.options.sizes.experts
    }

    /// K.
    pub fn top_k(&self) -> usize {
        self.options.routing.top_k
    }

    /// Changes the capacity factor, for example for inference; see [`MoeLayerBuilder::capacity_factor`].
    ///
    /// # Errors
    /// [`Error::Option`] for a factor that is not finite; then nothing has changed.
    pub fn set_capacity_factor(&mut self, capacity_factor: f64) -> Result<(), Error> {
        self.options.routing.capacity_factor = check_capacity_factor(capacity_factor)?;
        Ok(())
    }

    /// The parameters.
    pub fn parameters(&self) -> &Parameters<T> {
        &self.parameters
    }

    /// The parameters, for changing their values.
    pub fn parameters_mut(&mut self) -> &mut Parameters<T> {
        &mut self.parameters
    }

    /// Computes tokens `[T, D]`, keeping nothing for a backward pass.
    ///
    /// # Errors
    /// [`Error::Tokens`] for a slice that is not `[T, D]` for any T; [`Error::Kernel`] for more tokens than can be
    /// counted or kept.
    pub fn forward(&self, tokens: &[T]) -> Result<Output<T>, Error> {
        let kernels = self.kernels();
        let routed = self.route(tokens)?;
        let rows = self.dispatch(tokens, &routed)?;
        let rows = self.weights().infer(kernels, rows, &routed.plan.offsets)?;
        self.output(&rows, &routed)
    }

    /// Computes tokens `[T, D]` and keeps what [`Self::backward`] needs: a copy of the tokens, and T K rows of width D,
    /// of width `D_out`, and two times (three times in gated experts) of width H.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_train(&self, tokens: &[T]) -> Result<(Output<T>, Saved<T>), Error> {
        let routed = self.route(tokens)?;
        let rows = self.dispatch(tokens, &routed)?;
        let (rows, experts) = self.weights().forward(self.kernels(), rows, &routed.plan.offsets)?;
        let output = self.output(&rows, &routed)?;
        let outputs = (self.options.score_at == ScoreAt::Combine).then_some(rows);
        let options = self.options.comparable();
        Ok((output, Saved { options, tokens: tokens.to_vec(), routed, experts, outputs }))
    }

    /// Gradients of a loss, from its gradient in the output's tokens, `[T, D_out]`, and in the auxiliary loss (the
    /// factor that it is added to the loss with, or 0). The parameters have to be those of the forward pass. Which
    /// experts are chosen and what is dropped is a constant here.
    ///
    /// # Errors
    /// [`Error::Length`] for a `grad_output` of another length than the output; [`Error::Saved`] for what a layer with
    /// other sizes or options has saved.
    pub fn backward(&self, saved: Saved<T>, grad_output: &[T], grad_aux_loss: f64) -> Result<Gradients<T>, Error> {
        let Saved { options, tokens, routed, experts, outputs } = saved;
        self.check_saved(options)?;
        let (inner, outer) = (routed.row_shape(self.model_dim())?, routed.row_shape(self.output_dim())?);
        check_shape("grad_output", grad_output.len(), &[outer.tokens, outer.width])?;
        let (kernels, plan) = (self.kernels(), &routed.plan);
        let (at_dispatch, at_combine) = self.weights_at(&routed);

        let grad_rows = kernels.dispatch(grad_output, plan, at_combine, outer)?;
        let gradients = self.weights().backward(kernels, experts, &grad_rows, &plan.offsets)?;
        drop(grad_rows);
        let grad_weights = match outputs {
            Some(outputs) => kernels.row_dot(&outputs, plan, grad_output, outer)?,
            None => kernels.row_dot(&gradients.rows, plan, &tokens, inner)?,
        };
        let mut grad_tokens = kernels.combine(&gradients.rows, plan, at_dispatch, inner)?;

        let grad_logits = self.options.routing.backward(kernels, &routed, &grad_weights, grad_aux_loss)?;
        let (gate, offsets) = (self.gate(), [0, inner.tokens as i64]);
        let through_gate = kernels.linear_rows_grad(&grad_logits, gate, &offsets)?;
        crate::elementwise::add(&mut grad_tokens, &through_gate, kernels.0);
        let grad_gate = kernels.linear_weight_grad(&tokens, &grad_logits, gate, &offsets)?;
        Ok(Gradients { tokens: grad_tokens, parameters: self.by_name(gradients, grad_gate)? })
    }

    fn check_saved(&self, found: Comparable) -> Result<(), Error> {
        let expected = self.options.comparable();
        if found == expected {
            return Ok(());
        }
        Err(Error::Saved { expected: format!("{expected:?}"), found: format!("{found:?}") })
    }

    fn kernels(&self) -> Kernels<'_> {
        Kernels(&*self.options.parallel)
    }

    fn weights(&self) -> Experts<'_, T> {
        Experts::new(&self.parameters, self.options.sizes, self.options.activation)
    }

    fn gate(&self) -> Matrices<'_, T> {
        let values = self.parameters.role(Role::Gate).expect("every layer has a gate");
        Matrices { values, inner: self.model_dim(), outer: self.experts(), transposed: true }
    }

    /// The weights that multiply rows at dispatch, and those at combine.
    #[expect(clippy::type_complexity, reason = "one of the two is None")]
    fn weights_at<'a>(&self, routed: &'a Routed<T>) -> (Option<&'a [T::Accumulator]>, Option<&'a [T::Accumulator]>) {
        let weights = Some(&routed.selection.weights[..]);
        match self.options.score_at {
            ScoreAt::Dispatch => (weights, None),
            ScoreAt::Combine => (None, weights),
        }
    }

    fn route(&self, tokens: &[T]) -> Result<Routed<T>, Error> {
        let model_dim = self.model_dim();
        if !tokens.len().is_multiple_of(model_dim) {
            return Err(Error::Tokens { model_dim, found: tokens.len() });
        }
        let offsets = [0, (tokens.len() / model_dim) as i64];
        let logits = self.kernels().linear(tokens, self.gate(), None, &offsets)?;
        self.options.routing.route(self.kernels(), logits)
    }

    fn dispatch(&self, tokens: &[T], routed: &Routed<T>) -> Result<Vec<T>, Error> {
        let shape = routed.row_shape(self.model_dim())?;
        self.kernels().dispatch(tokens, &routed.plan, self.weights_at(routed).0, shape)
    }

    fn output(&self, rows: &[T], routed: &Routed<T>) -> Result<Output<T>, Error> {
        let shape = routed.row_shape(self.output_dim())?;
        Ok(Output {
            tokens: self.kernels().combine(rows, &routed.plan, self.weights_at(routed).1, shape)?,
            aux_loss: routed.aux_loss(),
            tokens_per_expert: routed.tokens_per_expert(),
        })
    }

    fn by_name(&self, gradients: ExpertGradients<T>, gate: Vec<T>) -> Result<Parameters<T>, Error> {
        let ExpertGradients { fc1, up, fc2, fc1_bias, fc2_bias, .. } = gradients;
        let (mut fc1, mut fc2, mut gate) = (Some(fc1), Some(fc2), Some(gate));
        let (mut up, mut fc1_bias, mut fc2_bias) = (up, fc1_bias, fc2_bias);
        Parameters::new(self.options.sizes, |role, _| {
            let gradient = match role {
                Role::Gate => gate.take(),
                Role::Fc1 => fc1.take(),
                Role::Up => up.take(),
                Role::Fc2 => fc2.take(),
                Role::Fc1Bias => fc1_bias.take(),
                Role::Fc2Bias => fc2_bias.take(),
            };
            Ok(gradient.expect("every parameter has one gradient"))
        })
    }
}
