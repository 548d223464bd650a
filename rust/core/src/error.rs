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

    /// Host memory that could not be reserved or pinned.
    #[error(
        "{need} bytes of host memory are needed for optimizer state, beside {held} held already, and {available} are \
         available: {reason}. hint: free host memory, raise the limit of the container, use 8-bit state, or keep the \
         state on the device"
    )]
    HostMemory { need: u64, held: u64, available: u64, reason: String },

    /// A failure of the CUDA driver or of a kernel; `what` names the call or the kernel with its launch dimensions.
    #[error("{what} failed on {device}: {message}")]
    Cuda { what: String, device: Device, message: String },
}
