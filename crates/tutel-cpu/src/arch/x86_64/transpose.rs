//! Transposition of 32-bit units in registers.
use std::arch::x86_64::{
    _mm512_loadu_epi32, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_epi32, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use crate::arch::kernel::{Ahead, Kernel, Rows};

const SIDE: usize = 16;

/// `target[u * target_stride + c] = source[c * stride + u]` for `c < count`, `u < depth`. Announces as much
/// memory as it reads.
///
/// # Safety
/// `count` rows of `depth` units are at `source`, room for `depth` rows of `count` units at `target`; avx512f.
#[inline(always)]
pub(crate) unsafe fn transpose_units<K: Kernel>(
    source: Rows<u32>,
    depth: usize,
    count: usize,
    target: *mut u32,
    target_stride: usize,
    ahead: &mut Ahead,
) {
    let Rows { first: source, stride } = source;
    for column in (0..count).step_by(SIDE) {
        for unit in (0..depth).step_by(SIDE) {
            let whole = column + SIDE <= count && unit + SIDE <= depth;
            // SAFETY: the square's first unit lies in both; a whole square lies in them entirely.
            let (source, target) =
                unsafe { (source.add(column * stride + unit), target.add(unit * target_stride + column)) };
            // SAFETY: features: our caller. Each row of a square is a cache line.
            unsafe { ahead.announce::<K>(SIDE) };
            if whole {
                // SAFETY: a whole square of 16 by 16 units; features: our caller.
                unsafe { transpose_square(source, stride, target, target_stride) };
            } else {
                for c in 0..SIDE.min(count - column) {
                    for u in 0..SIDE.min(depth - unit) {
                        // SAFETY: c and u stay within what is left of both.
                        unsafe { target.add(u * target_stride + c).write(source.add(c * stride + u).read_unaligned()) };
                    }
                }
            }
        }
    }
}

/// # Safety
/// 16 rows of 16 units at both; avx512f.
#[inline(always)]
unsafe fn transpose_square(source: *const u32, stride: usize, target: *mut u32, target_stride: usize) {
    // SAFETY: our caller vouches for the rows and for the features.
    unsafe {
        // Plain loops: a closure would be a function without the processor's features.
        let mut rows = [_mm512_setzero_si512(); SIDE];
        for (row, register) in rows.iter_mut().enumerate() {
            *register = _mm512_loadu_epi32(source.add(row * stride).cast());
        }
        // Pairs of rows, then pairs of pairs, interleave within 128-bit lanes; the lanes are put in place last.
        let mut pairs = rows;
        for pair in 0..SIDE / 2 {
            let (first, second) = (rows[2 * pair], rows[2 * pair + 1]);
            pairs[2 * pair] = _mm512_unpacklo_epi32(first, second);
            pairs[2 * pair + 1] = _mm512_unpackhi_epi32(first, second);
        }
        // quads[4 * q + j] holds, in lane l, column 4 * l + j of rows 4 * q .. 4 * q + 3.
        let mut quads = rows;
        for quad in (0..SIDE).step_by(4) {
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
