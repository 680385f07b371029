//! `tutel._core`: imports torch, registers the operators of namespace `tutel` with it, and is otherwise empty.
//! Python reaches the operators as `torch.ops.tutel.*`.

mod arguments;
mod ops;
mod scalar;
mod threads;

#[pyo3::pymodule]
mod _core {
    use std::path::PathBuf;

    use pyo3::exceptions::PyImportError;
    use pyo3::prelude::*;

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "a Python name")]
    const __version__: &str = env!("CARGO_PKG_VERSION");

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
