//! `AVX512_BF16`: a step multiplies pairs of bf16 and adds both products to an f32 sum.
use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_prefetch, _mm256_loadu_si256, _mm512_add_ps, _mm512_cvtepu16_epi32,
    _mm512_dpbf16_ps, _mm512_loadu_epi32, _mm512_loadu_ps, _mm512_or_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_slli_epi32, _mm512_storeu_epi32, _mm512_storeu_ps,
};
use std::mem::transmute;

use half::bf16;

use super::transpose::transpose_units;
use crate::arch::kernel::Kernel;

pub(crate) struct Avx512Bf16;

/// Two neighbours of the inner dimension, the first in the low half.
#[inline(always)]
fn unit(first: bf16, second: bf16) -> u32 {
    u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16
}

// SAFETY: needs avx512f, avx512bf16.
unsafe impl Kernel for Avx512Bf16 {
    type Element = bf16;
    type Unit = u32;
    type Sum = f32;
    type Register = __m512;
    type Factor = __m512bh;
    const DEPTH: usize = 2;
    const LANES: usize = 16;
    const ROWS: usize = 14;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: our caller vouches for the features.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn add_to(sums: *mut f32, register: __m512) {
        // SAFETY: our caller vouches for LANES sums and for the features.
        unsafe { _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), register)) }
    }
    #[inline(always)]
    unsafe fn prefetch(sums: *const f32) {
        // SAFETY: our caller vouches for the features.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(sums.cast()) }
    }
    #[inline(always)]
    unsafe fn factor(units: *const u32) -> __m512bh {
        // SAFETY: our caller vouches for LANES units and for the features; both types are 512 plain bits.
        unsafe { transmute::<__m512i, __m512bh>(_mm512_loadu_epi32(units.cast())) }
    }
    #[inline(always)]
    unsafe fn step(sum: __m512, left: *const u32, right: __m512bh) -> __m512 {
        // SAFETY: our caller vouches for one unit, which need not be aligned, and for the features; both types are 512
        // plain bits.
        unsafe {
            let left = _mm512_set1_epi32(left.read_unaligned().cast_signed());
            _mm512_dpbf16_ps(sum, transmute::<__m512i, __m512bh>(left), right)
        }
    }
    #[inline(always)]
    unsafe fn pack_across(source: *const bf16, stride: usize, depth: usize, count: usize, target: *mut u32) {
        // SAFETY: our caller vouches for `depth` rows of `count` elements and for `count` units, and for the features; the
        // targets are initialised buffers of the packing code.
        unsafe {
            if depth == 2 && count.is_multiple_of(Self::LANES) {
                for column in (0..count).step_by(Self::LANES) {
                    let first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(source.add(column).cast()));
                    let second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(source.add(stride + column).cast()));
                    let units = _mm512_or_si512(first, _mm512_slli_epi32::<16>(second));
                    _mm512_storeu_epi32(target.add(column).cast(), units);
                }
                return;
            }
            let target = std::slice::from_raw_parts_mut(target, count);
            let first = std::slice::from_raw_parts(source, count);
            if depth == 2 {
                let second = std::slice::from_raw_parts(source.add(stride), count);
                for ((target, &first), &second) in target.iter_mut().zip(first).zip(second) {
                    *target = unit(first, second);
                }
            } else {
                for (target, &first) in target.iter_mut().zip(first) {
                    *target = unit(first, bf16::ZERO);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn pack_along(
        source: *const bf16,
        stride: usize,
        depth: usize,
        count: usize,
        target: *mut u32,
        target_stride: usize,
    ) {
        let whole = depth / 2;
        if stride.is_multiple_of(2) && count > 1 {
            // SAFETY: rows are whole numbers of units apart, which are moved as 32 bits; features: our caller.
            unsafe { transpose_units(source.cast(), stride / 2, whole, count, target, target_stride) };
        } else {
            for column in 0..count {
                for u in 0..whole {
                    // SAFETY: our caller vouches for `depth` elements a row and for the units.
                    unsafe {
                        let pair = source.add(column * stride + 2 * u).cast::<u32>().read_unaligned();
                        target.add(u * target_stride + column).write(pair);
                    }
                }
            }
        }
        if !depth.is_multiple_of(2) {
            for column in 0..count {
                // SAFETY: the last element of a row, and the last unit.
                unsafe {
                    let last = *source.add(column * stride + depth - 1);
                    target.add(whole * target_stride + column).write(unit(last, bf16::ZERO));
                }
            }
        }
    }
}
