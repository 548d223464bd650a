//! What accompanies packed 4-bit codes: the codebook's name and one scale per block.

use std::fmt;

use crate::check::arg;
use crate::codebook::{self, Ranks};
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, TensorRef};

/// Number of block scales that share one nested scale.
pub const NESTED_BLOCKSIZE: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantType {
    Nf4,
    Fp4,
    Int4,
}

impl QuantType {
    /// The value of each code, in units of the block's absmax; FP4's code 8 is -0.0.
    pub const fn table(self) -> &'static [f32; 16] {
        match self {
            QuantType::Nf4 => &codebook::NF4,
            QuantType::Fp4 => &codebook::FP4,
            QuantType::Int4 => &codebook::INT4,
        }
    }

    /// The table as checkpoints store it, where FP4's code 8 is +0.0.
    pub fn stored_map(self) -> [f32; 16] {
        self.table().map(|value| value + 0.0)
    }

    /// The code that a zero gets, in an all-zero block and as padding of an odd element count.
    pub const fn zero_code(self) -> u8 {
        match self {
            QuantType::Nf4 | QuantType::Int4 => 7,
            QuantType::Fp4 => 0,
        }
    }

    /// How values are encoded.
    pub const fn ranks(self) -> &'static Ranks {
        match self {
            QuantType::Nf4 => &codebook::NF4_RANKS,
            QuantType::Fp4 => &codebook::FP4_RANKS,
            QuantType::Int4 => &codebook::INT4_RANKS,
        }
    }

    /// The quant type of this name; `op` is named in the error.
    pub fn parse(op: &'static str, name: &str) -> Result<Self> {
        let known = [QuantType::Nf4, QuantType::Fp4, QuantType::Int4];
        known.into_iter().find(|known| known.name() == name).ok_or_else(|| Error::Argument {
            op,
            name: "quant_type",
            expected: "'nf4', 'fp4' or 'int4'",
            got: format!("'{name}'"),
        })
    }

    pub const fn name(self) -> &'static str {
        match self {
            QuantType::Nf4 => "nf4",
            QuantType::Fp4 => "fp4",
            QuantType::Int4 => "int4",
        }
    }
}

impl fmt::Display for QuantType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The scales of the blocks.
#[derive(Debug, Clone, Copy)]
pub enum Absmax<'a> {
    /// `absmax` f32 `[nblocks]`.
    Plain { absmax: TensorRef<'a> },
    /// Double quantization: `scale[i] = map[codes[i]] * absmax[i / 256] + offset`, a multiplication and an
    /// addition, each rounded to fp32 (never fused).
    Nested {
        /// u8 `[nblocks]`
        codes: TensorRef<'a>,
        /// f32 `[ceil(nblocks / 256)]`
        absmax: TensorRef<'a>,
        /// f32 `[256]`
        map: TensorRef<'a>,
        offset: f32,
    },
}

impl Absmax<'_> {
    pub(crate) fn check(&self, op: &'static str, nblocks: usize, device: Device) -> Result<()> {
        let blocks = "one a block";
        match *self {
            Absmax::Plain { absmax } => {
                arg(op, "absmax", absmax).dtype(DType::F32)?.numel(nblocks, blocks)?.on(device, "packed")?;
            }
            Absmax::Nested { codes, absmax, map, .. } => {
                let groups = nblocks.div_ceil(NESTED_BLOCKSIZE);
                let why = "one for 256 blocks";
                arg(op, "absmax", codes).dtype(DType::U8)?.numel(nblocks, blocks)?.on(device, "packed")?;
                arg(op, "nested_absmax", absmax).dtype(DType::F32)?.numel(groups, why)?.on(device, "packed")?;
                arg(op, "nested_map", map).dtype(DType::F32)?.numel(256, "one a code")?.on(device, "packed")?;
            }
        }
        Ok(())
    }

    /// The scales as CPU slices.
    pub(crate) fn scales(&self) -> Scales<'_> {
        match *self {
            Absmax::Plain { absmax } => Scales::Plain(absmax.as_slice()),
            Absmax::Nested { codes, absmax, map, offset } => {
                Scales::Nested { codes: codes.as_slice(), absmax: absmax.as_slice(), map: map.as_slice(), offset }
            }
        }
    }
}

/// [`Absmax`] of the CPU, indexed by block.
#[derive(Clone, Copy)]
pub(crate) enum Scales<'a> {
    Plain(&'a [f32]),
    Nested { codes: &'a [u8], absmax: &'a [f32], map: &'a [f32], offset: f32 },
}

impl Scales<'_> {
    #[inline(always)]
    pub fn get(&self, block: usize) -> f32 {
        match *self {
            Scales::Plain(absmax) => absmax[block],
            Scales::Nested { codes, absmax, map, offset } => {
                map[codes[block] as usize] * absmax[block / NESTED_BLOCKSIZE] + offset
            }
        }
    }

    /// Those of the blocks from `first` on.
    #[inline(always)]
    pub fn fill(&self, first: usize, out: &mut [f32]) {
        match *self {
            Scales::Plain(absmax) => out.copy_from_slice(&absmax[first..][..out.len()]),
            Scales::Nested { codes, absmax, map, offset } => {
                let (mut block, mut codes, mut out) = (first, &codes[first..][..out.len()], out);
                // A byte is always an index of a whole map: nothing is checked block by block.
                let map = map.first_chunk::<256>().unwrap_or(&[f32::NAN; 256]);
                while !out.is_empty() {
                    let run = out.len().min(NESTED_BLOCKSIZE - block % NESTED_BLOCKSIZE);
                    let factor = absmax[block / NESTED_BLOCKSIZE];
                    let (now, later) = out.split_at_mut(run);
                    now.iter_mut().zip(codes).for_each(|(out, &code)| *out = map[code as usize]);
                    // Apart from the look-up, so that vectors can.
                    now.iter_mut().for_each(|out| *out = *out * factor + offset);
                    (block, codes, out) = (block + run, &codes[run..], later);
                }
            }
        }
    }
}
