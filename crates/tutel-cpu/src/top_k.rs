//! The K largest keys of a row.
//!
//! ```text
//! deal the keys to lanes; maxima = the largest key of each lane
//! threshold = the K-th largest of the maxima          at least K keys reach it, few more do
//! candidates = the keys that reach it, in their order
//! each candidate's rank = how many candidates go before it
//! ```
//! All of it is loops without branches but for the walk over the candidates.
use tutel_core::Real;

use crate::lanes::{Block, LANES, fold};

/// Candidates that are ranked against one another; rows with more (of equal keys) are searched by insertion.
const MOST: usize = 64;

/// Finds the K largest keys and keeps where they stand.
pub(crate) struct TopK<A> {
    /// In descending order of the keys; equal keys in ascending order.
    ids: Vec<u32>,
    /// The keys of `ids`, while they are found by insertion.
    keys: Vec<A>,
}

impl<A: Real> TopK<A> {
    pub(crate) fn new(top_k: usize) -> Self {
        Self { ids: vec![0; top_k], keys: vec![A::zero(); top_k] }
    }

    /// Where the K largest keys of the row stand. NaN counts as the largest. The row is padded to whole blocks by
    /// negative infinity and has at least K keys besides.
    #[inline(always)]
    pub(crate) fn find(&mut self, row: &[Block<A>]) -> &[u32] {
        let found = match self.ids.len() {
            ..=8 => self.by_rank::<1>(row),
            ..=16 => self.by_rank::<2>(row),
            ..=32 => self.by_rank::<4>(row),
            _ => false,
        };
        if !found {
            self.by_insertion(row.as_flattened());
        }
        &self.ids
    }

    /// Deals the keys to `GROUPS` blocks of lanes, about twice as many lanes as K. False where ranks do not tell.
    #[inline(always)]
    fn by_rank<const GROUPS: usize>(&mut self, row: &[Block<A>]) -> bool {
        let mut maxima = [[A::neg_infinity(); LANES]; GROUPS];
        let mut sums = [A::zero(); LANES];
        let (chunks, rest) = row.as_chunks::<GROUPS>();
        for blocks in chunks {
            for group in 0..GROUPS {
                for lane in 0..LANES {
                    let key = blocks[group][lane];
                    maxima[group][lane] = if key > maxima[group][lane] { key } else { maxima[group][lane] };
                    sums[lane] += key;
                }
            }
        }
        for (maxima, block) in maxima.iter_mut().zip(rest) {
            for lane in 0..LANES {
                maxima[lane] = if block[lane] > maxima[lane] { block[lane] } else { maxima[lane] };
                sums[lane] += block[lane];
            }
        }
        // NaN, or infinities of both signs.
        if fold(sums).is_nan() {
            return false;
        }
        let threshold = largest_but::<A, GROUPS>(&maxima, self.ids.len() as u32 - 1);
        let mut candidates = Candidates::new();
        if !candidates.collect(row, threshold) {
            return false;
        }
        match candidates.len {
            ..=16 => candidates.first_by_rank::<1>(&mut self.ids),
            ..=32 => candidates.first_by_rank::<2>(&mut self.ids),
            _ => candidates.first_by_rank::<4>(&mut self.ids),
        }
        true
    }

    #[inline(never)]
    fn by_insertion(&mut self, row: &[A]) {
        let top_k = self.ids.len();
        for (id, &key) in row.iter().enumerate() {
            let filled = id.min(top_k);
            if filled < top_k {
                self.insert(filled, key, id as u32);
            } else if exceeds(key, self.keys[top_k - 1]) {
                self.insert(top_k - 1, key, id as u32);
            }
        }
    }

    /// Puts a key in its place among the first `filled` keys; behind equal ones, which came with lower ids.
    fn insert(&mut self, filled: usize, key: A, id: u32) {
        let mut place = filled;
        while place > 0 && exceeds(key, self.keys[place - 1]) {
            self.keys[place] = self.keys[place - 1];
            self.ids[place] = self.ids[place - 1];
            place -= 1;
        }
        self.keys[place] = key;
        self.ids[place] = id;
    }
}

fn exceeds<A: Real>(a: A, b: A) -> bool {
    a > b || (a.is_nan() && !b.is_nan())
}

/// The K-th largest of the values, where `larger` is K - 1.
#[inline(always)]
fn largest_but<A: Real, const GROUPS: usize>(values: &[Block<A>; GROUPS], larger: u32) -> A {
    let mut least = [A::infinity(); LANES];
    for &block in values {
        let mut counts = [0u32; LANES];
        for &pivot in values.as_flattened() {
            for lane in 0..LANES {
                counts[lane] += u32::from(pivot > block[lane]);
            }
        }
        for lane in 0..LANES {
            let value = if counts[lane] <= larger { block[lane] } else { A::infinity() };
            least[lane] = if value < least[lane] { value } else { least[lane] };
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let other = least[lane + width];
            least[lane] = if other < least[lane] { other } else { least[lane] };
        }
        width /= 2;
    }
    least[0]
}

/// Keys that may be among the K largest, in the row's order; behind them negative infinities.
struct Candidates<A> {
    keys: [Block<A>; MOST / LANES],
    ids: [u32; MOST],
    len: usize,
}

impl<A: Real> Candidates<A> {
    #[inline(always)]
    fn new() -> Self {
        Self { keys: [[A::neg_infinity(); LANES]; MOST / LANES], ids: [0; MOST], len: 0 }
    }

    /// Keys of at least the threshold; false where there are too many.
    #[inline(always)]
    fn collect(&mut self, row: &[Block<A>], threshold: A) -> bool {
        const WORD: usize = 64 / LANES;
        let (words, rest) = row.as_chunks::<WORD>();
        let mut first = 0;
        for blocks in words {
            if !self.add(blocks, first, threshold) {
                return false;
            }
            first += WORD * LANES;
        }
        if rest.is_empty() {
            return true;
        }
        let mut padded = [[A::neg_infinity(); LANES]; WORD];
        padded[..rest.len()].copy_from_slice(rest);
        self.add(&padded, first, threshold)
    }

    #[inline(always)]
    fn add(&mut self, blocks: &[Block<A>; 64 / LANES], first: usize, threshold: A) -> bool {
        let bits = |block: usize| at_least(&blocks[block], threshold) << (block * LANES);
        let mut word = bits(0) | bits(1) | bits(2) | bits(3);
        if self.len + word.count_ones() as usize > MOST {
            return false;
        }
        while word != 0 {
            let lane = word.trailing_zeros() as usize;
            word &= word - 1;
            self.keys.as_flattened_mut()[self.len % MOST] = blocks.as_flattened()[lane];
            self.ids[self.len % MOST] = (first + lane) as u32;
            self.len += 1;
        }
        true
    }

    /// The ids of the largest keys; `BLOCKS` blocks, a power of two, hold all candidates.
    #[inline(always)]
    fn first_by_rank<const BLOCKS: usize>(&self, ids: &mut [u32]) {
        let keys = &self.keys[..BLOCKS];
        let mut ranked = [0u32; MOST];
        for (index, &block) in keys.iter().enumerate() {
            let mut places = [0u32; LANES];
            for lane in 0..LANES {
                places[lane] = (index * LANES + lane) as u32;
            }
            let mut ranks = [0u32; LANES];
            for (before, &pivot) in keys.as_flattened().iter().enumerate() {
                for lane in 0..LANES {
                    let goes_first = (pivot > block[lane]) | ((pivot == block[lane]) & ((before as u32) < places[lane]));
                    ranks[lane] += u32::from(goes_first);
                }
            }
            for lane in 0..LANES {
                ranked[ranks[lane] as usize % MOST] = self.ids[index * LANES + lane];
            }
        }
        ids.copy_from_slice(&ranked[..ids.len()]);
    }
}

/// Bit i is set where lane i is at least the threshold.
#[inline(always)]
fn at_least<A: Real>(block: &Block<A>, threshold: A) -> u64 {
    // The product of eight bytes of 0 or 1 collects them as the bits of its highest byte.
    const COLLECT: u64 = 0x0102_0408_1020_4080;
    let block = *block;
    let mut bytes = [0u8; LANES];
    for lane in 0..LANES {
        bytes[lane] = u8::from(block[lane] >= threshold);
    }
    let collected = |half: usize| u64::from_le_bytes(bytes.as_chunks::<8>().0[half]).wrapping_mul(COLLECT) >> 56;
    collected(0) | collected(1) << 8
}
