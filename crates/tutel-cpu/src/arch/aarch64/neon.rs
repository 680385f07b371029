//! NEON: 32 registers of 128 bits, which every 64-bit Arm processor has.
use std::arch::aarch64::{
    float32x4_t, float64x2_t, vaddq_f32, vaddq_f64, vdupq_n_f32, vdupq_n_f64, vfmaq_n_f32, vfmaq_n_f64, vld1q_f32,
    vld1q_f64, vst1q_f32, vst1q_f64,
};
use std::marker::PhantomData;

use tutel_core::Element;

use crate::arch::kernel::Kernel;
use crate::arch::portable::{Portable, packed_portably};

/// Elements whose accumulator is f32.
pub(crate) struct Neon<T>(PhantomData<T>);
/// f64.
pub(crate) struct NeonF64;

/// The functions of [`Kernel`] for one register type of floats. Of the 32 registers 24 hold sums, two the units of the
/// right factor, and six are left for those of the left one.
macro_rules! float_kernel {
    ($sum:ty, $register:ty, $lanes:literal, $set:ident, $load:ident, $store:ident, $add:ident, $fma:ident) => {
        type Unit = $sum;
        type Sum = $sum;
        type Register = $register;
        type Factor = $register;
        const DEPTH: usize = 1;
        const LANES: usize = $lanes;
        const ROWS: usize = 12;

        #[inline(always)]
        unsafe fn zero() -> $register {
            // SAFETY: our caller vouches for the features.
            unsafe { $set(0.0) }
        }
        #[inline(always)]
        unsafe fn add_to(sums: *mut $sum, register: $register) {
            // SAFETY: our caller vouches for LANES sums and for the features.
            unsafe { $store(sums, $add($load(sums), register)) }
        }
        #[inline(always)]
        unsafe fn prefetch(_sums: *const $sum) {
            // There is no stable intrinsic for it.
        }
        #[inline(always)]
        unsafe fn factor(units: *const $sum) -> $register {
            // SAFETY: our caller vouches for LANES units and for the features.
            unsafe { $load(units) }
        }
        #[inline(always)]
        unsafe fn step(sum: $register, left: *const $sum, right: $register) -> $register {
            // SAFETY: our caller vouches for one unit and for the features.
            unsafe { $fma(sum, right, *left) }
        }
    };
}

// SAFETY: needs neon.
unsafe impl<T: Element<Accumulator = f32>> Kernel for Neon<T> {
    type Element = T;
    float_kernel!(f32, float32x4_t, 4, vdupq_n_f32, vld1q_f32, vst1q_f32, vaddq_f32, vfmaq_n_f32);

    packed_portably!(T, f32);
}

// SAFETY: needs neon.
unsafe impl Kernel for NeonF64 {
    type Element = f64;
    float_kernel!(f64, float64x2_t, 2, vdupq_n_f64, vld1q_f64, vst1q_f64, vaddq_f64, vfmaq_n_f64);

    packed_portably!(f64, f64);
}
