//! Where a tensor's memory lives.

use std::fmt;

use crate::ffi::Symbols;

/// The kind of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceType {
    /// The host.
    Cpu,
    /// An NVIDIA GPU, or an AMD one where torch was built for those.
    Cuda,
    /// No memory at all: only sizes, strides and element type.
    Meta,
    /// A kind that this crate has no name for, with libtorch's code.
    Other(i32),
}

impl fmt::Display for DeviceType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => formatter.pad("cpu"),
            Self::Cuda => formatter.pad("cuda"),
            Self::Meta => formatter.pad("meta"),
            Self::Other(code) => write!(formatter, "device with code {code}"),
        }
    }
}

/// A device: its kind, and which one of that kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// The kind.
    pub kind: DeviceType,
    /// Number among its kind, or -1 where none is given (always so for the CPU; for CUDA the current one).
    pub index: i32,
}

impl Device {
    /// The host.
    pub const CPU: Self = Self { kind: DeviceType::Cpu, index: -1 };

    /// The CUDA device with this number.
    #[must_use]
    pub const fn cuda(index: i32) -> Self {
        Self { kind: DeviceType::Cuda, index }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.index {
            ..0 => self.kind.fmt(formatter),
            index => write!(formatter, "{}:{index}", self.kind),
        }
    }
}

/// libtorch's numbers for the kinds, which are not part of the ABI and so are asked for at start.
pub(crate) struct DeviceCodes {
    cpu: i32,
    cuda: i32,
    meta: i32,
}

impl DeviceCodes {
    pub(crate) fn read(symbols: &Symbols) -> Self {
        // SAFETY: these functions take nothing and return a constant.
        unsafe {
            Self {
                cpu: (symbols.aoti_torch_device_type_cpu)(),
                cuda: (symbols.aoti_torch_device_type_cuda)(),
                meta: (symbols.aoti_torch_device_type_meta)(),
            }
        }
    }

    pub(crate) fn decode(&self, code: i32) -> DeviceType {
        match code {
            code if code == self.cpu => DeviceType::Cpu,
            code if code == self.cuda => DeviceType::Cuda,
            code if code == self.meta => DeviceType::Meta,
            code => DeviceType::Other(code),
        }
    }

    pub(crate) fn encode(&self, kind: DeviceType) -> i32 {
        match kind {
            DeviceType::Cpu => self.cpu,
            DeviceType::Cuda => self.cuda,
            DeviceType::Meta => self.meta,
            DeviceType::Other(code) => code,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_is_torchs() {
        assert_eq!(Device::CPU.to_string(), "cpu");
        assert_eq!(Device::cuda(0).to_string(), "cuda:0");
        assert_eq!(Device { kind: DeviceType::Meta, index: -1 }.to_string(), "meta");
    }

    #[test]
    fn codes_both_ways() {
        let codes = DeviceCodes { cpu: 0, cuda: 1, meta: 14 };
        for kind in [DeviceType::Cpu, DeviceType::Cuda, DeviceType::Meta, DeviceType::Other(13)] {
            assert_eq!(codes.decode(codes.encode(kind)), kind);
        }
    }
}
