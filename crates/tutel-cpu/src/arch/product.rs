//! Which kernel computes a product: chosen once an operator, by the level of the processor.
use half::{bf16, f16};
use num_traits::Zero;

#[cfg(target_arch = "aarch64")]
use super::aarch64::neon::{Neon, NeonF64};
use super::kernel::{Kernel, Packed, padded_columns, product};
use super::level::Level;
use super::portable::Portable;
#[cfg(target_arch = "x86_64")]
use super::x86_64::{
    avx2::{Avx2, Avx2F64},
    avx512::{Avx512, Avx512F64},
    avx512_bf16::Avx512Bf16,
};
use crate::operand::{Factor, Operand};

/// One worker's memory for products of elements whose accumulator is `A`.
pub(crate) struct Scratch<A> {
    /// `[rows, columns]` of the last product, [`Scratch::stride`] a row.
    sums: Vec<A>,
    stride: usize,
    floats: Packed<A>,
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only bf16 of x86-64 is multiplied in pairs"))]
    pairs: Packed<u32>,
}

impl<A: Zero + Copy> Scratch<A> {
    pub(crate) fn new() -> Self {
        Self { sums: Vec::new(), stride: 0, floats: Packed::new(), pairs: Packed::new() }
    }

    /// One row of the last product, some columns longer than that.
    pub(crate) fn row(&self, row: usize) -> &[A] {
        &self.sums[row * self.stride..(row + 1) * self.stride]
    }

    fn clear(&mut self, rows: usize, stride: usize) {
        self.stride = stride;
        self.sums.clear();
        self.sums.resize(rows * stride, A::zero());
    }
}

/// A product by one kernel, compiled for its features.
macro_rules! compiled {
    ($name:ident, $kernel:ty, $packed:ident, $($features:literal)?) => {
        $(#[target_feature(enable = $features)])?
        unsafe fn $name(
            scratch: &mut Scratch<<$kernel as Kernel>::Sum>,
            left: Factor<'_, <$kernel as Kernel>::Element>,
            right: Factor<'_, <$kernel as Kernel>::Element>,
        ) {
            scratch.clear(left.rows(), padded_columns::<$kernel>(right.columns()));
            // SAFETY: this function has the kernel's features, which our caller vouches for.
            unsafe { product::<$kernel>(&mut scratch.sums, left, right, &mut scratch.$packed) }
        }
    };
}

macro_rules! operand {
    ($element:ty, $($architecture:literal: $level:ident => $name:ident, $kernel:ty, $packed:ident, $features:literal;)*) => {
        impl Operand for $element {
            fn multiply(level: Level, scratch: &mut Scratch<Self::Accumulator>, left: Factor<'_, Self>, right: Factor<'_, Self>) {
                compiled!(portable, Portable<$element>, floats, );
                $(
                    #[cfg(target_arch = $architecture)]
                    compiled!($name, $kernel, $packed, $features);
                    #[cfg(target_arch = $architecture)]
                    if level >= Level::$level {
                        // SAFETY: a level is only reached where its features were found.
                        return unsafe { $name(scratch, left, right) };
                    }
                )*
                // SAFETY: needs no features.
                unsafe { portable(scratch, left, right) }
            }
        }
    };
}

operand!(f32,
    "x86_64": Avx512 => avx512, Avx512<f32>, floats, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c";
    "x86_64": Avx2 => avx2, Avx2<f32>, floats, "avx2,fma,f16c";
    "aarch64": Neon => neon, Neon<f32>, floats, "neon";
);
operand!(f64,
    "x86_64": Avx512 => avx512, Avx512F64, floats, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c";
    "x86_64": Avx2 => avx2, Avx2F64, floats, "avx2,fma,f16c";
    "aarch64": Neon => neon, NeonF64, floats, "neon";
);
operand!(f16,
    "x86_64": Avx512 => avx512, Avx512<f16>, floats, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c";
    "x86_64": Avx2 => avx2, Avx2<f16>, floats, "avx2,fma,f16c";
    "aarch64": Neon => neon, Neon<f16>, floats, "neon";
);
operand!(bf16,
    "x86_64": Avx512Bf16 => avx512_bf16, Avx512Bf16, pairs, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c";
    "x86_64": Avx512 => avx512, Avx512<bf16>, floats, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c";
    "x86_64": Avx2 => avx2, Avx2<bf16>, floats, "avx2,fma,f16c";
    "aarch64": Neon => neon, Neon<bf16>, floats, "neon";
);
