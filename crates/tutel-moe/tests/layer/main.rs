//! One program for all tests of the layer: each would compile the kernels anew.
mod forward;
mod gradients;
mod naive;
mod python;
mod refusals;
mod threads;
