//! NEON: 32 registers of 128 bits, which every 64-bit Arm processor has.
use std::arch::aarch64::{
    float32x4_t, float64x2_t, vaddq_f32, vaddq_f64, vdupq_n_f32, vdupq_n_f64, vfmaq_n_f32, vfmaq_n_f64, vld1q_f32,
    vld1q_f64, vst1q_f32, vst1q_f64,
};
use std::arch::asm;
use std::marker::PhantomData;

use crate::arch::kernel::{Ahead, Kernel, Rows};
use crate::arch::portable::{Portable, packed_portably};
use crate::operand::Operand;

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
        unsafe fn load(sums: *const $sum) -> $register {
            // SAFETY: our caller vouches for LANES sums and for the features.
            unsafe { $load(sums) }
        }
        #[inline(always)]
        unsafe fn store(sums: *mut $sum, register: $register) {
            // SAFETY: our caller vouches for LANES sums and for the features.
            unsafe { $store(sums, register) }
        }
        #[inline(always)]
        unsafe fn add(left: $register, right: $register) -> $register {
            // SAFETY: our caller vouches for the features.
            unsafe { $add(left, right) }
        }
        // The intrinsic for announcements is not stable.
        #[inline(always)]
        unsafe fn prefetch<P>(address: *const P) {
            // SAFETY: an announcement of any address, which changes nothing that a program sees.
            unsafe { asm!("prfm pldl2keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly)) }
        }
        #[inline(always)]
        unsafe fn prefetch_near<P>(address: *const P) {
            // SAFETY: as above.
            unsafe { asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly)) }
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
unsafe impl<T: Operand<Accumulator = f32>> Kernel for Neon<T> {
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
