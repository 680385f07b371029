//! Kernels run on torch's own threads: they obey `torch.set_num_threads` and survive a forked worker.
use tutel_cpu::Parallel;

pub(crate) struct TorchThreads;

impl Parallel for TorchThreads {
    fn threads(&self) -> usize {
        torch_stable::num_threads()
    }

    fn run(&self, workers: usize, worker: &(dyn Fn() + Sync)) {
        if let Err(error) = torch_stable::parallel_for(workers, &|_| worker()) {
            // Caught at the operator's boundary, where it becomes a Python exception.
            panic!("torch could not run the kernel's threads: {error}");
        }
    }
}
