//! Hints about memory.
use std::mem::MaybeUninit;

/// Asks for the cache line at the start of the slice, to come as near as the second-level cache: what comes next may be
/// more than the first level holds beside what is in use.
#[inline(always)]
pub(crate) fn prefetch<T>(line: &[T]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, part of x86-64's baseline; it does nothing for addresses that cannot be read.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.as_ptr().cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Writes a block around the caches: for outputs that are larger than these, whose lines would be read first and push
/// out better ones. [`end_streaming`] is to follow before another thread reads the block.
#[inline(always)]
pub(crate) fn stream<T: Copy, const N: usize>(target: &mut [MaybeUninit<T>; N], values: &[T; N]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        const STEP: usize = size_of::<__m128i>();
        let start = target.as_mut_ptr().cast::<__m128i>();
        if size_of::<[T; N]>().is_multiple_of(STEP) && start.is_aligned() {
            for step in 0..size_of::<[T; N]>() / STEP {
                // SAFETY: both are arrays of as many whole steps, the target is aligned, the instructions are part of
                // x86-64's baseline, and no bits of an element are lost on the way through an integer.
                unsafe {
                    let value = _mm_loadu_si128(values.as_ptr().cast::<__m128i>().add(step));
                    _mm_stream_si128(start.add(step), value);
                }
            }
            return;
        }
    }
    target.write_copy_of_slice(values);
}

/// Orders blocks that were streamed before what this thread writes next.
#[inline(always)]
pub(crate) fn end_streaming() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: part of x86-64's baseline.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
