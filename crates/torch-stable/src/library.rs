//! Operators and their registration with torch.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use crate::api;
use crate::ffi::LibraryHandle;
use crate::kernel::boxed;
use crate::schema::{Schema, is_identifier};
use crate::stack::sealed::{FromStack as _, IntoStack as _};
use crate::{AbiVersion, Error, FromStack, IntoStack};

/// An operator: its schema, and the Rust types that go with it. A type without values does.
pub trait Op: 'static {
    /// As `name(Tensor a, Tensor? b, SymInt n, bool flag, float x) -> (Tensor, Tensor)`, without a namespace.
    /// The types are those of [`FromStack`] and [`IntoStack`].
    const SCHEMA: &'static str;
    /// The arguments, in the schema's order.
    type Args: FromStack;
    /// The results, in the schema's order.
    type Output: IntoStack;
}

/// An operator's implementation for one backend.
pub trait Kernel<B: Backend>: Op {
    /// Computes the results. An error or a panic becomes a Python exception.
    ///
    /// # Errors
    ///
    /// Whatever the kernel finds wrong, its own errors by [`Error::kernel`].
    fn call(args: Self::Args) -> Result<Self::Output, Error>;
}

/// What torch chooses implementations by.
pub trait Backend: 'static {
    /// torch's name of the dispatch key, as `CPU`.
    const DISPATCH_KEY: &'static CStr;
}

/// Tensors in the host's memory.
#[derive(Debug)]
pub enum Cpu {}
impl Backend for Cpu {
    const DISPATCH_KEY: &'static CStr = c"CPU";
}

/// Tensors on CUDA devices.
#[derive(Debug)]
pub enum Cuda {}
impl Backend for Cuda {
    const DISPATCH_KEY: &'static CStr = c"CUDA";
}

/// In which namespace each operator was defined by this crate. torch refuses to define a name twice, so an operator
/// found here has, in torch too, the schema that was checked against its Rust types: that is what makes
/// [`Library::implement`] safe.
static DEFINED: Mutex<BTreeMap<TypeId, String>> = Mutex::new(BTreeMap::new());

pub(crate) fn namespace_of<O: Op>() -> Option<String> {
    DEFINED.lock().unwrap_or_else(PoisonError::into_inner).get(&TypeId::of::<O>()).cloned()
}

/// torch keeps this pointer, to say where an operator was registered.
pub(crate) const FILE: &CStr = c"torch-stable";
/// The rules by which values are passed are those of this version, whichever newer one is running.
const BUILT_FOR: u64 = AbiVersion::OLDEST.encode();

/// A namespace of operators.
///
/// The operators stay registered until the process ends: torch's own handles are leaked on purpose, because torch
/// unregisters everything that was registered through a handle when the handle is freed.
#[derive(Debug)]
pub struct Library {
    namespace: String,
    fragment: LibraryHandle,
}

impl Library {
    /// Adds to the namespace, which others may add to as well.
    ///
    /// # Errors
    ///
    /// [`Error::NotLoaded`] before [`initialise`](crate::initialise), [`Error::Namespace`] for a name that cannot be
    /// one.
    pub fn fragment(namespace: &str) -> Result<Self, Error> {
        let api = api::require()?;
        if !is_identifier(namespace) {
            return Err(Error::Namespace { namespace: namespace.to_owned() });
        }
        let name = c_string(namespace);
        let mut fragment = ptr::null_mut();
        // SAFETY: all strings end in NUL; torch copies the namespace and keeps the pointer to `FILE`, a constant.
        let status = unsafe {
            (api.symbols.aoti_torch_library_init_fragment)(name.as_ptr(), FILE.as_ptr(), line!(), &raw mut fragment)
        };
        api.check(status, "aoti_torch_library_init_fragment")?;
        Ok(Self { namespace: namespace.to_owned(), fragment })
    }

    /// Makes the operator known to torch, tagged as fit for `torch.compile` where torch has tags (2.12).
    ///
    /// # Errors
    ///
    /// [`Error::Schema`] when the schema cannot be read or is not that of `O::Args` and `O::Output`,
    /// [`Error::Call`] when torch refuses, as for a name that is taken.
    pub fn define<O: Op>(&self) -> Result<(), Error> {
        let api = api::require()?;
        checked_schema::<O>()?;
        let mut defined = DEFINED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(namespace) = defined.get(&TypeId::of::<O>()) {
            return Err(Error::schema(O::SCHEMA, format!("already defined in namespace `{namespace}`")));
        }
        let schema = c_string(O::SCHEMA);
        let symbols = &api.symbols;
        // SAFETY: the handle is live, because it is never freed; the schema ends in NUL and is copied, as are the tags.
        let (status, function) = unsafe {
            if let (Some(define), Some(tag)) =
                (symbols.torch_library_def_with_tags, symbols.torch_tag_pt2_compliant_tag)
            {
                let tags = [tag()];
                let status = define(self.fragment, schema.as_ptr(), tags.as_ptr(), tags.len() as i32);
                (status, "torch_library_def_with_tags")
            } else {
                let status = (symbols.aoti_torch_library_def)(self.fragment, schema.as_ptr());
                (status, "aoti_torch_library_def")
            }
        };
        api.check(status, function).map_err(|error| error.about(O::SCHEMA))?;
        defined.insert(TypeId::of::<O>(), self.namespace.clone());
        Ok(())
    }

    /// Registers the operator's implementation for a backend. The operator comes first, by
    /// [`define`](Self::define) in the same namespace.
    ///
    /// # Errors
    ///
    /// [`Error::Schema`] when it does not, [`Error::Call`] when torch refuses.
    pub fn implement<O: Kernel<B>, B: Backend>(&self) -> Result<(), Error> {
        let api = api::require()?;
        let schema = checked_schema::<O>()?;
        if namespace_of::<O>().as_deref() != Some(self.namespace.as_str()) {
            let reason = format!("not defined in namespace `{}`: `Library::define` comes first", self.namespace);
            return Err(Error::schema(O::SCHEMA, reason));
        }
        let (namespace, name) = (c_string(&self.namespace), c_string(schema.name));
        let about = |error: Error| {
            error.about(&format!("{}::{} for {}", self.namespace, schema.name, B::DISPATCH_KEY.to_string_lossy()))
        };
        let mut library = ptr::null_mut();
        // SAFETY: all strings end in NUL and are copied, except `FILE`, which is a constant.
        let status = unsafe {
            (api.symbols.aoti_torch_library_init_impl)(
                namespace.as_ptr(),
                B::DISPATCH_KEY.as_ptr(),
                FILE.as_ptr(),
                line!(),
                &raw mut library,
            )
        };
        api.check(status, "aoti_torch_library_init_impl").map_err(about)?;
        // SAFETY: the handle was just made and is never freed. The kernel has the boxed calling convention of
        // `BUILT_FOR`, and torch calls it with values of the schema that was checked above.
        let status = unsafe { (api.symbols.torch_library_impl)(library, name.as_ptr(), boxed::<O, B>, BUILT_FOR) };
        api.check(status, "torch_library_impl").map_err(about)
    }
}

fn checked_schema<O: Op>() -> Result<Schema<'static>, Error> {
    Schema::checked(O::SCHEMA, O::Args::TYPES, O::Output::COUNT)
}

/// C's text, with any NUL inside made visible.
pub(crate) fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "\\0")).unwrap_or_default()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::Tensor;

    pub(crate) struct Twice;
    impl Op for Twice {
        const SCHEMA: &'static str = "twice(Tensor x, SymInt n) -> Tensor";
        type Args = (Tensor, i64);
        type Output = Tensor;
    }

    struct Wrong;
    impl Op for Wrong {
        const SCHEMA: &'static str = "wrong(Tensor x, float n) -> Tensor";
        type Args = (Tensor, i64);
        type Output = Tensor;
    }

    #[test]
    fn schemas_are_checked_against_the_types() {
        assert_eq!(checked_schema::<Twice>().unwrap().name, "twice");
        let error = checked_schema::<Wrong>().unwrap_err().to_string();
        assert!(error.contains("argument 1 (`n`) arrives as f64, but Op::Args has i64"), "{error}");
    }

    #[test]
    fn without_torch_nothing_is_registered() {
        assert!(matches!(Library::fragment("test"), Err(Error::NotLoaded { .. })));
        assert_eq!(BUILT_FOR, (2 << 56) | (10 << 48));
    }
}
