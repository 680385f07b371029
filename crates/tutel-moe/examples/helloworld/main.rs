//! Train one Mixture-of-Experts layer on random tokens, as `python3 -m tutel.examples.helloworld` does, without Python.
//!
//! Initial values and tokens are those that PyTorch would draw, so that the losses are the same but for rounding.
mod model;
mod options;
mod torch_random;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use tutel_moe::half::{bf16, f16};
use tutel_moe::{Error, Scalar};

use crate::model::Model;
use crate::options::{Dtype, Options};
use crate::torch_random::Uniform;

fn run<T: Scalar + Uniform>(options: &Options) -> Result<(), Error> {
    let mut model = Model::<T>::new(options)?;
    let count = |of_experts: bool| -> usize {
        let parameters = model.layer.parameters().iter();
        parameters.filter(|p| p.name.starts_with("experts.") == of_experts).map(|p| p.values.len()).sum()
    };
    println!(
        "[Statistics] param count for MoE local_experts = {}, param count for MoE gate = {}.\n",
        count(true),
        count(false)
    );
    println!("[Benchmark] {}", options.setting());
    let tokens = model.draw_tokens();
    let mut step_times = vec![];
    for step in 0..options.num_steps {
        let start = Instant::now();
        let loss = model.step(&tokens)?;
        let seconds = start.elapsed().as_secs_f64();
        let tflops = options.tflops(seconds);
        println!("STEP-{step}: DONE, loss = {loss:?}, step_time = {seconds:.6} sec, perf = {tflops:.2} tflops.");
        step_times.push(seconds);
    }
    let last = &step_times[step_times.len().saturating_sub(10)..];
    let average = last.iter().sum::<f64>() / last.len() as f64;
    println!("\n[Summary] Average synchronized step_time = {average:?} sec.");
    Ok(())
}

fn main() -> ExitCode {
    let options = Options::parse();
    let done = match options.dtype {
        Dtype::Float32 => run::<f32>(&options),
        Dtype::Float64 => run::<f64>(&options),
        Dtype::Float16 => run::<f16>(&options),
        Dtype::Bfloat16 => run::<bf16>(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("helloworld: {error}");
            ExitCode::FAILURE
        }
    }
}
