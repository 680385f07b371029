//! The K largest keys of a row.
//!
//! ```text
//! deal the keys to lanes; maxima = the largest key of each lane
//! threshold = the K-th largest of the maxima          at least K keys reach it, few more do
//! candidates = the keys that reach it, in their order
//! each candidate's rank = how many candidates go before it
//! ```
//! All of it is loops without branches.
use tutel_core::Real;

use crate::arch::Features;
use crate::lanes::{Block, LANES};

/// Candidates that are ranked against one another; rows with more (of equal keys) are searched by insertion.
const MOST: usize = 64;

/// Finds the K largest keys and keeps where they stand.
pub(crate) struct TopK<A> {
    count: usize,
    /// In descending order of the keys, equal ones in ascending order; K, and perhaps others behind.
    ids: Vec<u32>,
    /// The keys of `ids`, while they are found by insertion.
    keys: Vec<A>,
}

impl<A: Real> TopK<A> {
    pub(crate) fn new(top_k: usize) -> Self {
        Self { count: top_k, ids: vec![0; top_k.max(MOST)], keys: vec![A::zero(); top_k] }
    }

    /// Where the K largest keys of the row stand. The row is padded to whole blocks by negative infinity and has at
    /// least K keys besides. Where a key is NaN, the places mean nothing: see [`Self::find_with_nan`].
    #[inline(always)]
    pub(crate) fn find<F: Features>(&mut self, features: F, row: &[Block<A>]) -> &[u32] {
        let found = match (row, self.count) {
            ([block], _) => {
                place_by_rank(features, std::slice::from_ref(block), LANES, None, &mut self.ids);
                true
            }
            (_, ..=8) => self.by_threshold::<F, 1>(features, row),
            (_, ..=16) => self.by_threshold::<F, 2>(features, row),
            (_, ..=32) => self.by_threshold::<F, 4>(features, row),
            _ => false,
        };
        if found { &self.ids[..self.count] } else { self.find_with_nan(row.as_flattened()) }
    }

    /// Deals the keys to `GROUPS` blocks of lanes, about twice as many lanes as K. False where too many keys are equal.
    #[inline(always)]
    fn by_threshold<F: Features, const GROUPS: usize>(&mut self, features: F, row: &[Block<A>]) -> bool {
        let mut maxima = [[A::neg_infinity(); LANES]; GROUPS];
        let (chunks, rest) = row.as_chunks::<GROUPS>();
        for blocks in chunks {
            for group in 0..GROUPS {
                maxima[group] = largest(maxima[group], blocks[group]);
            }
        }
        for (maxima, &block) in maxima.iter_mut().zip(rest) {
            *maxima = largest(*maxima, block);
        }
        let mut ranked = [0; MOST];
        place_by_rank(features, &maxima, GROUPS * LANES, None, &mut ranked);
        let threshold = maxima.as_flattened()[ranked[self.count - 1] as usize];
        let Some(candidates) = Candidates::collect(features, row, threshold) else { return false };
        let (keys, ids) = (&candidates.keys, Some(&candidates.ids[..]));
        match candidates.len {
            len @ ..=16 => place_by_rank(features, &keys[..1], len, ids, &mut self.ids),
            len @ ..=32 => place_by_rank(features, &keys[..2], len, ids, &mut self.ids),
            len => place_by_rank(features, &keys[..MOST / LANES], len, ids, &mut self.ids),
        }
        true
    }

    /// Where the K largest keys stand. NaN counts as the largest.
    #[inline(never)]
    pub(crate) fn find_with_nan(&mut self, row: &[A]) -> &[u32] {
        let top_k = self.count;
        for (id, &key) in row.iter().enumerate() {
            let filled = id.min(top_k);
            if filled < top_k {
                self.insert(filled, key, id as u32);
            } else if exceeds(key, self.keys[top_k - 1]) {
                self.insert(top_k - 1, key, id as u32);
            }
        }
        &self.ids[..top_k]
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

/// The larger key of each lane.
#[inline(always)]
fn largest<A: Real>(left: Block<A>, right: Block<A>) -> Block<A> {
    let mut larger = left;
    for lane in 0..LANES {
        larger[lane] = if right[lane] > left[lane] { right[lane] } else { left[lane] };
    }
    larger
}

/// Writes the first `len` keys' ids in descending order of the keys; a key's id is its place if there are no others.
#[inline(always)]
fn place_by_rank<A: Real, F: Features>(
    features: F,
    keys: &[Block<A>],
    len: usize,
    ids: Option<&[u32]>,
    ranked: &mut [u32],
) {
    let ranked = &mut ranked[..MOST];
    for place in 0..len {
        ranked[features.rank(keys, place) % MOST] = ids.map_or(place as u32, |ids| ids[place]);
    }
}

/// Keys that may be among the K largest, in the row's order; behind them negative infinities.
struct Candidates<A> {
    keys: [Block<A>; MOST / LANES + 1],
    ids: [u32; MOST + LANES],
    len: usize,
}

impl<A: Real> Candidates<A> {
    /// Keys of at least the threshold; `None` where there are too many.
    #[inline(always)]
    fn collect<F: Features>(features: F, row: &[Block<A>], threshold: A) -> Option<Self> {
        let mut found = Self { keys: [[A::neg_infinity(); LANES]; MOST / LANES + 1], ids: [0; MOST + LANES], len: 0 };
        for (index, block) in row.iter().enumerate() {
            let lists = (found.keys.as_flattened_mut(), &mut found.ids[..]);
            found.len = features.append_at_least((block, (index * LANES) as u32), threshold, lists, found.len);
            if found.len > MOST {
                return None;
            }
        }
        found.keys.as_flattened_mut()[found.len..][..LANES].fill(A::neg_infinity());
        Some(found)
    }
}
