//! One error for every operation: it names the operation, the argument, what was expected and what came.

use crate::tensor::{DType, Device};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    #[error("{op}: {name} must have dtype {expected}, got {got}")]
    Dtype { op: &'static str, name: &'static str, expected: &'static str, got: DType },

    #[error("{op}: {name} must have {expected} elements ({why}), got {got}")]
    Numel { op: &'static str, name: &'static str, expected: usize, why: &'static str, got: usize },

    #[error("{op}: {name} must be on {expected} like {reference}, got {got}")]
    Device { op: &'static str, name: &'static str, expected: Device, reference: &'static str, got: Device },

    #[error("{op}: {name} must start at a multiple of {expected} bytes, got address {got:#x}")]
    Alignment { op: &'static str, name: &'static str, expected: usize, got: usize },

    #[error("{op}: {name} must be {expected}, got {got}")]
    Argument { op: &'static str, name: &'static str, expected: &'static str, got: String },

    /// A failure of the CUDA driver or of a kernel; `what` names the call or the kernel with its launch dimensions.
    #[error("{what} failed on {device}: {message}")]
    Cuda { what: String, device: Device, message: String },
}
