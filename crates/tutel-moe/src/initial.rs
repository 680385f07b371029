//! Initial values.
use rand_distr::{Distribution, StandardNormal, StandardUniform};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;
use tutel_core::{Element, Real};

use crate::Error;
use crate::parameters::{Parameters, Role, Sizes};

/// Standard deviation of gated experts' weights, as in the Python layer.
const GATED_DEVIATION: f64 = 0.01;

/// The gate and plain experts begin uniformly within 1 / √(number of inputs), biases included, as linear layers
/// commonly do; gated experts begin normally distributed.
pub(crate) fn initial_parameters<T: Element>(sizes: Sizes, seed: u64) -> Result<Parameters<T>, Error> {
    let mut generator = Xoshiro256PlusPlus::seed_from_u64(seed);
    Parameters::new(sizes, |role, len| {
        let inputs = match role {
            Role::Gate | Role::Fc1 | Role::Fc1Bias | Role::Up => sizes.model_dim,
            Role::Fc2 | Role::Fc2Bias => sizes.hidden_size,
        };
        let bound = 1.0 / (inputs as f64).sqrt();
        let draw = || -> f64 {
            if sizes.gated && role != Role::Gate {
                let normal: f64 = StandardNormal.sample(&mut generator);
                normal * GATED_DEVIATION
            } else {
                let uniform: f64 = StandardUniform.sample(&mut generator);
                bound * (2.0 * uniform - 1.0)
            }
        };
        let mut values = Vec::new();
        values
            .try_reserve_exact(len)
            .map_err(|_| tutel_core::Error::Overflow { what: "parameters", factors: vec![len] })?;
        values.extend(std::iter::repeat_with(draw).take(len).map(|value| T::narrow(T::Accumulator::from_f64(value))));
        Ok(values)
    })
}
