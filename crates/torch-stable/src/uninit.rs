//! New tensors to write into.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::{ptr, slice};

use crate::layout::contiguous_layout;
use crate::tensor::{Handle, Tensor};
use crate::{Device, DeviceType, Element, Error, api};

/// A new contiguous tensor that nobody else has seen, for its elements to be written.
#[derive(Debug)]
pub struct UninitTensor<T: Element> {
    tensor: Tensor,
    element: PhantomData<T>,
}

impl<T: Element> UninitTensor<T> {
    /// Allocates memory for the elements and leaves it as it is, as `torch.empty`.
    ///
    /// # Errors
    ///
    /// [`Error::Size`] when the sizes do not fit libtorch's integers, [`Error::Call`] when there is no such memory.
    pub fn new(sizes: &[usize], device: Device) -> Result<Self, Error> {
        let api = api::require()?;
        let layout = contiguous_layout(sizes, size_of::<T>())?;
        let (sizes_of, strides_of) = layout.split_at(sizes.len());
        let kind = api.devices.encode(device.kind);
        let dtype = api.dtypes.encode(T::DTYPE).ok_or(Error::MissingSymbol { symbol: "dtype code" })?;
        let mut raw = ptr::null_mut();
        // SAFETY: both arrays have one number a dimension, and the function only reads them and writes the handle.
        let status = unsafe {
            (api.symbols.aoti_torch_empty_strided)(
                sizes.len() as i64,
                sizes_of.as_ptr(),
                strides_of.as_ptr(),
                dtype,
                kind,
                device.index,
                &raw mut raw,
            )
        };
        api.check(status, "aoti_torch_empty_strided")
            .map_err(|error| error.about(&format!("sizes {sizes:?}, {}, {device}", T::DTYPE)))?;
        // SAFETY: libtorch just made this handle for us.
        let tensor = Tensor::from_handle(unsafe { Handle::from_raw(raw, api) })?;
        Ok(Self { tensor, element: PhantomData })
    }

    /// Length of each dimension.
    #[must_use]
    pub fn sizes(&self) -> &[i64] {
        self.tensor.sizes()
    }

    /// The elements to write, in row-major order.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] when they are not on the CPU.
    pub fn as_uninit_mut(&mut self) -> Result<&mut [MaybeUninit<T>], Error> {
        if self.tensor.device().kind != DeviceType::Cpu {
            return Err(Error::Device { found: self.tensor.device() });
        }
        let length = self.tensor.numel()?;
        if length == 0 {
            return Ok(&mut []);
        }
        let &Handle { raw, api } = self.tensor.handle();
        let mut data = ptr::null_mut();
        // SAFETY: our handle is live, and the function only writes the pointer.
        let status = unsafe { (api.symbols.torch_get_mutable_data_ptr)(raw, &raw mut data) };
        api.check(status, "torch_get_mutable_data_ptr")?;
        let start = data.cast::<MaybeUninit<T>>();
        if start.is_null() || !start.is_aligned() {
            let (dtype, alignment, address) = (T::DTYPE, align_of::<T>(), start.addr());
            return Err(Error::Alignment { dtype, alignment, address });
        }
        advise_huge_pages(start.addr(), length * size_of::<T>());
        // SAFETY: not null and aligned; the allocation has `length` elements, contiguous as they were asked for; no
        // other handle to this storage exists before `into_tensor`, and we are borrowed mutably.
        Ok(unsafe { slice::from_raw_parts_mut(start, length) })
    }

    /// The finished tensor. Elements that were never written hold whatever the allocator returned, as after
    /// `torch.empty`.
    #[must_use]
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }
}

/// Asks for huge pages where a tensor is so large that its memory comes fresh from the system and goes back with the
/// tensor, as glibc does with allocations of 32 MiB and more. The first write to each page is then what the time goes
/// into, and a huge page is one such step instead of 512. It is advice: where the system does not take it, nothing is
/// lost, so errors are no errors.
fn advise_huge_pages(address: usize, bytes: usize) {
    const LEAST: usize = 32 << 20;
    // Where huge pages are larger, the part inside is still made of whole pages.
    const HUGE_PAGE: usize = 2 << 20;
    if bytes < LEAST {
        return;
    }
    let begin = address.next_multiple_of(HUGE_PAGE);
    let end = (address + bytes) / HUGE_PAGE * HUGE_PAGE;
    #[cfg(target_os = "linux")]
    if begin < end {
        // SAFETY: the pages lie within the tensor's own memory, and this advice changes none of their contents.
        unsafe { libc::madvise(ptr::without_provenance_mut(begin), end - begin, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (begin, end);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_torch_there_is_no_tensor() {
        assert!(matches!(UninitTensor::<f32>::new(&[2], Device::CPU), Err(Error::NotLoaded { .. })));
    }
}
