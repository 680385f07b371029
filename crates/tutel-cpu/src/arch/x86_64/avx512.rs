//! AVX-512: 32 registers of 512 bits.
use std::arch::x86_64::{
    __m512, __m512d, _mm512_add_pd, _mm512_add_ps, _mm512_fmadd_pd, _mm512_fmadd_ps, _mm512_loadu_pd, _mm512_loadu_ps,
    _mm512_set1_pd, _mm512_set1_ps, _mm512_setzero_pd, _mm512_setzero_ps, _mm512_storeu_pd, _mm512_storeu_ps,
};
use std::marker::PhantomData;

use super::avx2::{float_kernel, prefetched};
use super::transpose::transpose_units;
use crate::arch::kernel::{Ahead, Kernel, Rows};
use crate::arch::portable::{Portable, packed_portably, widen};
use crate::operand::Operand;

/// Elements whose accumulator is f32.
pub(crate) struct Avx512<T>(PhantomData<T>);
/// f64.
pub(crate) struct Avx512F64;

// SAFETY: needs avx512f, f16c.
unsafe impl<T: Operand<Accumulator = f32>> Kernel for Avx512<T> {
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
    unsafe fn pack_across(first: *const T, second: Option<*const T>, count: usize, target: *mut f32) {
        // SAFETY: passed on from our caller; elements that are their own accumulator are f32.
        unsafe {
            if T::IS_ACCUMULATOR && count == Self::PANEL {
                let source = first.cast::<f32>();
                for column in [0, Self::LANES] {
                    _mm512_storeu_ps(target.add(column), _mm512_loadu_ps(source.add(column)));
                }
            } else {
                Portable::<T>::pack_across(first, second, count, target);
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
        // SAFETY: passed on from our caller. Where elements are f32, their bits are moved as they are; other types are
        // widened row by row into a small square first.
        unsafe {
            if count == 1 && target_stride == 1 {
                widen(source.first, depth, target);
            } else if T::IS_ACCUMULATOR {
                let source = Rows { first: source.first.cast(), stride: source.stride };
                transpose_units::<Self>(source, depth, count, target.cast(), target_stride, ahead);
            } else {
                const SQUARE: usize = 64;
                let mut rows = [[0f32; SQUARE]; 32];
                for start in (0..depth).step_by(SQUARE) {
                    let taken = SQUARE.min(depth - start);
                    for (column, row) in rows.iter_mut().enumerate().take(count) {
                        ahead.announce::<Self>((taken * size_of::<T>()).div_ceil(Ahead::LINE));
                        widen(source.first.add(column * source.stride + start), taken, row.as_mut_ptr());
                    }
                    let target = target.add(start * target_stride).cast();
                    let rows = Rows { first: rows.as_ptr().cast(), stride: SQUARE };
                    transpose_units::<Self>(rows, taken, count, target, target_stride, &mut Ahead::nothing());
                }
            }
        }
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

    packed_portably!(f64, f64);
}
