//! AVX2 and FMA, with F16C: 16 registers of 256 bits.
use std::arch::x86_64::{
    __m256, __m256d, _mm256_add_pd, _mm256_add_ps, _mm256_broadcast_sd, _mm256_broadcast_ss, _mm256_fmadd_pd,
    _mm256_fmadd_ps, _mm256_loadu_pd, _mm256_loadu_ps, _mm256_setzero_pd, _mm256_setzero_ps, _mm256_storeu_pd,
    _mm256_storeu_ps,
};
use std::marker::PhantomData;

use super::transpose::{Eight, Four64, pack_floats, transpose_units};
use super::widen::{Widen, widen_eights};
use crate::arch::kernel::{Ahead, Kernel, Rows, VECTORS};
use crate::arch::portable::Portable;

/// Elements whose accumulator is f32.
pub(crate) struct Avx2<T>(PhantomData<T>);
/// f64.
pub(crate) struct Avx2F64;

/// Announcements of memory, the same in every kernel.
macro_rules! prefetched {
    () => {
        #[inline(always)]
        unsafe fn prefetch<P>(address: *const P) {
            // SAFETY: an announcement of any address; every x86-64 processor has it.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address.cast()) }
        }
        #[inline(always)]
        unsafe fn prefetch_near<P>(address: *const P) {
            // SAFETY: as above.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast()) }
        }
    };
}
pub(super) use prefetched;

/// The functions of [`Kernel`] that one register type of floats has in every kernel.
macro_rules! float_kernel {
    ($sum:ty, $register:ty, $lanes:literal, $rows:literal, $zero:ident, $load:ident, $store:ident, $add:ident, $broadcast:expr, $fma:ident) => {
        type Unit = $sum;
        type Sum = $sum;
        type Register = $register;
        type Factor = $register;
        const DEPTH: usize = 1;
        const LANES: usize = $lanes;
        const ROWS: usize = $rows;

        #[inline(always)]
        unsafe fn zero() -> $register {
            // SAFETY: our caller vouches for the features.
            unsafe { $zero() }
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
        prefetched!();
        #[inline(always)]
        unsafe fn factor(units: *const $sum) -> $register {
            // SAFETY: our caller vouches for LANES units and for the features.
            unsafe { $load(units) }
        }
        #[inline(always)]
        unsafe fn step(sum: $register, left: *const $sum, right: $register) -> $register {
            // SAFETY: our caller vouches for one unit and for the features.
            unsafe { $fma($broadcast(&*left), right, sum) }
        }
    };
}
pub(super) use float_kernel;

// SAFETY: needs avx2, fma, f16c.
unsafe impl<T: Widen> Kernel for Avx2<T> {
    type Element = T;
    float_kernel!(
        f32,
        __m256,
        8,
        6,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_broadcast_ss,
        _mm256_fmadd_ps
    );

    #[inline(always)]
    unsafe fn factors_across(first: *const T, _second: Option<*const T>) -> [__m256; VECTORS] {
        // SAFETY: our caller vouches for a panel's elements and for the features.
        unsafe { [T::eight(first), T::eight(first.add(Self::LANES))] }
    }
    #[inline(always)]
    unsafe fn pack_across(first: *const T, _second: Option<*const T>, count: usize, target: *mut f32) {
        // SAFETY: passed on from our caller.
        unsafe { widen_eights(first, count, target) }
    }
    #[inline(always)]
    unsafe fn pack_along(
        source: Rows<T>,
        depth: usize,
        count: usize,
        target: *mut f32,
        target_stride: usize,
        ahead: &mut Ahead,
    ) {
        // SAFETY: passed on from our caller.
        unsafe { pack_floats::<Self, Eight, T>(source, depth, count, target, target_stride, ahead) }
    }
}

// SAFETY: needs avx2, fma.
unsafe impl Kernel for Avx2F64 {
    type Element = f64;
    float_kernel!(
        f64,
        __m256d,
        4,
        6,
        _mm256_setzero_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_add_pd,
        _mm256_broadcast_sd,
        _mm256_fmadd_pd
    );

    #[inline(always)]
    unsafe fn pack_across(first: *const f64, second: Option<*const f64>, count: usize, target: *mut f64) {
        // SAFETY: passed on from our caller.
        unsafe { Portable::<f64>::pack_across(first, second, count, target) }
    }
    #[inline(always)]
    unsafe fn pack_along(
        source: Rows<f64>,
        depth: usize,
        count: usize,
        target: *mut f64,
        target_stride: usize,
        ahead: &mut Ahead,
    ) {
        // SAFETY: passed on from our caller; the bits of elements are moved as they are.
        unsafe {
            if count == 1 && target_stride == 1 {
                return Portable::<f64>::pack_along(source, depth, count, target, target_stride, ahead);
            }
            let source = Rows { first: source.first.cast(), stride: source.stride };
            transpose_units::<Self, Four64>(source, depth, count, target.cast(), target_stride, ahead);
        }
    }
}
