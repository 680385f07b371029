//! The command line: the options of the Python twin that have a meaning here, with its names and defaults.
use clap::{Parser, ValueEnum};

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Dtype {
    Float32,
    Float64,
    Float16,
    Bfloat16,
}

/// Train one Mixture-of-Experts layer on random tokens.
#[derive(Debug, Parser)]
#[command(rename_all = "snake_case", args_override_self = true)]
pub(crate) struct Options {
    /// Sequences of a step
    #[arg(long, default_value_t = 16, value_parser = at_least_one)]
    pub(crate) batch_size: usize,
    /// Tokens of one sequence
    #[arg(long, default_value_t = 1024, value_parser = at_least_one)]
    pub(crate) num_tokens: usize,
    /// Width of a token
    #[arg(long, default_value_t = 2048, value_parser = at_least_one)]
    pub(crate) model_dim: usize,
    /// Hidden units of an expert
    #[arg(long, default_value_t = 2048, value_parser = at_least_one)]
    pub(crate) hidden_size: usize,
    /// Number of experts
    #[arg(long, default_value_t = 2, value_parser = at_least_one)]
    pub(crate) num_local_experts: usize,
    /// Of weights and tokens
    #[arg(long, value_enum, default_value_t = Dtype::Float32)]
    pub(crate) dtype: Dtype,
    /// Experts of a token, at most all
    #[arg(long, default_value_t = 2, value_parser = at_least_one)]
    pub(crate) top: usize,
    /// Weight of the auxiliary loss
    #[arg(long, default_value_t = 0.0)]
    pub(crate) l_aux_wt: f64,
    /// Steps to run; the last ten are averaged
    #[arg(long, default_value_t = 100, value_parser = at_least_one)]
    pub(crate) num_steps: usize,
    /// 0: drop nothing; negative: at most that
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub(crate) capacity_factor: f64,
    /// Forward only
    #[arg(long)]
    pub(crate) eval: bool,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("must be a whole number of at least 1: {error}")),
    }
}

impl Options {
    /// The line that says what is measured.
    pub(crate) fn setting(&self) -> String {
        format!(
            "world_size = 1, batch_size = {}, num_tokens = {}, model_dim = {}, hidden_size = {}, \
             num_local_experts = {}, top = {}, dtype = {}, capacity_factor = {:?}, device = cpu",
            self.batch_size,
            self.num_tokens,
            self.model_dim,
            self.hidden_size,
            self.num_local_experts,
            self.top,
            format!("{:?}", self.dtype).to_lowercase(),
            self.capacity_factor,
        )
    }

    /// The rate of one step in 10^12 operations a second: two products a layer of an expert, three times as many with
    /// their gradients.
    pub(crate) fn tflops(&self, seconds: f64) -> f64 {
        let products = if self.eval { 2.0 } else { 6.0 };
        let sizes = [self.batch_size, self.num_tokens, self.model_dim, self.hidden_size];
        let flops = sizes.iter().fold(2.0 * products, |product, &size| product * size as f64);
        let factor = self.capacity_factor.abs();
        let kept = self.top as f64 * if factor == 0.0 { 1.0 } else { factor.min(1.0) };
        flops * kept / seconds * 1e-12
    }
}
