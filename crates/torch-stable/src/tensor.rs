//! Tensors: handles that own a reference, and checked views of their elements.

use std::mem::ManuallyDrop;
use std::ptr::{self, NonNull};
use std::slice;

use crate::api::Api;
use crate::ffi::TensorHandle;
use crate::layout::{count, is_contiguous};
use crate::{DType, Device, DeviceType, Element, Error};

/// One owned reference to an `at::Tensor`, which may be undefined.
pub struct Handle {
    pub(crate) raw: TensorHandle,
    pub(crate) api: &'static Api,
}

// SAFETY: torch counts references atomically, and a handle may be used and freed on any thread.
unsafe impl Send for Handle {}

impl Handle {
    /// # Safety
    ///
    /// `raw` is null or a handle from this libtorch that nobody else will free.
    pub(crate) unsafe fn from_raw(raw: TensorHandle, api: &'static Api) -> Self {
        Self { raw, api }
    }

    /// Gives the reference away.
    pub(crate) fn into_raw(self) -> TensorHandle {
        ManuallyDrop::new(self).raw
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: the handle is ours to free, and this is the only place that does.
            // The status is ignored: freeing cannot fail, and there is nobody to tell.
            unsafe { (self.api.symbols.aoti_torch_delete_tensor_object)(self.raw) };
        }
    }
}

/// A strided tensor. Dropping it drops one reference; the elements live as long as any reference does.
///
/// Sizes, strides, element type and device are read once, when the handle arrives. The elements are shared with
/// everybody else who holds the tensor: as with torch's own operators, a program that writes to a tensor while an
/// operator reads it has a race, and this crate cannot prevent it.
pub struct Tensor {
    handle: Handle,
    /// The sizes, then the strides.
    layout: Box<[i64]>,
    dtype: DType,
    device: Device,
}

impl Tensor {
    /// Reads what describes the tensor; [`Error::Undefined`] when there is none.
    pub(crate) fn from_handle(handle: Handle) -> Result<Self, Error> {
        let &Handle { raw, api } = &handle;
        let symbols = &api.symbols;
        let (mut defined, mut dimensions, mut dtype, mut kind, mut index) = (false, 0, 0, 0, 0);
        let (mut sizes, mut strides) = (ptr::null_mut(), ptr::null_mut());
        if raw.is_null() {
            return Err(Error::Undefined);
        }
        // SAFETY: `raw` is a live handle, and each function only writes its result through the pointer it is given.
        unsafe {
            api.check((symbols.aoti_torch_is_defined)(raw, &raw mut defined), "aoti_torch_is_defined")?;
            if !defined {
                return Err(Error::Undefined);
            }
            api.check((symbols.aoti_torch_get_dim)(raw, &raw mut dimensions), "aoti_torch_get_dim")?;
            api.check((symbols.aoti_torch_get_sizes)(raw, &raw mut sizes), "aoti_torch_get_sizes")?;
            api.check((symbols.aoti_torch_get_strides)(raw, &raw mut strides), "aoti_torch_get_strides")?;
            api.check((symbols.aoti_torch_get_dtype)(raw, &raw mut dtype), "aoti_torch_get_dtype")?;
            api.check((symbols.aoti_torch_get_device_type)(raw, &raw mut kind), "aoti_torch_get_device_type")?;
            api.check((symbols.aoti_torch_get_device_index)(raw, &raw mut index), "aoti_torch_get_device_index")?;
        }
        let layout = if dimensions == 0 {
            Box::default()
        } else {
            // SAFETY: torch lends two arrays of `dimensions` numbers that live as long as the tensor keeps its shape;
            // they are copied here, so that a later `resize_` cannot pull them away.
            unsafe {
                let dimensions = dimensions as usize;
                [slice::from_raw_parts(sizes, dimensions), slice::from_raw_parts(strides, dimensions)].concat()
            }
            .into_boxed_slice()
        };
        let device = Device { kind: api.devices.decode(kind), index };
        Ok(Self { handle, layout, dtype: api.dtypes.decode(dtype), device })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    pub(crate) fn into_raw(self) -> TensorHandle {
        self.handle.into_raw()
    }

    /// Number of dimensions.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.layout.len() / 2
    }

    /// Length of each dimension.
    #[must_use]
    pub fn sizes(&self) -> &[i64] {
        &self.layout[..self.dim()]
    }

    /// For each dimension, how many elements lie between two neighbours.
    #[must_use]
    pub fn strides(&self) -> &[i64] {
        &self.layout[self.dim()..]
    }

    /// Type of the elements.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the elements are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.device
    }

    /// Whether the elements lie one after the other in row-major order.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        is_contiguous(self.sizes(), self.strides())
    }

    /// Number of elements.
    ///
    /// # Errors
    ///
    /// [`Error::Size`] when it does not fit (an expanded tensor can claim any size without memory).
    pub fn numel(&self) -> Result<usize, Error> {
        let sizes: Vec<usize> = self.sizes().iter().map(|&size| size as usize).collect();
        count(&sizes, 1)
    }

    /// The elements, in row-major order.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] when they are not on the CPU, [`Error::Dtype`] when they are not of type `T`,
    /// [`Error::NotContiguous`] when they do not lie in order, [`Error::Storage`] or [`Error::Alignment`] when the
    /// tensor's memory is not what its sizes and type promise.
    pub fn as_slice<T: Element>(&self) -> Result<&[T], Error> {
        if self.device.kind != DeviceType::Cpu {
            return Err(Error::Device { found: self.device });
        }
        if self.dtype != T::DTYPE {
            return Err(Error::Dtype { expected: T::DTYPE, found: self.dtype });
        }
        if !self.is_contiguous() {
            let (sizes, strides) = (self.sizes().to_vec(), self.strides().to_vec());
            return Err(Error::NotContiguous { sizes, strides });
        }
        let length = self.numel()?;
        if length == 0 {
            return Ok(&[]);
        }
        let start = self.checked_data(length, size_of::<T>())?.cast::<T>();
        if !start.is_aligned() {
            let (dtype, alignment, address) = (self.dtype, align_of::<T>(), start.addr().get());
            return Err(Error::Alignment { dtype, alignment, address });
        }
        // SAFETY: not null and aligned; the storage holds `length` elements from here on and lives as long as our
        // reference, which outlives the slice; every bit pattern is a `T`.
        Ok(unsafe { slice::from_raw_parts(start.as_ptr(), length) })
    }

    /// The first element's address, once the storage is known to hold `length` elements from there on.
    fn checked_data(&self, length: usize, element_size: usize) -> Result<NonNull<u8>, Error> {
        let &Handle { raw, api } = self.handle();
        let (mut data, mut bytes, mut offset) = (ptr::null(), 0, 0);
        // SAFETY: `raw` is a live handle, and each function only writes its result through the pointer it is given.
        unsafe {
            let symbols = &api.symbols;
            api.check((symbols.torch_get_const_data_ptr)(raw, &raw mut data), "torch_get_const_data_ptr")?;
            api.check((symbols.aoti_torch_get_storage_size)(raw, &raw mut bytes), "aoti_torch_get_storage_size")?;
            api.check((symbols.aoti_torch_get_storage_offset)(raw, &raw mut offset), "aoti_torch_get_storage_offset")?;
        }
        let needed = (offset as usize).saturating_add(length).saturating_mul(element_size);
        match NonNull::new(data.cast::<u8>().cast_mut()) {
            Some(data) if needed <= bytes as usize => Ok(data),
            _ => Err(Error::Storage { sizes: self.sizes().to_vec(), needed, found: bytes }),
        }
    }

    /// One more reference to the same elements.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] when libtorch fails.
    pub fn try_clone(&self) -> Result<Self, Error> {
        let api = self.handle.api;
        let mut raw = ptr::null_mut();
        // SAFETY: our handle is live, and the function only writes the new one.
        let status = unsafe { (api.symbols.aoti_torch_new_tensor_handle)(self.handle.raw, &raw mut raw) };
        api.check(status, "aoti_torch_new_tensor_handle")?;
        // SAFETY: libtorch just made this handle for us.
        let handle = unsafe { Handle::from_raw(raw, api) };
        Ok(Self { handle, layout: self.layout.clone(), dtype: self.dtype, device: self.device })
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Tensor({}, {:?}, {})", self.dtype, self.sizes(), self.device)
    }
}
