//! The operators of namespace `tutel`: one file an operator, its schema beside its kernels.
mod assign_rows;
mod combine;
mod dispatch;
mod expert_hidden;
mod expert_hidden_grad;
mod gather;
mod grouped_gemm;
mod grouped_gemm_pair;
mod grouped_gemm_weight_grad;
mod grouped_sum;
mod padded_rows;
mod prefix_count;
mod row_dot;
mod select_experts;
mod select_experts_backward;

use std::path::Path;

use torch_stable::{AbiVersion, Cpu, Error, Kernel, Library};

fn add<O: Kernel<Cpu>>(library: &Library) -> Result<(), Error> {
    library.define::<O>()?;
    library.implement::<O, Cpu>()
}

/// Registers every operator with the torch that Python has loaded.
pub(crate) fn register(libtorch_cpu: &Path) -> Result<AbiVersion, Error> {
    let version = torch_stable::initialise(Some(libtorch_cpu))?;
    let library = Library::fragment("tutel")?;
    add::<select_experts::SelectExperts>(&library)?;
    add::<select_experts_backward::SelectExpertsBackward>(&library)?;
    add::<assign_rows::AssignRows>(&library)?;
    add::<dispatch::Dispatch>(&library)?;
    add::<combine::Combine>(&library)?;
    add::<row_dot::RowDot>(&library)?;
    add::<grouped_gemm::GroupedGemm>(&library)?;
    add::<grouped_gemm_pair::GroupedGemmPair>(&library)?;
    add::<expert_hidden::ExpertHidden>(&library)?;
    add::<expert_hidden_grad::ExpertHiddenGrad>(&library)?;
    add::<grouped_gemm_weight_grad::GroupedGemmWeightGrad>(&library)?;
    add::<grouped_sum::GroupedSum>(&library)?;
    add::<padded_rows::PaddedRows>(&library)?;
    add::<prefix_count::PrefixCount>(&library)?;
    Ok(version)
}
