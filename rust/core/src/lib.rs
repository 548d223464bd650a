//! halfbyte's number formats and operations: definitions, checked arguments and the CPU backend.
//!
//! Knows no CUDA, no Python and no torch. An operation is a module of [`ops`] whose argument struct makes every
//! check when it is built, and a method of [`backend::Backend`].

pub mod backend;
mod check;
pub mod codebook;
pub mod cpu;
pub mod error;
pub mod file;
pub mod ops;
pub mod pager;
pub mod parallel;
pub mod quant_state;
pub mod simd;
pub mod tensor;

pub use backend::Backend;
pub use cpu::CpuBackend;
pub use error::{Error, Result};
pub use quant_state::{Absmax, QuantType};
pub use tensor::{DType, Device, TensorMut, TensorRef};
