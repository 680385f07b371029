//! The layer's options.
use std::fmt;
use std::marker::PhantomData;
use std::num::NonZero;
use std::sync::Arc;

use tutel_cpu::{Parallel, Scalar, ScopedThreads};

use crate::initial::initial_parameters;
use crate::layer::Options;
use crate::parameters::Sizes;
use crate::route::{Routing, check_capacity_factor};
use crate::{Activation, Error, MoeLayer};

/// Where a choice's weight multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ScoreAt {
    /// The expert's output (the Python layer's `is_postscore=True`).
    #[default]
    Combine,
    /// The expert's input (`is_postscore=False`).
    Dispatch,
}

/// Options of a [`MoeLayer`], made by [`MoeLayer::builder`].
///
/// `model_dim`, `hidden_size` and `experts` have to be given.
///
/// ```
/// use tutel_moe::{Activation, MoeLayer};
///
/// let layer: MoeLayer<f32> = MoeLayer::builder()
///     .model_dim(64)
///     .hidden_size(128)
///     .experts(8)
///     .top_k(2)
///     .activation(Activation::Silu)
///     .gated(true)
///     .capacity_factor(1.25)
///     .seed(1)
///     .build()?;
/// assert_eq!(layer.parameters().get("experts.W_fc1")?.shape, [8, 64, 128]);
///
/// let refused = MoeLayer::<f32>::builder().model_dim(64).hidden_size(128).experts(8).top_k(9).build();
/// assert_eq!(refused.unwrap_err().to_string(), "top_k must be between 1 and the number of experts (8), got 9");
/// # Ok::<(), tutel_moe::Error>(())
/// ```
#[derive(Clone)]
pub struct MoeLayerBuilder<T> {
    model_dim: Option<usize>,
    hidden_size: Option<usize>,
    experts: Option<usize>,
    output_dim: Option<usize>,
    top_k: usize,
    capacity_factor: f64,
    normalize_gate: bool,
    batch_prioritized: bool,
    score_at: ScoreAt,
    activation: Option<Activation>,
    gated: bool,
    fc1_bias: Option<bool>,
    fc2_bias: Option<bool>,
    seed: u64,
    threads: Option<usize>,
    parallel: Option<Arc<dyn Parallel + Send>>,
    element: PhantomData<fn() -> T>,
}

impl<T> fmt::Debug for MoeLayerBuilder<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MoeLayerBuilder")
            .field("model_dim", &self.model_dim)
            .field("hidden_size", &self.hidden_size)
            .field("experts", &self.experts)
            .field("output_dim", &self.output_dim)
            .field("top_k", &self.top_k)
            .field("capacity_factor", &self.capacity_factor)
            .field("activation", &self.activation)
            .field("gated", &self.gated)
            .finish_non_exhaustive()
    }
}

/// Options with one setter each, which takes the value as it is; all are checked by `build`.
macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $value:expr;)*) => { $(
        $(#[$doc])*
        #[must_use]
        pub fn $name(mut self, $name: $type) -> Self {
            self.$name = $value;
            self
        }
    )* };
}

impl<T: Scalar> MoeLayerBuilder<T> {
    pub(crate) fn new() -> Self {
        Self {
            model_dim: None,
            hidden_size: None,
            experts: None,
            output_dim: None,
            top_k: 1,
            capacity_factor: 1.0,
            normalize_gate: true,
            batch_prioritized: false,
            score_at: ScoreAt::Combine,
            activation: None,
            gated: false,
            fc1_bias: None,
            fc2_bias: None,
            seed: 0,
            threads: None,
            parallel: None,
            element: PhantomData,
        }
    }

    setters! {
        /// D, the width of a token; at least 1.
        model_dim: usize = Some(model_dim);
        /// H, hidden units of an expert; at least 1.
        hidden_size: usize = Some(hidden_size);
        /// E; at least 1.
        experts: usize = Some(experts);
        /// `D_out`, the width of an output; at least 1. D unless given.
        output_dim: usize = Some(output_dim);
        /// K, experts of a token, from 1 to E. 1 unless given.
        top_k: usize = top_k;
        /// The factor f that limits how many choices an expert takes, finite. 1 unless given.
        ///
        /// With f > 0 an expert takes C = K * int(f * ceil(T / E)) choices: all first choices before all second ones,
        /// and within these in the order of the tokens. The others are dropped: they add nothing to the output, and
        /// have no gradient. With f = 0 nothing is dropped. f < 0 drops what -f does: it stands for the smaller of that
        /// capacity and what the fullest expert needs, which only differ for layers that pad.
        capacity_factor: f64 = capacity_factor;
        /// Whether a token's weights are divided by their sum, for K > 1. True unless given.
        normalize_gate: bool = normalize_gate;
        /// Whether tokens are served in descending order of their largest score, rather than in their own order, so
        /// that the least certain choices are dropped first. False unless given.
        batch_prioritized: bool = batch_prioritized;
        /// Where a choice's weight multiplies. [`ScoreAt::Combine`] unless given.
        score_at: ScoreAt = score_at;
        /// What an expert applies to its hidden units. [`Activation::Relu`] unless given, [`Activation::Silu`] in gated
        /// experts.
        activation: Activation = Some(activation);
        /// Whether experts are gated, `(act(x W1) * (x W2)) W3`, as in Llama, rather than two layers,
        /// `act(x W1 + b1) W2 + b2`. False unless given.
        gated: bool = gated;
        /// Whether there is a bias b1. True unless given; false in gated experts, which have none.
        fc1_bias: bool = Some(fc1_bias);
        /// Whether there is a bias b2. True unless given; false in gated experts, which have none.
        fc2_bias: bool = Some(fc2_bias);
        /// Seeds the initial values. 0 unless given.
        ///
        /// The gate and plain experts begin uniformly within 1 / √(number of inputs), gated experts normally
        /// distributed with standard deviation 0.01. [`Parameters::set`](crate::Parameters::set) gives other values.
        seed: u64 = seed;
        /// On how many threads of the standard library the layer computes, started anew for each kernel; at least 1,
        /// which computes on the calling thread. As many as the process may use unless given.
        threads: usize = Some(threads);
    }

    /// Who runs the kernels' tasks instead of threads that the layer starts, for example a pool of the caller's. The
    /// layer panics if its [`Parallel::run`] returns before all workers that it has begun have come to their ends.
    #[must_use]
    pub fn parallel(mut self, parallel: impl Parallel + Send + 'static) -> Self {
        self.parallel = Some(Arc::new(parallel));
        self
    }

    /// Makes the layer and draws its initial values.
    ///
    /// # Errors
    /// [`Error::Option`] for an option that is missing or out of range, [`Error::Kernel`] for sizes whose parameters
    /// do not fit in memory.
    pub fn build(self) -> Result<MoeLayer<T>, Error> {
        let sizes = self.sizes()?;
        let routing = self.routing(sizes.experts)?;
        let parameters = initial_parameters(sizes, self.seed)?;
        let usual = if self.gated { Activation::Silu } else { Activation::Relu };
        // Where the number cannot be found out, one thread is always right.
        let usable = || std::thread::available_parallelism().map_or(1, NonZero::get);
        let threads = size("threads", Some(self.threads.unwrap_or_else(usable)))?;
        let options = Options {
            sizes,
            routing,
            activation: self.activation.unwrap_or(usual),
            score_at: self.score_at,
            parallel: self.parallel.unwrap_or_else(|| Arc::new(ScopedThreads(threads))),
        };
        Ok(MoeLayer::new(options, parameters))
    }

    fn sizes(&self) -> Result<Sizes, Error> {
        let bias = |option, given: Option<bool>| match given {
            Some(true) if self.gated => Err(Error::option(option, true, "false for gated experts")),
            _ => Ok(given.unwrap_or(!self.gated)),
        };
        let model_dim = size("model_dim", self.model_dim)?;
        Ok(Sizes {
            model_dim,
            hidden_size: size("hidden_size", self.hidden_size)?,
            experts: size("experts", self.experts)?,
            output_dim: size("output_dim", self.output_dim.or(self.model_dim))?,
            gated: self.gated,
            fc1_bias: bias("fc1_bias", self.fc1_bias)?,
            fc2_bias: bias("fc2_bias", self.fc2_bias)?,
        })
    }

    fn routing(&self, experts: usize) -> Result<Routing, Error> {
        let &Self { top_k, capacity_factor, normalize_gate, batch_prioritized, .. } = self;
        if top_k < 1 || top_k > experts {
            let allowed = format!("between 1 and the number of experts ({experts})");
            return Err(Error::option("top_k", top_k, allowed));
        }
        let capacity_factor = check_capacity_factor(capacity_factor)?;
        tutel_core::RoutingShape::new(0, experts, top_k)?;
        Ok(Routing { experts, top_k, capacity_factor, normalize_gate, batch_prioritized })
    }
}

fn size(option: &'static str, given: Option<usize>) -> Result<usize, Error> {
    match given {
        Some(size) if size >= 1 => Ok(size),
        Some(size) => Err(Error::option(option, size, "at least 1")),
        None => Err(Error::option(option, "nothing", "given, at least 1")),
    }
}
