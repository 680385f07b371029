//! Conversions to the accumulator type and back, free of branches and calls, so that loops over them vectorise.
//!
//! They give the bits that [`Element`]'s give, but for the payload of a NaN.
use half::{bf16, f16};
use tutel_core::Element;

pub(crate) trait Convert: Element {
    /// [`Element::widen`].
    fn to_wide(self) -> Self::Accumulator;
    /// [`Element::narrow`].
    fn from_wide(value: Self::Accumulator) -> Self;
}

macro_rules! same {
    ($($t:ty),*) => { $(
        impl Convert for $t {
            #[inline(always)]
            fn to_wide(self) -> $t { self }
            #[inline(always)]
            fn from_wide(value: $t) -> $t { value }
        }
    )* };
}
same!(f32, f64);

impl Convert for bf16 {
    #[inline(always)]
    fn to_wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_wide(value: f32) -> bf16 {
        let bits = value.to_bits();
        // Half of the last place kept, less one where that place is even: ties go to even.
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let quiet = bits >> 16 | 0x40;
        bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }
}

impl Convert for f16 {
    #[inline(always)]
    fn to_wide(self) -> f32 {
        const EXPONENTS: u32 = 0x1f << 23;
        let bits = u32::from(self.to_bits());
        // Exponent and mantissa in their places of an f32, which counts exponents from 127, not 15.
        let magnitude = (bits & 0x7fff) << 13;
        let normal = magnitude + (112 << 23);
        // Without an exponent the mantissa counts units of 2^-24; here it follows the one of 2^-14.
        let subnormal = (f32::from_bits(magnitude + (113 << 23)) - f32::from_bits(113 << 23)).to_bits();
        let finite = if magnitude < 1 << 23 { subnormal } else { normal };
        let wide = if magnitude >= EXPONENTS { magnitude + (224 << 23) } else { finite };
        f32::from_bits(wide | (bits & 0x8000) << 16)
    }
    #[inline(always)]
    fn from_wide(value: f32) -> f16 {
        const INFINITY: u32 = 0x7c00;
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let normal = magnitude.wrapping_add(0xfff + (magnitude >> 13 & 1)).wrapping_sub(112 << 23) >> 13;
        // Next to 0.5 an f32 has units of 2^-24, as a subnormal f16 has: adding rounds.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let finite = if magnitude < 113 << 23 { subnormal } else { normal.min(INFINITY) };
        let quiet = INFINITY | 0x200 | (magnitude >> 13 & 0x3ff);
        let narrow = if value.is_nan() { quiet } else { finite };
        f16::from_bits((narrow | bits >> 16 & 0x8000) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same<T: Convert<Accumulator = f32>>(x: f32, bits: fn(T) -> u16) {
        let (ours, theirs) = (bits(T::from_wide(x)), bits(T::narrow(x)));
        assert_eq!(ours, theirs, "{x:e} ({:x}) becomes {ours:x}, not {theirs:x}", x.to_bits());
    }

    #[test]
    fn every_half_is_widened_as_the_element_says() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert!(b.to_wide().to_bits() == b.widen().to_bits() || b.to_wide().is_nan() && b.widen().is_nan());
            assert!(h.to_wide().to_bits() == h.widen().to_bits() || h.to_wide().is_nan() && h.widen().is_nan());
        }
    }

    #[test]
    fn floats_are_narrowed_as_the_element_says() {
        // Every value of a half type, the middle between it and the next, and the floats beside both; then a walk.
        for bits in 0..=u16::MAX {
            for x in [f16::from_bits(bits).to_f32(), bf16::from_bits(bits).to_f32()] {
                for place in [0, 1 << 12, 1 << 15] {
                    for beside in [-1i32, 0, 1] {
                        let x = f32::from_bits(x.to_bits().wrapping_add(place).wrapping_add_signed(beside));
                        same::<f16>(x, f16::to_bits);
                        same::<bf16>(x, bf16::to_bits);
                    }
                }
            }
        }
        for bits in (0..=u32::MAX).step_by(977) {
            same::<f16>(f32::from_bits(bits), f16::to_bits);
            same::<bf16>(f32::from_bits(bits), bf16::to_bits);
        }
    }
}
