//! The checks that every argument struct is built from.

use crate::error::{Error, Result};
use crate::tensor::{DType, Device, TensorRef};

/// One named argument of one operation.
#[derive(Clone, Copy)]
pub(crate) struct Arg<'a> {
    pub op: &'static str,
    pub name: &'static str,
    pub tensor: TensorRef<'a>,
}

pub(crate) fn arg<'a>(op: &'static str, name: &'static str, tensor: TensorRef<'a>) -> Arg<'a> {
    Arg { op, name, tensor }
}

impl Arg<'_> {
    pub fn float(self) -> Result<Self> {
        if !self.tensor.dtype().is_float() {
            return Err(self.dtype_error("float32, float16 or bfloat16"));
        }
        self.aligned()
    }

    pub fn dtype(self, expected: DType) -> Result<Self> {
        if self.tensor.dtype() != expected {
            return Err(self.dtype_error(match expected {
                DType::F32 => "float32",
                DType::F16 => "float16",
                DType::BF16 => "bfloat16",
                DType::U8 => "uint8",
                DType::I32 => "int32",
            }));
        }
        self.aligned()
    }

    pub fn numel(self, expected: usize, why: &'static str) -> Result<Self> {
        let got = self.tensor.numel();
        if got != expected {
            let (op, name) = (self.op, self.name);
            return Err(Error::Numel { op, name, expected, why, got });
        }
        Ok(self)
    }

    pub fn on(self, expected: Device, reference: &'static str) -> Result<Self> {
        let got = self.tensor.device();
        if got != expected {
            let (op, name) = (self.op, self.name);
            return Err(Error::Device { op, name, expected, reference, got });
        }
        Ok(self)
    }

    fn aligned(self) -> Result<Self> {
        self.aligned_to(self.tensor.dtype().size())
    }

    pub fn aligned_to(self, expected: usize) -> Result<Self> {
        let got = self.tensor.ptr() as usize;
        if self.tensor.numel() > 0 && !got.is_multiple_of(expected) {
            let (op, name) = (self.op, self.name);
            return Err(Error::Alignment { op, name, expected, got });
        }
        Ok(self)
    }

    fn dtype_error(self, expected: &'static str) -> Error {
        Error::Dtype { op: self.op, name: self.name, expected, got: self.tensor.dtype() }
    }
}

/// 4-bit block sizes: powers of two in 32..=4096.
pub(crate) fn blocksize_4bit(op: &'static str, blocksize: usize) -> Result<()> {
    power_of_two(op, blocksize, 32, "a power of two in 32..=4096")
}

/// 8-bit block sizes: powers of two in 64..=4096.
pub(crate) fn blocksize_8bit(op: &'static str, blocksize: usize) -> Result<()> {
    power_of_two(op, blocksize, 64, "a power of two in 64..=4096")
}

fn power_of_two(op: &'static str, blocksize: usize, low: usize, expected: &'static str) -> Result<()> {
    if !blocksize.is_power_of_two() || !(low..=4096).contains(&blocksize) {
        return Err(Error::Argument { op, name: "blocksize", expected, got: blocksize.to_string() });
    }
    Ok(())
}
