//! AVX-512: 32 registers of 512 bits.
use std::arch::x86_64::{
    __m512, __m512d, _mm512_add_pd, _mm512_add_ps, _mm512_fmadd_pd, _mm512_fmadd_ps, _mm512_loadu_pd, _mm512_loadu_ps,
    _mm512_set1_pd, _mm512_set1_ps, _mm512_setzero_pd, _mm512_setzero_ps, _mm512_storeu_pd, _mm512_storeu_ps,
};
use std::marker::PhantomData;

use super::avx2::{float_kernel, prefetched};
use super::transpose::{Eight64, Sixteen, pack_floats, transpose_units};
use super::widen::{Widen, widen_sixteens};
use crate::arch::kernel::{Ahead, Kernel, Rows, VECTORS};
use crate::arch::portable::Portable;

/// Elements whose accumulator is f32.
pub(crate) struct Avx512<T>(PhantomData<T>);
/// f64.
pub(crate) struct Avx512F64;

// SAFETY: needs avx512f, f16c.
unsafe impl<T: Widen> Kernel for Avx512<T> {
    type Element = T;
    float_kernel!(
        f32,
        __m512,
        16,
        14,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        |left: &f32| _mm512_set1_ps(*left),
        _mm512_fmadd_ps
    );

    #[inline(always)]
    unsafe fn factors_across(first: *const T, _second: Option<*const T>) -> [__m512; VECTORS] {
        // SAFETY: our caller vouches for a panel's elements and for the features.
        unsafe { [T::sixteen(first), T::sixteen(first.add(Self::LANES))] }
    }
    #[inline(always)]
    unsafe fn pack_across(first: *const T, _second: Option<*const T>, count: usize, target: *mut f32) {
        // SAFETY: passed on from our caller. Twice, once with a length that the compiler knows.
        unsafe {
            if count == Self::PANEL {
                widen_sixteens(first, Self::PANEL, target);
            } else {
                widen_sixteens(first, count, target);
            }
        }
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
        unsafe { pack_floats::<Self, Sixteen, T>(source, depth, count, target, target_stride, ahead) }
    }
}

// SAFETY: needs avx512f.
unsafe impl Kernel for Avx512F64 {
    type Element = f64;
    float_kernel!(
        f64,
        __m512d,
        8,
        14,
        _mm512_setzero_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        _mm512_add_pd,
        |left: &f64| _mm512_set1_pd(*left),
        _mm512_fmadd_pd
    );

    #[inline(always)]
    unsafe fn factors_across(first: *const f64, _second: Option<*const f64>) -> [__m512d; VECTORS] {
        // SAFETY: our caller vouches for a panel's elements and for the features.
        unsafe { [_mm512_loadu_pd(first), _mm512_loadu_pd(first.add(Self::LANES))] }
    }
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
            transpose_units::<Self, Eight64>(source, depth, count, target.cast(), target_stride, ahead);
        }
    }
}
