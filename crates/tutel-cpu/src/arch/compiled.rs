//! Safe code, compiled once for each level of processor features.
//!
//! The loops of a kernel become the instructions of the function that they are inlined into. Nothing here reorders or
//! contracts arithmetic, so all levels compute the same bits.
use tutel_core::Real;

use super::level::Level;

/// The part of a kernel that runs on one thread.
pub(crate) trait Body {
    /// To be `#[inline(always)]` with every function of ours that it calls: one that is not inlined is compiled for
    /// the baseline.
    fn run<F: Features>(self, features: F);
}

/// Runs a body compiled for that level, which must be one that [`Level::current`] returned.
pub(crate) fn run_at(level: Level, body: impl Body) {
    // Every processor with AVX2 counts bits too, but says so apart.
    #[cfg(target_arch = "x86_64")]
    if level >= Level::Avx2 && is_x86_feature_detected!("popcnt") {
        return match level {
            // SAFETY: a level is only reached where its features were found.
            Level::Avx512 | Level::Avx512Bf16 => unsafe { avx512(body) },
            // SAFETY: as above.
            _ => unsafe { avx2(body) },
        };
    }
    let _ = level;
    body.run(Baseline);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")]
fn avx512<B: Body>(body: B) {
    body.run(Avx512);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,popcnt")]
fn avx2<B: Body>(body: B) {
    body.run(Baseline);
}

/// What compilers do not find by themselves: comparisons that end as masks.
pub(crate) trait Features: Copy {
    /// Appends the lanes that are at least the threshold, and their places counted from `first`, behind the first `len`
    /// of both lists; returns how many there are now. 16 elements of both behind `len` may be overwritten.
    ///
    /// # Panics
    /// Where there are none.
    #[inline(always)]
    fn append_at_least<A: Real>(
        self,
        (lanes, first): (&[A; 16], u32),
        threshold: A,
        (keys, places): (&mut [A], &mut [u32]),
        len: usize,
    ) -> usize {
        let (keys, places) = (&mut keys[len..][..16], &mut places[len..][..16]);
        let mut found = 0;
        for (place, &key) in (first..).zip(lanes) {
            // Each is written; only what is kept moves on.
            keys[found % 16] = key;
            places[found % 16] = place;
            found += usize::from(key >= threshold);
        }
        len + found
    }

    /// How many keys go before the one at that place: those that are larger, and equal ones at lower places. No key is
    /// NaN, and there are at most 64.
    #[inline(always)]
    fn rank<A: Real>(self, keys: &[[A; 16]], place: usize) -> usize {
        let keys = keys.as_flattened();
        let pivot = keys[place];
        let (before, behind) = keys.split_at(place);
        let before: u32 = before.iter().map(|&key| u32::from(key >= pivot)).sum();
        let behind: u32 = behind.iter().map(|&key| u32::from(key > pivot)).sum();
        (before + behind) as usize
    }
}

/// Whatever the code around was compiled for.
#[derive(Clone, Copy)]
struct Baseline;

impl Features for Baseline {}

/// Made by the function [`avx512`] alone, so that whoever has one runs on a processor with the features.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Avx512;

#[cfg(target_arch = "x86_64")]
impl Features for Avx512 {
    #[inline(always)]
    fn append_at_least<A: Real>(
        self,
        (lanes, first): (&[A; 16], u32),
        threshold: A,
        (keys, places): (&mut [A], &mut [u32]),
        len: usize,
    ) -> usize {
        use std::arch::x86_64::{
            _CMP_GE_OQ, _mm512_add_epi32, _mm512_cmp_ps_mask, _mm512_loadu_ps, _mm512_maskz_compress_epi32,
            _mm512_maskz_compress_ps, _mm512_set_epi32, _mm512_set1_epi32, _mm512_set1_ps, _mm512_storeu_epi32,
            _mm512_storeu_ps,
        };
        let (Some(floats), Some(&least)) = (same_type::<_, [f32; 16]>(lanes), same_type::<_, f32>(&threshold)) else {
            return Baseline.append_at_least((lanes, first), threshold, (keys, places), len);
        };
        let (keys, places) = (&mut keys[len..][..16], &mut places[len..][..16]);
        // SAFETY: 16 lanes are read from 16 lanes and written to 16 elements, which are f32 as the lanes are; that
        // `self` exists says that the processor has the features.
        unsafe {
            let floats = _mm512_loadu_ps(floats.as_ptr());
            let mask = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(floats, _mm512_set1_ps(least));
            let counted = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            let all = _mm512_add_epi32(counted, _mm512_set1_epi32(first.cast_signed()));
            _mm512_storeu_ps(keys.as_mut_ptr().cast(), _mm512_maskz_compress_ps(mask, floats));
            _mm512_storeu_epi32(places.as_mut_ptr().cast(), _mm512_maskz_compress_epi32(mask, all));
            len + mask.count_ones() as usize
        }
    }

    #[inline(always)]
    fn rank<A: Real>(self, keys: &[[A; 16]], place: usize) -> usize {
        use std::arch::x86_64::{_CMP_EQ_OQ, _CMP_GT_OQ, _mm512_cmp_ps_mask, _mm512_loadu_ps, _mm512_set1_ps};
        let Some(&pivot) = same_type::<_, f32>(&keys.as_flattened()[place]) else {
            return Baseline.rank(keys, place);
        };
        let (mut larger, mut equal) = (0u64, 0u64);
        for (index, block) in keys.iter().enumerate().take(4) {
            // SAFETY: 16 lanes are read from 16 lanes, which are f32 as the pivot is; that `self` exists says that the
            // processor has the features.
            unsafe {
                let (block, pivot) = (_mm512_loadu_ps(block.as_ptr().cast()), _mm512_set1_ps(pivot));
                larger |= u64::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(block, pivot)) << (16 * index);
                equal |= u64::from(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(block, pivot)) << (16 * index);
            }
        }
        (larger | (equal & ((1 << place) - 1))).count_ones() as usize
    }
}

/// The same reference, where both types are one; known when this is compiled.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn same_type<T: 'static, U: 'static>(value: &T) -> Option<&U> {
    (value as &dyn std::any::Any).downcast_ref()
}
