//! `tutel._core`: imports torch, registers the operators of namespace `tutel` with it, and is otherwise empty.
//! Python reaches the operators as `torch.ops.tutel.*`.

mod arguments;
mod ops;
mod scalar;
mod threads;

#[pyo3::pymodule]
mod _core {
    use std::path::PathBuf;

    use pyo3::exceptions::{PyImportError, PyValueError};
    use pyo3::prelude::*;
    use tutel_cpu::{Activation, Level, UnknownLevel};

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "a Python name")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    /// Uses no more of the processor's features than those of this level from now on.
    #[pyfunction]
    fn set_cpu_level(name: &str) -> PyResult<()> {
        let level: Level = name.parse().map_err(|error: UnknownLevel| PyValueError::new_err(error.to_string()))?;
        level.set_cap();
        Ok(())
    }

    /// The level of processor features that kernels use.
    #[pyfunction]
    fn cpu_level() -> &'static str {
        Level::current().name()
    }

    /// Names of the activations that kernels know, in the order of their numbers.
    #[pyfunction]
    fn activations() -> Vec<&'static str> {
        Activation::ALL.iter().map(|(_, name)| *name).collect()
    }

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let torch = module.py().import("torch")?;
        let package: PathBuf = torch.getattr("__file__")?.extract()?;
        let libtorch = package.with_file_name("lib").join("libtorch_cpu.so");
        let version = crate::ops::register(&libtorch)
            .map_err(|error| PyImportError::new_err(format!("tutel could not register with torch: {error}")))?;
        module.add("torch_abi_version", version.to_string())
    }
}
