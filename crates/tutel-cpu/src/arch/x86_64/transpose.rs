//! Transposition of units in registers.
use std::arch::x86_64::{
    __m256i, _mm256_loadu_si256, _mm256_permute2x128_si256, _mm256_setzero_si256, _mm256_storeu_si256,
    _mm256_unpackhi_epi32, _mm256_unpackhi_epi64, _mm256_unpacklo_epi32, _mm256_unpacklo_epi64, _mm512_loadu_epi32,
    _mm512_loadu_epi64, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_shuffle_i64x2, _mm512_storeu_epi32,
    _mm512_storeu_epi64, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::widen::{Widen, widen_eights, widen_sixteens};
use crate::arch::kernel::{Ahead, Kernel, Rows};

/// Squares of units, each row in one register.
pub(super) trait Square {
    type Unit: Copy;
    /// Rows and columns.
    const SIDE: usize;
    /// `target[u * target_stride + c] = source[c * stride + u]` for all rows and columns of a square.
    ///
    /// # Safety
    /// `SIDE` rows of `SIDE` units at both; the features that the implementation names.
    unsafe fn transpose(source: *const Self::Unit, stride: usize, target: *mut Self::Unit, target_stride: usize);
}

/// Squares of f32.
pub(super) trait Floats: Square<Unit = u32> {
    /// # Safety
    /// `count` elements at the source and as many places at the target; the features of the square.
    unsafe fn widen<T: Widen>(source: *const T, count: usize, target: *mut f32);
}

/// 16 by 16 units of 32 bits; avx512f.
pub(super) struct Sixteen;
/// 8 by 8 units of 64 bits; avx512f.
pub(super) struct Eight64;
/// 8 by 8 units of 32 bits; avx2, f16c.
pub(super) struct Eight;
/// 4 by 4 units of 64 bits; avx2.
pub(super) struct Four64;

/// `target[u * target_stride + c] = source[c * stride + u]` for `c < count`, `u < depth`. Announces as much memory
/// as it reads.
///
/// # Safety
/// `count` rows of `depth` units are at `source`, room for `depth` rows of `count` units at `target`; the features of the
/// square.
#[inline(always)]
pub(super) unsafe fn transpose_units<K: Kernel, S: Square>(
    source: Rows<S::Unit>,
    depth: usize,
    count: usize,
    target: *mut S::Unit,
    target_stride: usize,
    ahead: &mut Ahead,
) {
    let Rows { first: source, stride } = source;
    let lines = (S::SIDE * S::SIDE * size_of::<S::Unit>()).div_ceil(Ahead::LINE);
    for column in (0..count).step_by(S::SIDE) {
        for unit in (0..depth).step_by(S::SIDE) {
            let whole = column + S::SIDE <= count && unit + S::SIDE <= depth;
            // SAFETY: the square's first unit lies in both; a whole square lies in them entirely.
            let (source, target) =
                unsafe { (source.add(column * stride + unit), target.add(unit * target_stride + column)) };
            // SAFETY: features: our caller.
            unsafe { ahead.announce::<K>(lines) };
            if whole {
                // SAFETY: a whole square; features: our caller.
                unsafe { S::transpose(source, stride, target, target_stride) };
            } else {
                for c in 0..S::SIDE.min(count - column) {
                    for u in 0..S::SIDE.min(depth - unit) {
                        // SAFETY: c and u stay within what is left of both.
                        unsafe { target.add(u * target_stride + c).write(source.add(c * stride + u).read_unaligned()) };
                    }
                }
            }
        }
    }
}

/// [`Kernel::pack_along`] of the kernels that compute in f32. Where elements are f32, their bits are moved as they are; other
/// types are widened row by row into a small square first.
///
/// # Safety
/// As of [`Kernel::pack_along`]; the features of the square.
#[inline(always)]
pub(super) unsafe fn pack_floats<K: Kernel, S: Floats, T: Widen>(
    source: Rows<T>,
    depth: usize,
    count: usize,
    target: *mut f32,
    target_stride: usize,
    ahead: &mut Ahead,
) {
    const LENGTH: usize = 64;
    // SAFETY: passed on from our caller; a panel has no more than 32 columns.
    unsafe {
        if count == 1 && target_stride == 1 {
            S::widen(source.first, depth, target);
        } else if T::IS_ACCUMULATOR {
            let source = Rows { first: source.first.cast(), stride: source.stride };
            transpose_units::<K, S>(source, depth, count, target.cast(), target_stride, ahead);
        } else {
            let mut rows = [[0f32; LENGTH]; 32];
            for start in (0..depth).step_by(LENGTH) {
                let taken = LENGTH.min(depth - start);
                for (column, row) in rows.iter_mut().enumerate().take(count) {
                    ahead.announce::<K>((taken * size_of::<T>()).div_ceil(Ahead::LINE));
                    S::widen(source.first.add(column * source.stride + start), taken, row.as_mut_ptr());
                }
                let target = target.add(start * target_stride).cast();
                let rows = Rows { first: rows.as_ptr().cast(), stride: LENGTH };
                transpose_units::<K, S>(rows, taken, count, target, target_stride, &mut Ahead::nothing());
            }
        }
    }
}

impl Floats for Sixteen {
    #[inline(always)]
    unsafe fn widen<T: Widen>(source: *const T, count: usize, target: *mut f32) {
        // SAFETY: passed on from our caller.
        unsafe { widen_sixteens(source, count, target) }
    }
}

impl Floats for Eight {
    #[inline(always)]
    unsafe fn widen<T: Widen>(source: *const T, count: usize, target: *mut f32) {
        // SAFETY: passed on from our caller.
        unsafe { widen_eights(source, count, target) }
    }
}

impl Square for Sixteen {
    type Unit = u32;
    const SIDE: usize = 16;

    #[inline(always)]
    unsafe fn transpose(source: *const u32, stride: usize, target: *mut u32, target_stride: usize) {
        // SAFETY: our caller vouches for the rows and for the features.
        unsafe {
            // Plain loops: a closure would be a function without the processor's features.
            let mut rows = [_mm512_setzero_si512(); 16];
            for (row, register) in rows.iter_mut().enumerate() {
                *register = _mm512_loadu_epi32(source.add(row * stride).cast());
            }
            // Pairs of rows, then pairs of pairs, interleave within 128-bit lanes; the lanes are put in place last.
            let mut pairs = rows;
            for pair in 0..16 / 2 {
                let (first, second) = (rows[2 * pair], rows[2 * pair + 1]);
                pairs[2 * pair] = _mm512_unpacklo_epi32(first, second);
                pairs[2 * pair + 1] = _mm512_unpackhi_epi32(first, second);
            }
            // quads[4 * q + j] holds, in lane l, column 4 * l + j of rows 4 * q .. 4 * q + 3.
            let mut quads = rows;
            for quad in (0..16).step_by(4) {
                quads[quad] = _mm512_unpacklo_epi64(pairs[quad], pairs[quad + 2]);
                quads[quad + 1] = _mm512_unpackhi_epi64(pairs[quad], pairs[quad + 2]);
                quads[quad + 2] = _mm512_unpacklo_epi64(pairs[quad + 1], pairs[quad + 3]);
                quads[quad + 3] = _mm512_unpackhi_epi64(pairs[quad + 1], pairs[quad + 3]);
            }
            for column in 0..4 {
                let (a, b, c, d) = (quads[column], quads[4 + column], quads[8 + column], quads[12 + column]);
                let (ab_low, ab_high) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0xee>(a, b));
                let (cd_low, cd_high) = (_mm512_shuffle_i32x4::<0x44>(c, d), _mm512_shuffle_i32x4::<0xee>(c, d));
                let columns = [
                    _mm512_shuffle_i32x4::<0x88>(ab_low, cd_low),
                    _mm512_shuffle_i32x4::<0xdd>(ab_low, cd_low),
                    _mm512_shuffle_i32x4::<0x88>(ab_high, cd_high),
                    _mm512_shuffle_i32x4::<0xdd>(ab_high, cd_high),
                ];
                for (lane, value) in columns.into_iter().enumerate() {
                    _mm512_storeu_epi32(target.add((4 * lane + column) * target_stride).cast(), value);
                }
            }
        }
    }
}

impl Square for Eight64 {
    type Unit = u64;
    const SIDE: usize = 8;

    #[inline(always)]
    unsafe fn transpose(source: *const u64, stride: usize, target: *mut u64, target_stride: usize) {
        // SAFETY: our caller vouches for the rows and for the features.
        unsafe {
            let mut rows = [_mm512_setzero_si512(); 8];
            for (row, register) in rows.iter_mut().enumerate() {
                *register = _mm512_loadu_epi64(source.add(row * stride).cast());
            }
            // pairs[2 * p + j] holds, in lane l, column 2 * l + j of rows 2 * p and 2 * p + 1.
            let mut pairs = rows;
            for pair in 0..4 {
                pairs[2 * pair] = _mm512_unpacklo_epi64(rows[2 * pair], rows[2 * pair + 1]);
                pairs[2 * pair + 1] = _mm512_unpackhi_epi64(rows[2 * pair], rows[2 * pair + 1]);
            }
            for column in 0..2 {
                let (a, b, c, d) = (pairs[column], pairs[2 + column], pairs[4 + column], pairs[6 + column]);
                let (ab_low, ab_high) = (_mm512_shuffle_i64x2::<0x44>(a, b), _mm512_shuffle_i64x2::<0xee>(a, b));
                let (cd_low, cd_high) = (_mm512_shuffle_i64x2::<0x44>(c, d), _mm512_shuffle_i64x2::<0xee>(c, d));
                let columns = [
                    _mm512_shuffle_i64x2::<0x88>(ab_low, cd_low),
                    _mm512_shuffle_i64x2::<0xdd>(ab_low, cd_low),
                    _mm512_shuffle_i64x2::<0x88>(ab_high, cd_high),
                    _mm512_shuffle_i64x2::<0xdd>(ab_high, cd_high),
                ];
                for (lane, value) in columns.into_iter().enumerate() {
                    _mm512_storeu_epi64(target.add((2 * lane + column) * target_stride).cast(), value);
                }
            }
        }
    }
}

/// # Safety
/// `N` rows of 256 bits, `stride` units apart; avx2.
#[inline(always)]
unsafe fn load_rows<U, const N: usize>(source: *const U, stride: usize) -> [__m256i; N] {
    // SAFETY: our caller vouches for the rows and for the features.
    unsafe {
        let mut rows = [_mm256_setzero_si256(); N];
        for (row, register) in rows.iter_mut().enumerate() {
            *register = _mm256_loadu_si256(source.add(row * stride).cast());
        }
        rows
    }
}

impl Square for Eight {
    type Unit = u32;
    const SIDE: usize = 8;

    #[inline(always)]
    unsafe fn transpose(source: *const u32, stride: usize, target: *mut u32, target_stride: usize) {
        // SAFETY: our caller vouches for the rows and for the features.
        unsafe {
            let rows: [__m256i; 8] = load_rows(source, stride);
            let mut pairs = rows;
            for pair in 0..4 {
                pairs[2 * pair] = _mm256_unpacklo_epi32(rows[2 * pair], rows[2 * pair + 1]);
                pairs[2 * pair + 1] = _mm256_unpackhi_epi32(rows[2 * pair], rows[2 * pair + 1]);
            }
            // quads[4 * q + j] holds, in lane l, column 4 * l + j of rows 4 * q .. 4 * q + 3.
            let mut quads = rows;
            for quad in [0, 4] {
                quads[quad] = _mm256_unpacklo_epi64(pairs[quad], pairs[quad + 2]);
                quads[quad + 1] = _mm256_unpackhi_epi64(pairs[quad], pairs[quad + 2]);
                quads[quad + 2] = _mm256_unpacklo_epi64(pairs[quad + 1], pairs[quad + 3]);
                quads[quad + 3] = _mm256_unpackhi_epi64(pairs[quad + 1], pairs[quad + 3]);
            }
            for column in 0..4 {
                let (upper, lower) = (quads[column], quads[4 + column]);
                let columns =
                    [_mm256_permute2x128_si256::<0x20>(upper, lower), _mm256_permute2x128_si256::<0x31>(upper, lower)];
                for (lane, value) in columns.into_iter().enumerate() {
                    _mm256_storeu_si256(target.add((4 * lane + column) * target_stride).cast(), value);
                }
            }
        }
    }
}

impl Square for Four64 {
    type Unit = u64;
    const SIDE: usize = 4;

    #[inline(always)]
    unsafe fn transpose(source: *const u64, stride: usize, target: *mut u64, target_stride: usize) {
        // SAFETY: our caller vouches for the rows and for the features.
        unsafe {
            let rows: [__m256i; 4] = load_rows(source, stride);
            for column in 0..2 {
                let (upper, lower) = if column == 0 {
                    (_mm256_unpacklo_epi64(rows[0], rows[1]), _mm256_unpacklo_epi64(rows[2], rows[3]))
                } else {
                    (_mm256_unpackhi_epi64(rows[0], rows[1]), _mm256_unpackhi_epi64(rows[2], rows[3]))
                };
                let columns =
                    [_mm256_permute2x128_si256::<0x20>(upper, lower), _mm256_permute2x128_si256::<0x31>(upper, lower)];
                for (lane, value) in columns.into_iter().enumerate() {
                    _mm256_storeu_si256(target.add((2 * lane + column) * target_stride).cast(), value);
                }
            }
        }
    }
}
