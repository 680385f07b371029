//! The normal distribution, of which GELU is made.
use crate::Exponential;

/// Φ.
pub trait Normal: Exponential {
    /// The normal distribution's cumulative function, without the cancellation that 1 + erf would have for negative
    /// arguments.
    fn normal_cumulative(self) -> Self;
}

impl Normal for f64 {
    #[inline]
    fn normal_cumulative(self) -> f64 {
        0.5 * libm::erfc(-self * std::f64::consts::FRAC_1_SQRT_2)
    }
}

impl Normal for f32 {
    /// By erfc(z) = t exp(-z² + P(t)), t = 1 / (1 + z / 2), for z >= 0 (Press et al., Numerical Recipes, 6.2), whose relative
    /// error is below 1.2e-7. Free of branches, so that a loop over it vectorises.
    #[inline(always)]
    fn normal_cumulative(self) -> f32 {
        const COEFFICIENTS: [f32; 10] = [
            0.170_872_77,
            -0.822_152_2,
            1.488_515_9,
            -1.135_204,
            0.278_868_07,
            -0.186_288_06,
            0.096_784_18,
            0.374_091_96,
            1.000_023_7,
            -1.265_512_2,
        ];
        let z = self.abs() * std::f32::consts::FRAC_1_SQRT_2;
        let t = 1.0 / (1.0 + 0.5 * z);
        let mut polynomial = 0.0;
        for coefficient in COEFFICIENTS {
            polynomial = polynomial * t + coefficient;
        }
        let tail = 0.5 * t * (polynomial - z * z).exp_of_nonpositive();
        if self < 0.0 { tail } else { 1.0 - tail }
    }
}
