//! `gemv_4bit_chain`: 4-bit products of a few rows, each of what the one before has made, in one launch.
//!
//! ```text
//! x'  = rms_norm(x) where the phase has a norm, else x
//! y   = x' Wᵀ, + bias, + scaling (x' Aᵀ) Bᵀ
//! out = y, or silu(y of the gate) * (y of up), + residual
//! ```
//!
//! Every step rounds to x's dtype as the operation of its name does, so that a chain gives what the operations give
//! one after the other, but for the order of the sums of norm and adapter.

use crate::check::arg;
use crate::error::{Error, Result};
use crate::ops::gemv_4bit::{Gemv4bit, MAX_GROUP};
use crate::tensor::{DType, TensorMut, TensorRef};

const OP: &str = "gemv_4bit_chain";

/// Most rows of x, and most phases of a launch.
pub const MAX_ROWS: usize = 8;
pub const MAX_PHASES: usize = 4;

/// What an adapter adds to a product: `factors * (x Aᵀ) Bᵀ`.
#[derive(Debug)]
#[non_exhaustive]
pub struct Adapter<'a> {
    /// f32 or x's dtype `[rank, K]`
    pub a: TensorRef<'a>,
    /// a's dtype `[N, rank]`
    pub b: TensorRef<'a>,
    /// f32 `[M, rank]`; absent where `scaling` is all
    pub factors: Option<TensorRef<'a>>,
    pub scaling: f32,
    pub rank: usize,
}

#[derive(Debug)]
#[non_exhaustive]
pub struct ChainedProduct<'a> {
    pub product: Gemv4bit<'a>,
    /// x's dtype `[N]`
    pub bias: Option<TensorRef<'a>>,
    pub adapter: Option<Adapter<'a>>,
}

impl<'a> ChainedProduct<'a> {
    pub fn new(product: Gemv4bit<'a>, bias: Option<TensorRef<'a>>, adapter: Option<Adapter<'a>>) -> Result<Self> {
        let (dtype, device) = (product.x.dtype(), product.packed.device());
        if let Some(bias) = bias {
            arg(OP, "bias", bias).dtype(dtype)?.numel(product.shape.n, "N")?.on(device, "packed")?;
        }
        if let Some(adapter) = &adapter {
            adapter.check(&product)?;
        }
        Ok(Self { product, bias, adapter })
    }
}

impl<'a> Adapter<'a> {
    pub fn new(a: TensorRef<'a>, b: TensorRef<'a>, factors: Option<TensorRef<'a>>, scaling: f32, rank: usize) -> Self {
        Self { a, b, factors, scaling, rank }
    }

    fn check(&self, product: &Gemv4bit<'_>) -> Result<()> {
        let (shape, device) = (product.shape, product.packed.device());
        if self.a.dtype() != DType::F32 {
            arg(OP, "lora_a", self.a).dtype(product.x.dtype())?;
        }
        let a = arg(OP, "lora_a", self.a).numel(self.rank * shape.k, "rank x K")?.on(device, "packed")?;
        a.aligned_to(16)?;
        let b = arg(OP, "lora_b", self.b).dtype(self.a.dtype())?;
        b.numel(shape.n * self.rank, "N x rank")?.on(device, "packed")?;
        if let Some(factors) = self.factors {
            let factors = arg(OP, "factors", factors).dtype(DType::F32)?;
            factors.numel(shape.m * self.rank, "M x rank")?.on(device, "packed")?;
        }
        Ok(())
    }
}

/// Products of one x `[M, K]`.
#[derive(Debug)]
#[non_exhaustive]
pub struct ChainPhase<'a> {
    products: [Option<ChainedProduct<'a>>; MAX_GROUP],
    /// Products are pairs of gate and up, and each pair has one output: its gate's.
    pub gated: bool,
    /// x's dtype `[K]`, and the epsilon
    pub norm: Option<(TensorRef<'a>, f32)>,
    /// x's dtype `[M, N]`, given one output
    pub residual: Option<TensorRef<'a>>,
    /// x's dtype `[M, ranks]`, scratch for all adapters
    pub hidden: Option<TensorMut<'a>>,
}

impl<'a> ChainPhase<'a> {
    /// `products`: at most four, or two pairs; all of one x.
    pub fn new(
        products: Vec<ChainedProduct<'a>>,
        gated: bool,
        norm: Option<(TensorRef<'a>, f32)>,
        residual: Option<TensorRef<'a>>,
        hidden: Option<TensorMut<'a>>,
    ) -> Result<Self> {
        let count = products.len();
        if count > MAX_GROUP || gated && !count.is_multiple_of(2) {
            return wrong("products", "at most 4, in pairs where gated", count.to_string());
        }
        let mut products = products.into_iter();
        let products = std::array::from_fn(|_| products.next());
        let phase = Self { products, gated, norm, residual, hidden };
        phase.check()?;
        Ok(phase)
    }

    pub fn products(&self) -> impl Iterator<Item = &ChainedProduct<'a>> {
        self.products.iter().flatten()
    }

    /// Rank of all adapters.
    pub fn ranks(&self) -> usize {
        self.products().filter_map(|product| product.adapter.as_ref()).map(|adapter| adapter.rank).sum()
    }

    pub fn outputs(&self) -> usize {
        self.products().count() / if self.gated { 2 } else { 1 }
    }

    fn check(&self) -> Result<()> {
        let Some(head) = self.products().next().map(|first| &first.product) else {
            return wrong("products", "at least one a phase", "none".to_string());
        };
        let (dtype, device, m, k) = (head.x.dtype(), head.packed.device(), head.shape.m, head.shape.k);
        if let Some((weight, _)) = self.norm {
            arg(OP, "norm", weight).dtype(dtype)?.numel(k, "K")?.on(device, "packed")?.aligned_to(16)?;
        }
        let shapes: Vec<_> = self.products().map(|product| product.product.shape).collect();
        if self.gated && shapes.chunks(2).any(|pair| pair[0] != pair[1]) {
            return wrong("products", "gate and up of one shape", "two shapes".to_string());
        }
        if let Some(residual) = self.residual {
            if self.outputs() != 1 {
                return wrong("residual", "beside one output", self.outputs().to_string());
            }
            arg(OP, "residual", residual).dtype(dtype)?.numel(m * head.shape.n, "M x N")?.on(device, "packed")?;
        }
        match &self.hidden {
            Some(hidden) => {
                let hidden = arg(OP, "hidden", hidden.as_ref()).dtype(dtype)?;
                hidden.numel(m * self.ranks(), "M x all ranks")?.on(device, "packed")?;
            }
            None if self.ranks() > 0 => return wrong("hidden", "scratch for the adapters", "none".to_string()),
            None => {}
        }
        Ok(())
    }
}

#[derive(Debug)]
#[non_exhaustive]
pub struct Gemv4bitChain<'a> {
    phases: [Option<ChainPhase<'a>>; MAX_PHASES],
    /// i32 `[1 + MAX_PHASES]` zeros, which are zeros again when all is done; nothing else may use them meanwhile
    pub arrived: TensorMut<'a>,
}

impl<'a> Gemv4bitChain<'a> {
    /// `phases`: one to four.
    pub fn new(phases: Vec<ChainPhase<'a>>, arrived: TensorMut<'a>) -> Result<Self> {
        check(&phases, arrived.as_ref())?;
        let mut phases = phases.into_iter();
        Ok(Self { phases: std::array::from_fn(|_| phases.next()), arrived })
    }

    pub fn phases(&self) -> impl Iterator<Item = &ChainPhase<'a>> {
        self.phases.iter().flatten()
    }
}

fn check(phases: &[ChainPhase<'_>], arrived: TensorRef<'_>) -> Result<()> {
    if phases.is_empty() || phases.len() > MAX_PHASES {
        return wrong("phases", "1 to 4", phases.len().to_string());
    }
    let products = || phases.iter().flat_map(|phase| phase.products());
    let Some(head) = products().next().map(|first| &first.product) else {
        return wrong("products", "at least one a phase", "none".to_string());
    };
    let (m, dtype, quant_type) = (head.shape.m, head.x.dtype(), head.quant_type);
    if m == 0 || m > MAX_ROWS {
        return wrong("x", "1 to 8 rows", m.to_string());
    }
    let counters = arg(OP, "arrived", arrived).dtype(DType::I32)?;
    counters.numel(1 + MAX_PHASES, "one and one a phase")?.on(head.packed.device(), "packed")?;
    let same = |p: &Gemv4bit<'_>| p.shape.m == m && p.x.dtype() == dtype && p.quant_type == quant_type;
    if !products().all(|chained| same(&chained.product)) {
        return wrong("phases", "one number of rows, one dtype and one quant_type", "several".to_string());
    }
    let mut adapters = products().filter_map(|product| product.adapter.as_ref());
    let kind = adapters.next().map(|adapter| adapter.a.dtype());
    if adapters.any(|adapter| Some(adapter.a.dtype()) != kind) {
        return wrong("lora_a", "one dtype for all adapters", "two".to_string());
    }
    Ok(())
}

fn wrong<T>(name: &'static str, expected: &'static str, got: String) -> Result<T> {
    Err(Error::Argument { op: OP, name, expected, got })
}
