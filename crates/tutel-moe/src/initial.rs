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

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Sizes = Sizes {
        model_dim: 16,
        hidden_size: 25,
        experts: 4,
        output_dim: 8,
        gated: false,
        fc1_bias: true,
        fc2_bias: true,
    };

    /// The largest magnitude and the root mean square of a parameter.
    fn extent(parameters: &Parameters<f64>, name: &str) -> (f64, f64) {
        let values = parameters.get(name).unwrap().values;
        let squares: f64 = values.iter().map(|value| value * value).sum();
        (values.iter().fold(0.0, |largest, value| value.abs().max(largest)), (squares / values.len() as f64).sqrt())
    }

    #[test]
    fn plain_values_are_uniform_within_their_bounds() {
        let parameters = initial_parameters::<f64>(PLAIN, 1).unwrap();
        for (name, bound) in [
            ("experts.batched_fc1_w", 0.25),
            ("experts.batched_fc2_w", 0.2),
            ("experts.batched_fc1_bias", 0.25),
            ("experts.batched_fc2_bias", 0.2),
            ("gates.0.wg.weight", 0.25),
        ] {
            let (largest, size) = extent(&parameters, name);
            assert!(largest <= bound && largest > 0.85 * bound, "{name}: {largest}");
            assert!((size / bound - 3f64.sqrt().recip()).abs() < 0.12, "{name}: {size}");
        }
    }

    #[test]
    fn gated_values_are_normal() {
        let sizes = Sizes { gated: true, fc1_bias: false, fc2_bias: false, ..PLAIN };
        let parameters = initial_parameters::<f64>(sizes, 1).unwrap();
        for name in ["experts.W_fc1", "experts.W_fc2", "experts.W_fc3"] {
            let (largest, size) = extent(&parameters, name);
            assert!((size / 0.01 - 1.0).abs() < 0.1 && largest > 0.02, "{name}: {size}, at most {largest}");
        }
        assert!(extent(&parameters, "gates.0.wg.weight").0 <= 0.25);
    }

    #[test]
    fn the_seed_decides() {
        let draw = |seed| initial_parameters::<f32>(PLAIN, seed).unwrap();
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }
}
