//! What PyTorch's generator for the CPU draws, so that this program begins with the values of its Python twin.
//!
//! The engine is mt19937; this is how its numbers become those of `Tensor.uniform_`, `torch.randn` and `nn.Linear`. The
//! uniform ones have torch's bits. The normal ones are within a few roundings: torch computes their logarithms and
//! sines by approximations in f32.
use rand_mt::Mt;
use tutel_moe::Element;
use tutel_moe::half::{bf16, f16};

/// The generator after `torch.manual_seed(seed)`.
pub(crate) struct Generator(Mt);

/// A dtype that `Tensor.uniform_` fills.
pub(crate) trait Uniform: Element {
    /// One value of `uniform_(-bound, bound)`.
    fn draw(generator: &mut Generator, bound: f64) -> Self;
}

impl Uniform for f64 {
    fn draw(generator: &mut Generator, bound: f64) -> f64 {
        generator.unit_f64().mul_add(bound + bound, -bound)
    }
}

impl Uniform for f32 {
    fn draw(generator: &mut Generator, bound: f64) -> f32 {
        let bound = f64::from(bound as f32);
        (generator.unit_f32() * (bound + bound) - bound) as f32
    }
}

/// Half types take the value of f32, rounded; the upper bound, which only rounding reaches, becomes the lower one.
macro_rules! rounded_f32 {
    ($($half:ty),*) => { $(
        impl Uniform for $half {
            fn draw(generator: &mut Generator, bound: f64) -> $half {
                let (value, upper) = (<$half>::narrow(f32::draw(generator, bound)), <$half>::narrow(bound as f32));
                if value == upper { -upper } else { value }
            }
        }
    )* };
}
rounded_f32!(bf16, f16);

/// Weight `[outer, inner]` and bias `[outer]`.
pub(crate) struct Linear<T> {
    pub(crate) weight: Vec<T>,
    pub(crate) bias: Vec<T>,
}

impl Generator {
    pub(crate) fn seeded(seed: u32) -> Self {
        Self(Mt::new(seed))
    }

    /// From 0 up to 1, with the 24 bits of an f32.
    fn unit_f32(&mut self) -> f64 {
        f64::from(self.0.next_u32() & 0xff_ffff) / f64::from(1 << 24)
    }

    /// From 0 up to 1, with the 53 bits of an f64: the first of two numbers is the upper half.
    fn unit_f64(&mut self) -> f64 {
        let (high, low) = (u64::from(self.0.next_u32()), u64::from(self.0.next_u32()));
        ((high << 32 | low) & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }

    /// `torch.empty(len).uniform_(-bound, bound)`.
    pub(crate) fn uniform<T: Uniform>(&mut self, len: usize, bound: f64) -> Vec<T> {
        (0..len).map(|_| T::draw(self, bound)).collect()
    }

    /// `torch.randn(len)` in f32.
    pub(crate) fn normal(&mut self, len: usize) -> Vec<f32> {
        const BLOCK: usize = 16;
        if len < BLOCK {
            return self.few_normal(len);
        }
        let mut values: Vec<f64> = (0..len).map(|_| self.unit_f32()).collect();
        values.chunks_exact_mut(BLOCK).for_each(box_muller);
        if !len.is_multiple_of(BLOCK) {
            // The last values are drawn again, as a whole block.
            let last = &mut values[len - BLOCK..];
            last.fill_with(|| self.unit_f32());
            box_muller(last);
        }
        values.into_iter().map(|value| value as f32).collect()
    }

    /// Pairs in f64, one after the other.
    fn few_normal(&mut self, len: usize) -> Vec<f32> {
        let pairs = std::iter::repeat_with(|| {
            let (angle, distance) = (self.unit_f64(), self.unit_f64());
            let radius = (-2.0 * (-distance).ln_1p()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * angle).sin_cos();
            [(radius * cos) as f32, (radius * sin) as f32]
        });
        pairs.flatten().take(len).collect()
    }

    /// The initial values of `nn.Linear(inner, outer, bias)` in the default dtype.
    pub(crate) fn linear<T: Uniform>(&mut self, inner: usize, outer: usize, bias: bool) -> Linear<T> {
        let root = (inner as f64).sqrt();
        // torch's own formula (gain of a leaky ReLU of slope √5), which is 1 / √inner but for its roundings.
        let gain = (2.0 / (1.0 + 5f64.sqrt().powi(2))).sqrt();
        let weight = self.uniform(outer * inner, 3f64.sqrt() * (gain / root));
        Linear { weight, bias: self.uniform(if bias { outer } else { 0 }, 1.0 / root) }
    }
}

/// Turns 16 uniform values into normal ones: the first half gives distances, the second half angles.
fn box_muller(block: &mut [f64]) {
    let (distances, angles) = block.split_at_mut(8);
    for (distance, angle) in distances.iter_mut().zip(angles) {
        let radius = (-2.0 * (1.0 - *distance).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * *angle).sin_cos();
        (*distance, *angle) = (radius * cos, radius * sin);
    }
}
