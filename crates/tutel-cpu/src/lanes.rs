//! Sums in a fixed order that vectorises: one partial sum a lane, lanes added pairwise at the end.
use tutel_core::Real;

const LANES: usize = 16;

fn fold<A: Real>(mut lanes: [A; LANES]) -> A {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of a slice.
pub(crate) fn sum<A: Real>(values: &[A]) -> A {
    let mut lanes = [A::zero(); LANES];
    let chunks = values.chunks_exact(LANES);
    for (lane, &value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += value;
    }
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += chunk[lane];
        }
    }
    fold(lanes)
}

/// The inner product of two slices of one length.
pub(crate) fn dot<A: Real>(left: &[A], right: &[A]) -> A {
    let mut lanes = [A::zero(); LANES];
    let (left, right) = (left.chunks_exact(LANES), right.chunks_exact(LANES));
    for (lane, (&l, &r)) in lanes.iter_mut().zip(left.remainder().iter().zip(right.remainder())) {
        *lane += l * r;
    }
    for (l, r) in left.zip(right) {
        for lane in 0..LANES {
            lanes[lane] += l[lane] * r[lane];
        }
    }
    fold(lanes)
}
