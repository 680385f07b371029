//! The function that torch calls for a kernel, and how an error gets from there to Python.
//!
//! Two phases: [`run`] does the work, catches panics and only returns a text; then [`boxed`], which has nothing to
//! drop, lets torch throw it.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::{ptr, slice};

use crate::api::{self, Api};
use crate::ffi::StableIValue;
use crate::library::{FILE, c_string, namespace_of};
use crate::schema::Schema;
use crate::stack::sealed::{FromStack as _, IntoStack as _};
use crate::{Backend, Error, Kernel, Op};

/// The function that torch calls.
///
/// It has nothing to drop when it throws: the exception passes through this frame only, and a frame with clean-up code
/// would need Rust's and C++'s unwinders to agree, which they do not in every way of linking.
///
/// # Safety
///
/// As for [`run`].
pub(crate) unsafe extern "C-unwind" fn boxed<O: Kernel<B>, B: Backend>(
    stack: *mut StableIValue,
    inputs: u64,
    outputs: u64,
) {
    // SAFETY: passed on from our caller.
    let message = unsafe { run::<O, B>(stack, inputs, outputs) };
    if !message.is_null()
        && let Some(api) = api::get()
    {
        // SAFETY: the strings end in NUL; the message lives until this thread's next error, and torch copies it.
        unsafe {
            (api.symbols.aoti_torch_check)(false, c"kernel".as_ptr(), FILE.as_ptr(), line!(), message);
        }
    }
}

/// Runs the kernel; returns null, or the message to throw. Never unwinds.
///
/// # Safety
///
/// As for [`call`].
#[inline(never)]
unsafe extern "C" fn run<O: Kernel<B>, B: Backend>(
    stack: *mut StableIValue,
    inputs: u64,
    outputs: u64,
) -> *const c_char {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let Some(api) = api::get() else { return Some("torch-stable is not initialised".to_owned()) };
        // SAFETY: passed on from our caller.
        // The error is turned into text in here, because a kernel's own error may panic when it is displayed.
        unsafe { call::<O, B>(api, stack, inputs, outputs) }.err().map(|error| error.to_string())
    }));
    match outcome {
        Ok(None) => ptr::null(),
        Ok(Some(text)) => keep_message::<O>(&text),
        Err(payload) => keep_message::<O>(&Error::panic(payload).to_string()),
    }
}

/// # Safety
///
/// torch called the kernel with `inputs` values of the operator's schema on a stack that has room for `outputs`.
unsafe fn call<O: Kernel<B>, B: Backend>(
    api: &'static Api,
    stack: *mut StableIValue,
    inputs: u64,
    outputs: u64,
) -> Result<(), Error> {
    let (expected_inputs, expected_outputs) = (O::Args::TYPES.len(), O::Output::COUNT);
    if inputs != expected_inputs as u64 || outputs != expected_outputs as u64 {
        // torch cannot do this for a schema that was checked. The values are left alone: their types are not known.
        return Err(Error::Arity { inputs, outputs, expected_inputs, expected_outputs });
    }
    // SAFETY: the stack holds as many values, of the schema's types, and they are the kernel's to take.
    let taken = unsafe { O::Args::take(slice::from_raw_parts(stack, expected_inputs), api) };
    let args = O::Args::convert(taken).map_err(|(index, error)| Error::Argument {
        index,
        name: Schema::argument_name(O::SCHEMA, index),
        source: Box::new(error),
    })?;
    let output = O::call(args)?;
    // SAFETY: the stack has room for as many values, and the inputs are no longer looked at.
    output.put(unsafe { slice::from_raw_parts_mut(stack, expected_outputs) });
    Ok(())
}

thread_local! {
    /// The last error's text: torch throws it after all of Rust's frames are gone, so something must own it.
    static MESSAGE: RefCell<CString> = RefCell::default();
}

#[cold]
fn keep_message<O: Op>(text: &str) -> *const c_char {
    let namespace = namespace_of::<O>().unwrap_or_default();
    let message = c_string(&format!("{namespace}::{}: {text}", Schema::name_of(O::SCHEMA)));
    let pointer = message.as_ptr();
    // Moving a CString does not move its text. While a thread ends its slot may be gone: then the text is leaked.
    let mut message = Some(message);
    let stored = MESSAGE.try_with(|slot| slot.replace(message.take().unwrap_or_default()));
    if stored.is_err() {
        std::mem::forget(message);
    }
    pointer
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;
    use crate::library::tests::Twice;

    #[test]
    fn messages_are_prefixed_and_may_hold_nul() {
        let pointer = keep_message::<Twice>("one\0two");
        // SAFETY: the text is kept until this thread's next message.
        let text = unsafe { CStr::from_ptr(pointer) }.to_str().unwrap();
        assert_eq!(text, "::twice: one\\0two");
    }
}
