//! Elements widened to f32 in registers.
use std::arch::x86_64::{
    __m256, __m512, _mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_slli_epi32, _mm256_storeu_ps, _mm512_castsi512_ps, _mm512_cvtepu16_epi32,
    _mm512_cvtph_ps, _mm512_loadu_ps, _mm512_slli_epi32, _mm512_storeu_ps,
};

use half::{bf16, f16};

use crate::operand::Operand;

/// An element type of the kernels that compute in f32.
pub(crate) trait Widen: Operand<Accumulator = f32> {
    /// # Safety
    /// 8 elements; avx2, f16c.
    unsafe fn eight(source: *const Self) -> __m256;
    /// # Safety
    /// 16 elements; avx512f.
    unsafe fn sixteen(source: *const Self) -> __m512;
}

impl Widen for f32 {
    #[inline(always)]
    unsafe fn eight(source: *const Self) -> __m256 {
        // SAFETY: our caller vouches for the elements and for the features.
        unsafe { _mm256_loadu_ps(source) }
    }
    #[inline(always)]
    unsafe fn sixteen(source: *const Self) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_loadu_ps(source) }
    }
}

impl Widen for f16 {
    #[inline(always)]
    unsafe fn eight(source: *const Self) -> __m256 {
        // SAFETY: our caller vouches for the elements and for the features.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(source.cast())) }
    }
    #[inline(always)]
    unsafe fn sixteen(source: *const Self) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(source.cast())) }
    }
}

impl Widen for bf16 {
    #[inline(always)]
    unsafe fn eight(source: *const Self) -> __m256 {
        // SAFETY: our caller vouches for the elements and for the features.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(source.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn sixteen(source: *const Self) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(source.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
}

/// Widens a row by the first-named width.
macro_rules! widen_row {
    ($name:ident, $lanes:literal, $load:ident, $store:ident, $features:literal) => {
        #[doc = concat!("Widens `count` elements, ", $lanes, " at a time.")]
        ///
        /// # Safety
        /// There are `count` elements and as many places for the result;
        #[doc = $features]
        #[inline(always)]
        pub(super) unsafe fn $name<T: Widen>(source: *const T, count: usize, target: *mut f32) {
            let whole = count / $lanes * $lanes;
            // SAFETY: our caller vouches for `count` elements at both and for the features.
            unsafe {
                for start in (0..whole).step_by($lanes) {
                    $store(target.add(start), T::$load(source.add(start)));
                }
                for place in whole..count {
                    target.add(place).write((*source.add(place)).to_wide());
                }
            }
        }
    };
}
widen_row!(widen_eights, 8, eight, _mm256_storeu_ps, "avx2, f16c.");
widen_row!(widen_sixteens, 16, sixteen, _mm512_storeu_ps, "avx512f.");
