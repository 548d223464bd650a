//! Kernels of paged_attention on tensor cores; its launcher chooses among them.

use crate::launch::{Family, family};

/// By what the cache holds, then by elements of a head, then by dtype.
pub(crate) const KERNELS: [&str; 8] = [
    "paged_attention_mma_64_f16",
    "paged_attention_mma_64_bf16",
    "paged_attention_mma_128_f16",
    "paged_attention_mma_128_bf16",
    "paged_attention_mma_codes_64_f16",
    "paged_attention_mma_codes_64_bf16",
    "paged_attention_mma_codes_128_f16",
    "paged_attention_mma_codes_128_bf16",
];
pub(crate) static FAMILY: Family = family!("paged_attention_mma", &KERNELS);

/// Heads of a CTA.
pub(crate) const HEADS: usize = 8;
