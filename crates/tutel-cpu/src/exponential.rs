//! The exponential of softmax.
use tutel_core::Real;

/// exp for arguments that are not positive (a logit minus the largest logit).
pub trait Exponential: Real {
    /// exp(x) for x <= 0, NaN for NaN. Results below the smallest normal number are 0.
    fn exp_of_nonpositive(self) -> Self;
    /// The normal distribution's cumulative function, without the cancellation that 1 + erf would have for negative
    /// arguments.
    fn normal_cumulative(self) -> Self;
}

impl Exponential for f64 {
    fn exp_of_nonpositive(self) -> f64 {
        self.exp()
    }
    fn normal_cumulative(self) -> f64 {
        0.5 * libm::erfc(-self * std::f64::consts::FRAC_1_SQRT_2)
    }
}

impl Exponential for f32 {
    /// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, where the Taylor polynomial of degree 7 is
    /// exact to 5e-9. Branch-free, so that a loop over it vectorises.
    #[inline(always)]
    fn exp_of_nonpositive(self) -> f32 {
        // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
        const ROUNDER: f32 = 12_582_912.0;
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        const LEAST: f32 = -87.336_54; // ln of the smallest normal number
        let shifted = self * std::f32::consts::LOG2_E + ROUNDER;
        let n = shifted - ROUNDER;
        let r = (self - n * LN2_HIGH) - n * LN2_LOW;
        let mut polynomial = 1.0 / 5040.0;
        for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            polynomial = polynomial * r + coefficient;
        }
        let power_of_two = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
        let result = polynomial * power_of_two;
        if self < LEAST { 0.0 } else { result }
    }

    /// By erfc(z) = t exp(-z² + P(t)), t = 1 / (1 + z / 2), for z >= 0 (Press et al., Numerical Recipes, 6.2), whose relative
    /// error is below 1.2e-7. Branch-free.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for step in 0..200_000 {
            let x = -87.33 * step as f32 / 200_000.0;
            let truth = f64::from(x).exp();
            worst = worst.max((f64::from(x.exp_of_nonpositive()) - truth).abs() / truth);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "relative error {worst:e}");
    }

    #[test]
    fn ends_are_exact() {
        assert_eq!(0f32.exp_of_nonpositive().to_bits(), 1f32.to_bits());
        assert_eq!(f32::NEG_INFINITY.exp_of_nonpositive().to_bits(), 0);
        assert_eq!((-100f32).exp_of_nonpositive().to_bits(), 0);
        assert!(f32::NAN.exp_of_nonpositive().is_nan());
    }
}
