//! The exponential of softmax.
use tutel_core::Real;

/// exp for arguments that are not positive (a logit minus the largest logit).
pub trait Exponential: Real {
    /// exp(x) for x <= 0, NaN for NaN. Results below the smallest normal number are 0.
    fn exp_of_nonpositive(self) -> Self;
}

/// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2. Free of branches, so that a loop over it
/// vectorises, and without fused multiply-add, which not every level has.
macro_rules! exponential {
    ($float:ident, mantissa $mantissa:literal, bias $bias:literal, ln2 $high:literal + $low:literal, least $least:literal, polynomial $coefficients:expr) => {
        impl Exponential for $float {
            #[inline(always)]
            fn exp_of_nonpositive(self) -> $float {
                // Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits of the mantissa.
                const ROUNDER: $float = 1.5 * (1u64 << $mantissa) as $float;
                let shifted = self * std::$float::consts::LOG2_E + ROUNDER;
                let n = shifted - ROUNDER;
                // The high part of ln 2 has so few bits that its product is exact.
                let r = (self - n * $high) - n * $low;
                let mut polynomial = 0.0;
                for coefficient in $coefficients {
                    polynomial = polynomial * r + coefficient;
                }
                let power_of_two = $float::from_bits(shifted.to_bits().wrapping_add($bias) << $mantissa);
                let result = polynomial * power_of_two;
                if self < $least { 0.0 } else { result }
            }
        }
    };
}

// The polynomials have the least relative error (1.0e-7 and 4e-18) among those that begin with 1 + r. `least` is the
// logarithm of the smallest normal number.
exponential!(f32, mantissa 23, bias 127, ln2 0.693_359_4 + -2.121_944_4e-4, least -87.336_54,
    polynomial [8.312_5e-3, 4.189_033e-2, 0.166_671_15, 0.499_992_3, 1.0, 1.0]);
exponential!(f64, mantissa 52, bias 1023, ln2 0.693_147_180_369_123_8 + 1.908_214_929_270_587_7e-10, least -708.396_418_532_264_1,
polynomial [
    2.500_001_883_318_737_3e-8, 2.763_030_625_029_36e-7, 2.755_758_680_389_532_4e-6, 2.480_149_294_963_387e-5,
    1.984_126_950_577_377_5e-4, 1.388_888_894_375_996_5e-3, 8.333_333_333_494_977e-3, 4.166_666_666_652_973e-2,
    0.166_666_666_666_664_1, 0.5, 1.0, 1.0,
]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_within_two_units_in_the_last_place() {
        let (mut single, mut double) = (0.0f64, 0.0f64);
        for step in 0..2_000_000 {
            let x = -87.33 * step as f32 / 2_000_000.0;
            let truth = f64::from(x).exp();
            single = single.max((f64::from(x.exp_of_nonpositive()) - truth).abs() / truth);
            let x = -708.39 * f64::from(step) / 2_000_000.0;
            let truth = x.exp();
            double = double.max((x.exp_of_nonpositive() - truth).abs() / truth);
        }
        assert!(single < 2.0 * f64::from(f32::EPSILON), "relative error {single:e}");
        assert!(double < 2.0 * f64::EPSILON, "relative error {double:e}");
    }

    #[test]
    fn ends_are_exact() {
        assert_eq!(0f32.exp_of_nonpositive().to_bits(), 1f32.to_bits());
        assert_eq!(f32::NEG_INFINITY.exp_of_nonpositive().to_bits(), 0);
        assert_eq!((-100f32).exp_of_nonpositive().to_bits(), 0);
        assert!(f32::NAN.exp_of_nonpositive().is_nan());
        assert_eq!(0f64.exp_of_nonpositive().to_bits(), 1f64.to_bits());
        assert_eq!(f64::NEG_INFINITY.exp_of_nonpositive().to_bits(), 0);
        assert_eq!((-800f64).exp_of_nonpositive().to_bits(), 0);
        assert!(f64::NAN.exp_of_nonpositive().is_nan());
    }
}
