//! Finding libtorch in the process, and the state that every call into it needs.

use std::ffi::{CStr, OsStr, c_char};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_NOW};

use crate::Error;
use crate::device::DeviceCodes;
use crate::dtype::DTypeCodes;
use crate::ffi::{Symbols, find};

/// Only find the library if it is already in the process: a second libtorch would have its own registry of operators.
#[cfg(target_vendor = "apple")]
const RTLD_NOLOAD: i32 = 0x10;
#[cfg(not(target_vendor = "apple"))]
const RTLD_NOLOAD: i32 = 0x4;

#[cfg(target_vendor = "apple")]
const LIBRARY_NAME: &str = "libtorch_cpu.dylib";
#[cfg(not(target_vendor = "apple"))]
const LIBRARY_NAME: &str = "libtorch_cpu.so";

/// The version of the libtorch in this process, as its stable ABI reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AbiVersion {
    /// 2 in "2.10.0".
    pub major: u8,
    /// 10 in "2.10.0".
    pub minor: u8,
    /// 0 in "2.10.0".
    pub patch: u8,
}

impl AbiVersion {
    /// The oldest torch that has every function this crate needs.
    pub const OLDEST: Self = Self { major: 2, minor: 10, patch: 0 };

    fn decode(code: u64) -> Self {
        let [major, minor, patch, ..] = code.to_be_bytes();
        Self { major, minor, patch }
    }

    pub(crate) const fn encode(self) -> u64 {
        u64::from_be_bytes([self.major, self.minor, self.patch, 0, 0, 0, 0, 0])
    }
}

impl fmt::Display for AbiVersion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// The libtorch of this process. A `&'static Api` is the proof that it was found.
pub struct Api {
    pub(crate) symbols: Symbols,
    pub(crate) version: AbiVersion,
    pub(crate) dtypes: DTypeCodes,
    pub(crate) devices: DeviceCodes,
}

static API: OnceLock<Api> = OnceLock::new();

/// Finds the libtorch that this process has already loaded, and reads what else the crate needs from it.
///
/// Call it once before anything else, after `import torch`; more calls do nothing. `libtorch_cpu` is the full path of
/// `libtorch_cpu.so`, tried when the loader does not know the library by its bare name. The library is never loaded
/// from here.
///
/// # Errors
///
/// [`Error::NotLoaded`] when torch was not imported, [`Error::TooOld`] before torch 2.10,
/// [`Error::MissingSymbol`] when this libtorch lacks a function that its version should have.
pub fn initialise(libtorch_cpu: Option<&Path>) -> Result<AbiVersion, Error> {
    if let Some(api) = API.get() {
        return Ok(api.version);
    }
    let api = Api::load(libtorch_cpu)?;
    Ok(API.get_or_init(|| api).version)
}

/// The state, if [`initialise`] succeeded.
pub(crate) fn get() -> Option<&'static Api> {
    API.get()
}

/// As [`get`], with the error to return to the user.
pub(crate) fn require() -> Result<&'static Api, Error> {
    get().ok_or_else(|| Error::NotLoaded { reason: "`torch_stable::initialise` was not called".to_owned() })
}

impl Api {
    fn load(libtorch_cpu: Option<&Path>) -> Result<Self, Error> {
        // The functions found below are kept for the life of the process, so the library must never be closed.
        let library = ManuallyDrop::new(open_loaded(libtorch_cpu)?);
        // SAFETY: the function has this signature in every torch that has it (2.7 and newer).
        let version = unsafe {
            find::<unsafe extern "C-unwind" fn() -> u64>(&library, "aoti_torch_abi_version\0")
                .map(|version| AbiVersion::decode(version()))
                .ok_or(Error::MissingSymbol { symbol: "aoti_torch_abi_version" })?
        };
        if version < AbiVersion::OLDEST {
            return Err(Error::TooOld { found: version });
        }
        // SAFETY: this is a libtorch of at least 2.10, and it stays open.
        let symbols = unsafe { Symbols::load(&library)? };
        if symbols.torch_delete_stable_ivalue.is_none() && symbols.operator_delete.is_none() {
            return Err(Error::MissingSymbol { symbol: "operator delete(void*)" });
        }
        let (dtypes, devices) = (DTypeCodes::read(&symbols), DeviceCodes::read(&symbols));
        Ok(Self { symbols, version, dtypes, devices })
    }

    /// Turns the status of a call into a result.
    pub(crate) fn check(&self, status: i32, function: &'static str) -> Result<(), Error> {
        if status == 0 { Ok(()) } else { Err(Error::Call { function, message: self.last_message() }) }
    }

    #[cold]
    fn last_message(&self) -> String {
        let Some(what) = self.symbols.torch_exception_get_what_without_backtrace else {
            return format!("torch {} printed the reason on stderr", self.version);
        };
        // SAFETY: the function takes nothing and lends a C string (or null) that lives until this thread's next
        // exception; it is copied at once.
        unsafe {
            let message: *const c_char = what();
            if message.is_null() {
                "torch gave no reason".to_owned()
            } else {
                CStr::from_ptr(message).to_string_lossy().trim_end().to_owned()
            }
        }
    }
}

fn open_loaded(libtorch_cpu: Option<&Path>) -> Result<Library, Error> {
    let open = |name: &OsStr| {
        // SAFETY: with RTLD_NOLOAD nothing is loaded, so no initialiser of a library runs.
        unsafe { Library::open(Some(name), RTLD_NOW | RTLD_NOLOAD) }
    };
    match (open(OsStr::new(LIBRARY_NAME)), libtorch_cpu) {
        (Ok(library), _) => Ok(library),
        (Err(_), Some(path)) => open(path.as_os_str())
            .map_err(|_| Error::NotLoaded { reason: format!("neither {LIBRARY_NAME} nor {}", path.display()) }),
        (Err(_), None) => Err(Error::NotLoaded { reason: format!("no {LIBRARY_NAME}") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_survive_the_round_trip_and_are_ordered() {
        let version = AbiVersion { major: 2, minor: 15, patch: 1 };
        assert_eq!(version.encode(), (2 << 56) | (15 << 48) | (1 << 40));
        assert_eq!(AbiVersion::decode(version.encode()), version);
        assert_eq!(version.to_string(), "2.15.1");
        assert!(AbiVersion { major: 2, minor: 9, patch: 1 } < AbiVersion::OLDEST);
    }

    #[test]
    fn without_torch_the_path_is_named_and_nothing_is_loaded() {
        let error = initialise(Some(Path::new("/nowhere/libtorch_cpu.so"))).unwrap_err();
        assert!(matches!(error, Error::NotLoaded { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("/nowhere/libtorch_cpu.so") && text.contains("import torch"), "{text}");
        assert!(get().is_none());
        assert!(matches!(require(), Err(Error::NotLoaded { .. })));
    }
}
