//! The symbol table: every C function of libtorch that this crate calls, looked up by name at run time.
//!
//! Signatures follow `torch/csrc/stable/c/shim.h` and `torch/csrc/inductor/aoti_torch/c/shim.h`. All of them are
//! `extern "C-unwind"` because `aoti_torch_check` throws a C++ exception through its caller; the others report
//! failure by a status.

use std::ffi::{c_char, c_void};

use libloading::os::unix::Library;

use crate::Error;

/// An `at::Tensor` on torch's heap.
#[repr(C)]
pub(crate) struct OpaqueTensor {
    _private: [u8; 0],
}

/// A `torch::Library` on torch's heap.
#[repr(C)]
pub(crate) struct OpaqueLibrary {
    _private: [u8; 0],
}

/// One argument or result of an operator, as 64 bits.
pub(crate) type StableIValue = u64;
pub(crate) type TensorHandle = *mut OpaqueTensor;
pub(crate) type LibraryHandle = *mut OpaqueLibrary;
/// `(stack, inputs, outputs)`: takes the inputs off the stack and leaves the outputs on it.
pub(crate) type BoxedKernel = unsafe extern "C-unwind" fn(*mut StableIValue, u64, u64);
/// `(begin, end, context)`; must not unwind.
pub(crate) type ParallelBody = unsafe extern "C" fn(i64, i64, *mut c_void);
type Status = i32;

macro_rules! symbols {
    (
        required { $($required:ident: fn($($required_arg:ty),*) $(-> $required_ret:ty)?;)* }
        optional { $($optional:ident: fn($($optional_arg:ty),*) $(-> $optional_ret:ty)?;)* }
    ) => {
        /// Functions of the libtorch in this process; the optional ones came after torch 2.10.
        pub(crate) struct Symbols {
            $(pub(crate) $required: unsafe extern "C-unwind" fn($($required_arg),*) $(-> $required_ret)?,)*
            $(pub(crate) $optional: Option<unsafe extern "C-unwind" fn($($optional_arg),*) $(-> $optional_ret)?>,)*
            /// C++ `operator delete(void*)`, found through libtorch's dependency on the C++ library.
            pub(crate) operator_delete: Option<unsafe extern "C-unwind" fn(*mut c_void)>,
        }

        impl Symbols {
            /// Looks every function up.
            ///
            /// # Safety
            ///
            /// `library` is a libtorch of version 2.10 or newer that is never unloaded.
            pub(crate) unsafe fn load(library: &Library) -> Result<Self, Error> {
                // SAFETY: the names are those of the stable ABI, whose signatures do not change once released, and
                // the caller vouches for the library.
                unsafe {
                    Ok(Self {
                        $($required: find(library, concat!(stringify!($required), "\0"))
                            .ok_or(Error::MissingSymbol { symbol: stringify!($required) })?,)*
                        $($optional: find(library, concat!(stringify!($optional), "\0")),)*
                        operator_delete: find(library, "_ZdlPv\0"),
                    })
                }
            }
        }
    };
}

symbols! {
    required {
        aoti_torch_check: fn(bool, *const c_char, *const c_char, u32, *const c_char);
        aoti_torch_delete_tensor_object: fn(TensorHandle) -> Status;
        aoti_torch_device_type_cpu: fn() -> i32;
        aoti_torch_device_type_cuda: fn() -> i32;
        aoti_torch_device_type_meta: fn() -> i32;
        aoti_torch_dtype_bfloat16: fn() -> i32;
        aoti_torch_dtype_bool: fn() -> i32;
        aoti_torch_dtype_complex128: fn() -> i32;
        aoti_torch_dtype_complex32: fn() -> i32;
        aoti_torch_dtype_complex64: fn() -> i32;
        aoti_torch_dtype_float16: fn() -> i32;
        aoti_torch_dtype_float32: fn() -> i32;
        aoti_torch_dtype_float64: fn() -> i32;
        aoti_torch_dtype_float8_e4m3fn: fn() -> i32;
        aoti_torch_dtype_float8_e4m3fnuz: fn() -> i32;
        aoti_torch_dtype_float8_e5m2: fn() -> i32;
        aoti_torch_dtype_float8_e5m2fnuz: fn() -> i32;
        aoti_torch_dtype_int16: fn() -> i32;
        aoti_torch_dtype_int32: fn() -> i32;
        aoti_torch_dtype_int64: fn() -> i32;
        aoti_torch_dtype_int8: fn() -> i32;
        aoti_torch_dtype_uint16: fn() -> i32;
        aoti_torch_dtype_uint32: fn() -> i32;
        aoti_torch_dtype_uint64: fn() -> i32;
        aoti_torch_dtype_uint8: fn() -> i32;
        aoti_torch_empty_strided:
            fn(i64, *const i64, *const i64, i32, i32, i32, *mut TensorHandle) -> Status;
        aoti_torch_get_device_index: fn(TensorHandle, *mut i32) -> Status;
        aoti_torch_get_device_type: fn(TensorHandle, *mut i32) -> Status;
        aoti_torch_get_dim: fn(TensorHandle, *mut i64) -> Status;
        aoti_torch_get_dtype: fn(TensorHandle, *mut i32) -> Status;
        aoti_torch_get_sizes: fn(TensorHandle, *mut *mut i64) -> Status;
        aoti_torch_get_storage_offset: fn(TensorHandle, *mut i64) -> Status;
        aoti_torch_get_storage_size: fn(TensorHandle, *mut i64) -> Status;
        aoti_torch_get_strides: fn(TensorHandle, *mut *mut i64) -> Status;
        aoti_torch_is_defined: fn(TensorHandle, *mut bool) -> Status;
        aoti_torch_library_def: fn(LibraryHandle, *const c_char) -> Status;
        aoti_torch_library_init_fragment:
            fn(*const c_char, *const c_char, u32, *mut LibraryHandle) -> Status;
        aoti_torch_library_init_impl:
            fn(*const c_char, *const c_char, *const c_char, u32, *mut LibraryHandle) -> Status;
        aoti_torch_new_tensor_handle: fn(TensorHandle, *mut TensorHandle) -> Status;
        torch_get_const_data_ptr: fn(TensorHandle, *mut *const c_void) -> Status;
        torch_get_mutable_data_ptr: fn(TensorHandle, *mut *mut c_void) -> Status;
        torch_get_num_threads: fn(*mut u32) -> Status;
        torch_library_impl: fn(LibraryHandle, *const c_char, BoxedKernel, u64) -> Status;
        torch_parallel_for: fn(i64, i64, i64, ParallelBody, *mut c_void) -> Status;
    }
    optional {
        // torch 2.11
        torch_dtype_float8_e8m0fnu: fn() -> i32;
        // torch 2.12
        torch_library_def_with_tags: fn(LibraryHandle, *const c_char, *const i32, i32) -> Status;
        torch_tag_pt2_compliant_tag: fn() -> i32;
        // torch 2.13
        torch_delete_stable_ivalue: fn(*mut StableIValue) -> Status;
        torch_exception_get_what_without_backtrace: fn() -> *const c_char;
    }
}

/// The function called `name` (which ends in NUL), if the library has one.
///
/// # Safety
///
/// `F` is the function pointer type of that function, and the library is never unloaded.
pub(crate) unsafe fn find<F: Copy>(library: &Library, name: &str) -> Option<F> {
    // SAFETY: the caller gives the function's own type.
    unsafe { library.get::<F>(name.as_bytes()) }.ok().map(|symbol| *symbol)
}
