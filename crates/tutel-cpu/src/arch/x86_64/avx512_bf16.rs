//! `AVX512_BF16`: a step multiplies pairs of bf16 and adds both products to an f32 sum.
use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm256_loadu_si256, _mm512_add_ps, _mm512_cvtepu16_epi32, _mm512_dpbf16_ps,
    _mm512_loadu_epi16, _mm512_loadu_epi32, _mm512_loadu_ps, _mm512_or_si512, _mm512_permutex2var_epi16,
    _mm512_set1_epi32, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_slli_epi32, _mm512_storeu_epi32,
    _mm512_storeu_ps,
};
use std::mem::transmute;

use half::bf16;

use super::avx2::prefetched;
use super::transpose::{Sixteen, transpose_units};
use crate::arch::kernel::{Ahead, Kernel, Rows, VECTORS};

pub(crate) struct Avx512Bf16;

/// Two neighbours of the inner dimension, the first in the low half.
#[inline(always)]
fn unit(first: bf16, second: bf16) -> u32 {
    u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16
}

/// Where the elements of the first and the second 16 units stand: those of the second row count from 32.
const LOW: [i16; 32] = interleaved(0);
const HIGH: [i16; 32] = interleaved(16);

const fn interleaved(start: i16) -> [i16; 32] {
    let mut places = [0; 32];
    let mut column = 0;
    while column < 16 {
        places[2 * column as usize] = start + column;
        places[2 * column as usize + 1] = 32 + start + column;
        column += 1;
    }
    places
}

// SAFETY: needs avx512f, avx512bw, avx512bf16.
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
    unsafe fn load(sums: *const f32) -> __m512 {
        // SAFETY: our caller vouches for LANES sums and for the features.
        unsafe { _mm512_loadu_ps(sums) }
    }
    #[inline(always)]
    unsafe fn store(sums: *mut f32, register: __m512) {
        // SAFETY: our caller vouches for LANES sums and for the features.
        unsafe { _mm512_storeu_ps(sums, register) }
    }
    #[inline(always)]
    unsafe fn add(left: __m512, right: __m512) -> __m512 {
        // SAFETY: our caller vouches for the features.
        unsafe { _mm512_add_ps(left, right) }
    }
    prefetched!();
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
    unsafe fn factors_across(first: *const bf16, second: Option<*const bf16>) -> [__m512bh; VECTORS] {
        // SAFETY: our caller vouches for a panel's elements and for the features; both types are 512 plain bits.
        unsafe {
            let first = _mm512_loadu_epi16(first.cast());
            let second = match second {
                Some(second) => _mm512_loadu_epi16(second.cast()),
                None => _mm512_setzero_si512(),
            };
            let (low, high) = (_mm512_loadu_epi16(LOW.as_ptr()), _mm512_loadu_epi16(HIGH.as_ptr()));
            [
                transmute::<__m512i, __m512bh>(_mm512_permutex2var_epi16(first, low, second)),
                transmute::<__m512i, __m512bh>(_mm512_permutex2var_epi16(first, high, second)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn pack_across(first: *const bf16, second: Option<*const bf16>, count: usize, target: *mut u32) {
        // SAFETY: our caller vouches for rows of `count` elements and for `count` units, and for the features; the targets
        // are initialised buffers of the packing code.
        unsafe {
            let Some(second) = second else {
                for column in 0..count {
                    target.add(column).write(unit(*first.add(column), bf16::ZERO));
                }
                return;
            };
            let whole = count / Self::LANES * Self::LANES;
            for column in (0..whole).step_by(Self::LANES) {
                let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(first.add(column).cast()));
                let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(second.add(column).cast()));
                let units = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                _mm512_storeu_epi32(target.add(column).cast(), units);
            }
            for column in whole..count {
                target.add(column).write(unit(*first.add(column), *second.add(column)));
            }
        }
    }
    #[inline(always)]
    unsafe fn pack_along(
        source: Rows<bf16>,
        depth: usize,
        count: usize,
        target: *mut u32,
        target_stride: usize,
        ahead: &mut Ahead,
    ) {
        let Rows { first: source, stride } = source;
        let whole = depth / 2;
        if stride.is_multiple_of(2) && count > 1 {
            let rows = Rows { first: source.cast(), stride: stride / 2 };
            // SAFETY: rows are whole numbers of units apart, which are moved as 32 bits; features: our caller.
            unsafe { transpose_units::<Self, Sixteen>(rows, whole, count, target, target_stride, ahead) };
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
