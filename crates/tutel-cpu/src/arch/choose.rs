//! Which kernel computes a product: chosen once an operator, by the level of the processor.
use half::{bf16, f16};

#[cfg(target_arch = "aarch64")]
use super::aarch64::neon::{Neon, NeonF64};
use super::kernel::Kernel;
use super::level::Level;
use super::portable::Portable;
use super::product::{Packed, Sums, product};
#[cfg(target_arch = "x86_64")]
use super::x86_64::{
    avx2::{Avx2, Avx2F64},
    avx512::{Avx512, Avx512F64},
    avx512_bf16::Avx512Bf16,
};
use crate::epilogue::Epilogue;
use crate::operand::{Factor, Operand, Term};

/// One worker's memory for products of elements whose accumulator is `A`.
pub(crate) struct Scratch<A> {
    sums: Sums<A>,
    floats: Packed<A>,
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only bf16 of x86-64 is multiplied in pairs"))]
    pairs: Packed<u32>,
}

impl<A> Scratch<A> {
    pub(crate) fn new() -> Self {
        Self { sums: Sums::new(), floats: Packed::new(), pairs: Packed::new() }
    }
}

/// A product by one kernel, compiled for its features.
macro_rules! compiled {
    ($name:ident, $kernel:ty, $packed:ident, $($features:literal)?) => {
        $(#[target_feature(enable = $features)])?
        unsafe fn $name(
            scratch: &mut Scratch<<$kernel as Kernel>::Sum>,
            terms: &[Term<'_, <$kernel as Kernel>::Element>],
            next: Option<Factor<'_, <$kernel as Kernel>::Element>>,
            epilogue: &mut Epilogue<'_, <$kernel as Kernel>::Element>,
        ) {
            // SAFETY: this function has the kernel's features, which our caller vouches for.
            unsafe { product::<$kernel>(&mut scratch.sums, &mut scratch.$packed, terms, next, epilogue) }
        }
    };
}

macro_rules! operand {
    ($element:ty, $($architecture:literal: $level:ident => $name:ident, $kernel:ty, $packed:ident, $features:literal;)*) => {
        impl Operand for $element {
            fn multiply(
                level: Level,
                scratch: &mut Scratch<Self::Accumulator>,
                terms: &[Term<'_, Self>],
                next: Option<Factor<'_, Self>>,
                epilogue: &mut Epilogue<'_, Self>,
            ) {
                compiled!(portable, Portable<$element>, floats, );
                $(
                    #[cfg(target_arch = $architecture)]
                    compiled!($name, $kernel, $packed, $features);
                    #[cfg(target_arch = $architecture)]
                    if level >= Level::$level {
                        // SAFETY: a level is only reached where its features were found.
                        return unsafe { $name(scratch, terms, next, epilogue) };
                    }
                )*
                // SAFETY: needs no features.
                unsafe { portable(scratch, terms, next, epilogue) }
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
