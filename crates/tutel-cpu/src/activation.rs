//! The functions between an expert's two products.
use tutel_core::Real;

use crate::Exponential;

/// What an expert applies to its hidden units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Activation {
    /// max(x, 0).
    #[default]
    Relu,
    /// x Φ(x), Φ being the normal distribution's cumulative function.
    Gelu,
    /// x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2, the common approximation of [`Self::Gelu`].
    GeluTanh,
    /// x / (1 + exp(-1.702 x)), a coarser one.
    QuickGelu,
    /// x / (1 + exp(-x)), also called swish.
    Silu,
    /// 1 / (1 + exp(-x)), the gate of the first gated units.
    Sigmoid,
    /// x: experts without an activation.
    Identity,
}

impl Activation {
    /// Every function, with its name.
    pub const ALL: [(Self, &str); 7] = [
        (Self::Relu, "relu"),
        (Self::Gelu, "gelu"),
        (Self::GeluTanh, "gelu_tanh"),
        (Self::QuickGelu, "quick_gelu"),
        (Self::Silu, "silu"),
        (Self::Sigmoid, "sigmoid"),
        (Self::Identity, "identity"),
    ];

    /// The function of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|(activation, _)| *activation)
    }

    /// Replaces each value by the function of it.
    #[inline(always)]
    pub fn apply<A: Exponential>(self, values: &mut [A]) {
        match self {
            // Not `max`, which would hide a NaN.
            Self::Relu => replace(values, |x| if x <= A::zero() { A::zero() } else { x }),
            Self::Gelu => replace(values, |x| x * x.normal_cumulative()),
            Self::GeluTanh => replace(values, |x| x * sigmoid(tanh_argument(x))),
            Self::QuickGelu => replace(values, |x| x * sigmoid(A::from_f64(QUICK) * x)),
            Self::Silu => replace(values, |x| x * sigmoid(x)),
            Self::Sigmoid => replace(values, |x| sigmoid(x)),
            Self::Identity => {}
        }
    }

    /// Replaces each value by the function's derivative there.
    #[inline(always)]
    pub fn derive<A: Exponential>(self, values: &mut [A]) {
        let one = A::one();
        match self {
            Self::Relu => replace(values, |x| if x <= A::zero() { A::zero() } else { one }),
            Self::Gelu => replace(values, |x| {
                let density = A::from_f64(NORMAL_DENSITY) * (-(A::from_f64(0.5) * x * x)).exp_of_nonpositive();
                x.normal_cumulative() + x * density
            }),
            Self::GeluTanh => replace(values, |x| {
                let s = sigmoid(tanh_argument(x));
                let slope = A::from_f64(TANH_SCALE) * (one + A::from_f64(3.0 * TANH_CUBIC) * x * x);
                s + x * s * (one - s) * slope
            }),
            Self::QuickGelu => replace(values, |x| {
                let s = sigmoid(A::from_f64(QUICK) * x);
                s + A::from_f64(QUICK) * x * s * (one - s)
            }),
            Self::Silu => replace(values, |x| {
                let s = sigmoid(x);
                s + x * s * (one - s)
            }),
            Self::Sigmoid => replace(values, |x| {
                let s = sigmoid(x);
                s * (one - s)
            }),
            Self::Identity => values.fill(one),
        }
    }
}

/// The normal distribution's density at 0, 1 / √(2π).
const NORMAL_DENSITY: f64 = 0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
/// (1 + tanh(u)) / 2 is the logistic function of 2u; this is 2 √(2/π), from u to the argument of that.
const TANH_SCALE: f64 = 2.0 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
const TANH_CUBIC: f64 = 0.044_715;
const QUICK: f64 = 1.702;

#[inline(always)]
fn replace<A: Copy>(values: &mut [A], function: impl Fn(A) -> A) {
    for value in values {
        *value = function(*value);
    }
}

#[inline(always)]
fn tanh_argument<A: Real>(x: A) -> A {
    A::from_f64(TANH_SCALE) * (x + A::from_f64(TANH_CUBIC) * x * x * x)
}

/// 1 / (1 + exp(-x)), by the exponential of -|x|, which cannot overflow.
#[inline(always)]
fn sigmoid<A: Exponential>(x: A) -> A {
    let power = (-x.abs()).exp_of_nonpositive();
    let numerator = if x < A::zero() { power } else { A::one() };
    numerator / (A::one() + power)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value<A: Exponential>(activation: Activation, x: A) -> A {
        let mut values = [x];
        activation.apply(&mut values);
        values[0]
    }

    fn slope<A: Exponential>(activation: Activation, x: A) -> A {
        let mut values = [x];
        activation.derive(&mut values);
        values[0]
    }

    /// The definitions, as they are written in the documentation.
    fn definition(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Relu => x.max(0.0),
            Activation::Gelu => x * 0.5 * (1.0 + libm::erf(x / 2f64.sqrt())),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
            }
            Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Activation::Identity => x,
        }
    }

    #[test]
    fn values_are_the_definitions() {
        for (activation, name) in Activation::ALL {
            assert_eq!(Activation::named(name), Some(activation));
            for step in -60..=60 {
                let x = f64::from(step) / 8.0;
                let truth = definition(activation, x);
                let (double, single) = (value(activation, x), f64::from(value(activation, x as f32)));
                assert!((double - truth).abs() <= 1e-15 * x.abs().max(1.0), "{activation:?}({x}) = {double}");
                assert!((single - truth).abs() <= 4e-7 * x.abs().max(1.0), "{activation:?}({x}) = {single}");
            }
        }
    }

    #[test]
    fn slopes_are_the_differences() {
        for (activation, _) in Activation::ALL {
            for step in -40..=40 {
                let (x, h) = (f64::from(step) / 8.0 + 0.01, 1e-5);
                let difference = (value(activation, x + h) - value(activation, x - h)) / (2.0 * h);
                assert!((slope(activation, x) - difference).abs() < 1e-9, "{activation:?}'({x})");
                let single = f64::from(slope(activation, x as f32));
                assert!((single - difference).abs() < 2e-6, "{activation:?}'({x}) in f32");
            }
        }
    }

    #[test]
    fn large_arguments_do_not_overflow_and_nan_stays() {
        for (activation, _) in Activation::ALL {
            for x in [-1e4f32, 1e4] {
                assert!(value(activation, x).is_finite() && slope(activation, x).is_finite(), "{activation:?}({x})");
            }
            assert!(value(activation, f32::NAN).is_nan() && value(activation, f64::NAN).is_nan(), "{activation:?}");
        }
    }
}
