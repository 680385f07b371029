//! Element types: torch's, and the Rust types that match them.

use std::fmt;

use half::{bf16, f16};

use crate::ffi::Symbols;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $size:literal;)*) => {
        /// The element type of a tensor; displayed as torch names it, without `torch.`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum DType {
            $(#[doc = concat!("`torch.", $name, "`.")] $variant,)*
            /// A type that this crate has no name for, with libtorch's code.
            Other(i32),
        }

        impl DType {
            /// Bytes of one element, where known.
            #[must_use]
            pub const fn size(self) -> Option<usize> {
                match self {
                    $(Self::$variant => Some($size),)*
                    Self::Other(_) => None,
                }
            }
        }

        impl fmt::Display for DType {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$variant => formatter.pad($name),)*
                    Self::Other(code) => write!(formatter, "dtype with code {code}"),
                }
            }
        }
    };
}

dtypes! {
    Float64 = "float64", 8;
    Float32 = "float32", 4;
    Float16 = "float16", 2;
    BFloat16 = "bfloat16", 2;
    Int64 = "int64", 8;
    Int32 = "int32", 4;
    Int16 = "int16", 2;
    Int8 = "int8", 1;
    UInt64 = "uint64", 8;
    UInt32 = "uint32", 4;
    UInt16 = "uint16", 2;
    UInt8 = "uint8", 1;
    Bool = "bool", 1;
    Complex128 = "complex128", 16;
    Complex64 = "complex64", 8;
    Complex32 = "complex32", 4;
    Float8E4M3Fn = "float8_e4m3fn", 1;
    Float8E4M3Fnuz = "float8_e4m3fnuz", 1;
    Float8E5M2 = "float8_e5m2", 1;
    Float8E5M2Fnuz = "float8_e5m2fnuz", 1;
    Float8E8M0Fnu = "float8_e8m0fnu", 1;
}

/// A Rust type that can hold a tensor's elements.
///
/// # Safety
///
/// The type has the layout of `DTYPE`, and every bit pattern is a value of it.
pub unsafe trait Element: Copy + Send + Sync + 'static {
    /// The matching torch type.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($element:ty = $dtype:ident;)*) => {$(
        const _: () = assert!(matches!(DType::$dtype.size(), Some(size) if size == size_of::<$element>()));
        // SAFETY: a plain number of the size checked above, in the machine's own format on both sides.
        unsafe impl Element for $element {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}

elements! {
    f64 = Float64;
    f32 = Float32;
    f16 = Float16;
    bf16 = BFloat16;
    i64 = Int64;
    i32 = Int32;
    i16 = Int16;
    i8 = Int8;
    u8 = UInt8;
}

/// libtorch's numbers for the types, which are not part of the ABI and so are asked for at start.
pub(crate) struct DTypeCodes(Vec<(i32, DType)>);

impl DTypeCodes {
    pub(crate) fn read(symbols: &Symbols) -> Self {
        // The search is linear: common types first.
        let known = [
            (symbols.aoti_torch_dtype_float32, DType::Float32),
            (symbols.aoti_torch_dtype_bfloat16, DType::BFloat16),
            (symbols.aoti_torch_dtype_int64, DType::Int64),
            (symbols.aoti_torch_dtype_int32, DType::Int32),
            (symbols.aoti_torch_dtype_float16, DType::Float16),
            (symbols.aoti_torch_dtype_float64, DType::Float64),
            (symbols.aoti_torch_dtype_int16, DType::Int16),
            (symbols.aoti_torch_dtype_int8, DType::Int8),
            (symbols.aoti_torch_dtype_uint64, DType::UInt64),
            (symbols.aoti_torch_dtype_uint32, DType::UInt32),
            (symbols.aoti_torch_dtype_uint16, DType::UInt16),
            (symbols.aoti_torch_dtype_uint8, DType::UInt8),
            (symbols.aoti_torch_dtype_bool, DType::Bool),
            (symbols.aoti_torch_dtype_complex128, DType::Complex128),
            (symbols.aoti_torch_dtype_complex64, DType::Complex64),
            (symbols.aoti_torch_dtype_complex32, DType::Complex32),
            (symbols.aoti_torch_dtype_float8_e4m3fn, DType::Float8E4M3Fn),
            (symbols.aoti_torch_dtype_float8_e4m3fnuz, DType::Float8E4M3Fnuz),
            (symbols.aoti_torch_dtype_float8_e5m2, DType::Float8E5M2),
            (symbols.aoti_torch_dtype_float8_e5m2fnuz, DType::Float8E5M2Fnuz),
        ];
        let newer = symbols.torch_dtype_float8_e8m0fnu.map(|code| (code, DType::Float8E8M0Fnu));
        // SAFETY: these functions take nothing and return a constant.
        Self(known.into_iter().chain(newer).map(|(code, dtype)| (unsafe { code() }, dtype)).collect())
    }

    pub(crate) fn decode(&self, code: i32) -> DType {
        self.0.iter().find(|entry| entry.0 == code).map_or(DType::Other(code), |entry| entry.1)
    }

    /// `None` for a type that this libtorch does not have.
    pub(crate) fn encode(&self, dtype: DType) -> Option<i32> {
        match dtype {
            DType::Other(code) => Some(code),
            dtype => self.0.iter().find(|entry| entry.1 == dtype).map(|entry| entry.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes() {
        assert_eq!(DType::BFloat16.to_string(), "bfloat16");
        assert_eq!(DType::Float8E4M3Fn.to_string(), "float8_e4m3fn");
        assert_eq!(DType::Other(99).to_string(), "dtype with code 99");
        assert_eq!(<bf16 as Element>::DTYPE.size(), Some(2));
        assert_eq!(DType::Other(99).size(), None);
    }

    #[test]
    fn codes_both_ways() {
        let codes = DTypeCodes(vec![(6, DType::Float32), (4, DType::Int64)]);
        assert_eq!(codes.decode(4), DType::Int64);
        assert_eq!(codes.decode(5), DType::Other(5));
        assert_eq!(codes.encode(DType::Float32), Some(6));
        assert_eq!(codes.encode(DType::Other(5)), Some(5));
        assert_eq!(codes.encode(DType::Bool), None);
    }
}
