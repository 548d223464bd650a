//! Where the moments of every parameter lie: end to end in one slab, cut into pages.

use std::ops::Range;

use crate::error::{Error, Result};

/// Elements of one block: the unit that a parameter is padded to, and that shares 8-bit scales.
pub const BLOCK: usize = 256;
/// Elements of one page, of both moments.
pub const PAGE_ELEMENTS: usize = 1 << 17;
pub const BLOCKS_PER_PAGE: usize = PAGE_ELEMENTS / BLOCK;

/// How a page stores m and v.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moments {
    /// `m f32 [131072] | v f32 [131072]`
    Fp32,
    /// `m u8 [131072] | v u8 [131072] | absmax_m f32 [512] | absmax_v f32 [512]`
    Block8,
}

impl Moments {
    pub fn parse(op: &'static str, name: &str) -> Result<Self> {
        match name {
            "fp32" => Ok(Self::Fp32),
            "8bit" => Ok(Self::Block8),
            _ => Err(Error::Argument { op, name: "moments", expected: "fp32 or 8bit", got: name.to_string() }),
        }
    }

    /// Byte offsets in a page of m, v and their scales; all are multiples of 128.
    pub const fn offsets(self) -> [usize; 4] {
        match self {
            Self::Fp32 => [0, 4 * PAGE_ELEMENTS, 8 * PAGE_ELEMENTS, 8 * PAGE_ELEMENTS],
            Self::Block8 => [0, PAGE_ELEMENTS, 2 * PAGE_ELEMENTS, 2 * PAGE_ELEMENTS + 4 * BLOCKS_PER_PAGE],
        }
    }

    pub const fn page_bytes(self) -> usize {
        match self {
            Self::Fp32 => 8 * PAGE_ELEMENTS,
            Self::Block8 => 2 * PAGE_ELEMENTS + 8 * BLOCKS_PER_PAGE,
        }
    }
}

/// The moments of parameters laid end to end, each padded to whole blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slab {
    moments: Moments,
    /// first block of each parameter, and the end
    starts: Vec<u32>,
}

impl Slab {
    /// `numels`: elements of each parameter, in order.
    pub fn new(moments: Moments, numels: &[usize]) -> Result<Self> {
        let mut starts = vec![0u32];
        for &numel in numels {
            let blocks = u32::try_from(numel.div_ceil(BLOCK)).ok();
            let end = blocks.and_then(|blocks| starts[starts.len() - 1].checked_add(blocks));
            starts.push(end.ok_or_else(|| Error::Argument {
                op: "Slab",
                name: "numels",
                expected: "fewer than 2^40 elements in all",
                got: format!("{numel} more"),
            })?);
        }
        Ok(Self { moments, starts })
    }

    pub fn moments(&self) -> Moments {
        self.moments
    }

    pub fn params(&self) -> usize {
        self.starts.len() - 1
    }

    /// First block of each parameter, then the number of all blocks.
    pub fn starts(&self) -> &[u32] {
        &self.starts
    }

    pub fn first_block(&self, param: usize) -> usize {
        self.starts[param] as usize
    }

    pub fn pages(&self) -> usize {
        self.first_block(self.params()).div_ceil(BLOCKS_PER_PAGE)
    }

    /// The pages that hold blocks of a parameter.
    pub fn pages_of(&self, param: usize) -> Range<usize> {
        let (first, end) = (self.first_block(param), self.first_block(param + 1));
        first / BLOCKS_PER_PAGE..if end > first { end.div_ceil(BLOCKS_PER_PAGE) } else { first / BLOCKS_PER_PAGE }
    }

    /// The parameters that have blocks among `blocks`, with those blocks.
    pub fn params_in(&self, blocks: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        let first = self.starts[1..].partition_point(|&end| end as usize <= blocks.start);
        (first..self.params())
            .map_while(move |param| {
                let range = self.first_block(param)..self.first_block(param + 1);
                (range.start < blocks.end).then(|| (param, range.start.max(blocks.start)..range.end.min(blocks.end)))
            })
            .filter(|(_, range)| !range.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_padded_to_blocks_and_share_pages() {
        let slab = Slab::new(Moments::Fp32, &[1, 0, 257, PAGE_ELEMENTS]).expect("fits");
        assert_eq!(slab.starts(), [0, 1, 1, 3, 515]);
        assert_eq!(slab.pages(), 2);
        assert_eq!([0, 1, 2, 3].map(|param| slab.pages_of(param)), [0..1, 0..0, 0..1, 0..2]);
        assert_eq!(slab.params_in(0..32).collect::<Vec<_>>(), [(0, 0..1), (2, 1..3), (3, 3..32)]);
        assert_eq!(slab.params_in(512..544).collect::<Vec<_>>(), [(3, 512..515)]);
        assert_eq!(slab.params_in(515..600).count(), 0);
    }

    #[test]
    fn parts_of_a_page_are_aligned_and_fill_it() {
        for moments in [Moments::Fp32, Moments::Block8] {
            assert!(moments.offsets().iter().all(|offset| offset % 128 == 0));
            assert_eq!(moments.page_bytes() % 128, 0);
        }
        assert_eq!(Moments::Block8.page_bytes(), 260 << 10);
    }
}
