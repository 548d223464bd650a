//! `gemv_4bit_fused`: 4-bit products of one few-rowed x with what a decoder layer puts behind them, in one launch.
//!
//! ```text
//! x   = as given, or rms_norm of it
//! y   = x Wᵀ, + bias, + factors * (x Aᵀ) Bᵀ
//! out = y, or silu(y of the gate) * (y of up), or residual + y
//! ```
//!
//! Every step rounds to x's dtype as the operation of its name does, so that the result is that of the operations one
//! after the other, but for the order of the adapter's sums and of a norm's.

use crate::check::arg;
use crate::error::{Error, Result};
use crate::ops::gemv_4bit::{Gemv4bit, MAX_GROUP};
use crate::tensor::{DType, TensorMut, TensorRef};

const OP: &str = "gemv_4bit_fused";

/// Most rows of x beside adapters, and without, of the kernel of few; more are taken in tiles.
pub const MAX_ADAPTED_ROWS: usize = 8;
pub const MAX_ROWS: usize = 16;
/// Highest rank of an adapter there.
pub const MAX_RANK: usize = 256;
/// Elements of K that make a share of a hidden value of so few rows.
pub const CHUNK: usize = 2048;
/// Neighbours whose squares are summed for a norm.
pub const SQUARES: usize = 16;
/// Largest K of x that is normed, sooner than by a launch of its own: its weight lies in shared memory.
pub const MAX_NORMED: usize = 4096;
/// In tiles the hidden values of an adapter begin at a multiple of this.
pub const RANKS: usize = 16;

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

impl<'a> Adapter<'a> {
    pub fn new(a: TensorRef<'a>, b: TensorRef<'a>, factors: Option<TensorRef<'a>>, scaling: f32, rank: usize) -> Self {
        Self { a, b, factors, scaling, rank }
    }

    /// Columns of its hidden values, in tiles.
    pub fn padded_rank(&self) -> usize {
        self.rank.next_multiple_of(RANKS)
    }

    fn check(&self, product: &Gemv4bit<'_>) -> Result<()> {
        let (shape, device) = (product.shape, product.packed.device());
        if self.rank == 0 {
            return wrong("lora_a", "rank 1 at least", self.rank.to_string());
        }
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

#[derive(Debug)]
#[non_exhaustive]
pub struct FusedProduct<'a> {
    pub product: Gemv4bit<'a>,
    /// x's dtype `[N]`
    pub bias: Option<TensorRef<'a>>,
    pub adapter: Option<Adapter<'a>>,
}

impl<'a> FusedProduct<'a> {
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

/// What x goes through before the products: `x / sqrt(mean(x²) + eps) * weight`.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Norm<'a> {
    /// x's dtype `[K]`
    pub weight: TensorRef<'a>,
    /// f32 `[M, K / SQUARES]`, of x, as `Residual` leaves them
    pub squares: TensorRef<'a>,
    pub eps: f32,
}

impl<'a> Norm<'a> {
    pub fn new(weight: TensorRef<'a>, squares: TensorRef<'a>, eps: f32) -> Self {
        Self { weight, squares, eps }
    }

    fn check(&self, product: &Gemv4bit<'_>) -> Result<()> {
        let (shape, device) = (product.shape, product.packed.device());
        if shape.k > MAX_NORMED {
            return wrong("norm_weight", "4096 elements at most", shape.k.to_string());
        }
        let weight = arg(OP, "norm_weight", self.weight).dtype(product.x.dtype())?.numel(shape.k, "K")?;
        weight.on(device, "packed")?.aligned_to(16)?;
        let squares = arg(OP, "squares", self.squares).dtype(DType::F32)?;
        squares.numel(shape.m * (shape.k / SQUARES), "M x K / 16")?.on(device, "packed")?.aligned_to(16)?;
        Ok(())
    }
}

/// What the one product is added to.
#[derive(Debug)]
#[non_exhaustive]
pub struct Residual<'a> {
    /// x's dtype `[M, N]`
    pub values: TensorRef<'a>,
    /// f32 `[M, N / SQUARES]`, written: sums of the squares of so many neighbours in the sum
    pub squares: TensorMut<'a>,
}

impl<'a> Residual<'a> {
    pub fn new(values: TensorRef<'a>, squares: TensorMut<'a>) -> Self {
        Self { values, squares }
    }

    fn check(&self, product: &Gemv4bit<'_>) -> Result<()> {
        let (shape, device) = (product.shape, product.packed.device());
        if !shape.n.is_multiple_of(SQUARES) {
            return wrong("residual", "a multiple of 16 columns", shape.n.to_string());
        }
        let values = arg(OP, "residual", self.values).dtype(product.x.dtype())?;
        values.numel(shape.m * shape.n, "M x N")?.on(device, "packed")?.aligned_to(8)?;
        let squares = arg(OP, "squares", self.squares.as_ref()).dtype(DType::F32)?;
        squares.numel(shape.m * (shape.n / SQUARES), "M x N / 16")?.on(device, "packed")?;
        Ok(())
    }
}

/// A weight `[n, k]` that the next launch reads.
#[derive(Debug, Clone, Copy)]
pub struct NextWeight<'a> {
    pub packed: TensorRef<'a>,
    /// u8, of double quantization, and its f32 scales
    pub absmax: TensorRef<'a>,
    pub nested_absmax: TensorRef<'a>,
    pub n: usize,
    pub k: usize,
}

/// All of them: their beginnings may be moved nearer while memory has nothing else to do.
#[derive(Debug, Default)]
pub struct Next<'a> {
    weights: [Option<NextWeight<'a>>; MAX_GROUP],
    pub gated: bool,
    /// 16 bits `[k]`, of the norm in front of them
    pub norm: Option<TensorRef<'a>>,
}

impl<'a> Next<'a> {
    /// `weights`: at most four, or two pairs.
    pub fn new(weights: Vec<NextWeight<'a>>, gated: bool, norm: Option<TensorRef<'a>>) -> Result<Self> {
        if weights.len() > MAX_GROUP || gated && !weights.len().is_multiple_of(2) {
            return wrong("next", "at most 4, in pairs where gated", weights.len().to_string());
        }
        let mut weights = weights.into_iter();
        let next = Self { weights: std::array::from_fn(|_| weights.next()), gated, norm };
        next.check()?;
        Ok(next)
    }

    pub fn weights(&self) -> impl Iterator<Item = &NextWeight<'a>> {
        self.weights.iter().flatten()
    }

    fn check(&self) -> Result<()> {
        let Some(first) = self.weights().next() else { return Ok(()) };
        for weight in self.weights() {
            let (size, device) = (weight.n * weight.k, first.packed.device());
            arg(OP, "next", weight.packed).dtype(DType::U8)?.numel(size.div_ceil(2), "N x K, two codes a byte")?;
            arg(OP, "next", weight.absmax).dtype(DType::U8)?.numel(size.div_ceil(64), "a scale a block")?;
            arg(OP, "next", weight.nested_absmax)
                .dtype(DType::F32)?
                .numel(size.div_ceil(64 * 256), "a scale's scale")?;
            arg(OP, "next", weight.packed).on(device, "next")?.aligned_to(16)?;
            if weight.k != first.k || weight.k % 256 != 0 {
                return wrong("next", "one K, a multiple of 256", weight.k.to_string());
            }
        }
        if let Some(norm) = self.norm {
            let norm = arg(OP, "next", norm).numel(first.k, "K of the next launch")?;
            norm.on(first.packed.device(), "next")?;
            if norm.tensor.dtype().size() != 2 {
                return wrong("next", "a norm of 16 bits", format!("{:?}", norm.tensor.dtype()));
            }
        }
        Ok(())
    }
}

#[derive(Debug)]
#[non_exhaustive]
pub struct Gemv4bitFused<'a> {
    products: [Option<FusedProduct<'a>>; MAX_GROUP],
    /// Products are pairs of gate and up, and each pair has one output: its gate's.
    pub gated: bool,
    /// f32 `[ceil(K / CHUNK), M, ranks]`, the adapters' hidden values one after the other, or in tiles x's dtype
    /// `[M, columns_of_all]`; scratch, which they need
    pub hidden: Option<TensorMut<'a>>,
    /// i32, a zero before and after, by which launches meet; beside `hidden`
    pub arrived: Option<TensorMut<'a>>,
    pub norm: Option<Norm<'a>>,
    pub residual: Option<Residual<'a>>,
    pub next: Next<'a>,
}

impl<'a> Gemv4bitFused<'a> {
    /// `products`: one to four, or one or two pairs; all of one x.
    pub fn new(
        products: Vec<FusedProduct<'a>>,
        gated: bool,
        hidden: Option<TensorMut<'a>>,
        arrived: Option<TensorMut<'a>>,
        norm: Option<Norm<'a>>,
        residual: Option<Residual<'a>>,
        next: Next<'a>,
    ) -> Result<Self> {
        let count = products.len();
        if !(1..=MAX_GROUP).contains(&count) || gated && !count.is_multiple_of(2) {
            return wrong("products", "1 to 4, in pairs where gated", count.to_string());
        }
        let mut products = products.into_iter();
        let products = std::array::from_fn(|_| products.next());
        let fused = Self { products, gated, hidden, arrived, norm, residual, next };
        fused.check()?;
        Ok(fused)
    }

    pub fn products(&self) -> impl Iterator<Item = &FusedProduct<'a>> {
        self.products.iter().flatten()
    }

    pub fn adapters(&self) -> impl Iterator<Item = &Adapter<'a>> {
        self.products().filter_map(|product| product.adapter.as_ref())
    }

    /// Rank of all adapters.
    pub fn ranks(&self) -> usize {
        self.adapters().map(|adapter| adapter.rank).sum()
    }

    /// Whether there are too many rows of x, or ranks, for the kernel of few.
    pub fn is_tiled(&self) -> bool {
        let most = if self.ranks() > 0 { MAX_ADAPTED_ROWS } else { MAX_ROWS };
        self.products().any(|product| product.product.shape.m > most)
            || self.adapters().any(|adapter| adapter.rank > MAX_RANK)
    }

    /// Columns of all hidden values, in tiles.
    pub fn columns_of_all(&self) -> usize {
        self.adapters().map(Adapter::padded_rank).sum()
    }

    /// Of each product, where the hidden values of its adapter begin among those, if it has one.
    pub fn columns(&self) -> impl Iterator<Item = usize> {
        self.products().scan(0, |end, product| {
            let column = *end;
            *end += product.adapter.as_ref().map_or(0, Adapter::padded_rank);
            Some(column)
        })
    }

    fn check(&self) -> Result<()> {
        let shapes: Vec<_> = self.products().map(|product| product.product.shape).collect();
        if self.gated && shapes.chunks(2).any(|pair| pair[0] != pair[1]) {
            return wrong("products", "gate and up of one shape", "two shapes".to_string());
        }
        let Some(head) = self.products().next() else { return Ok(()) };
        self.check_norm_and_residual(&head.product)?;
        let Some(first) = self.adapters().next() else { return Ok(()) };
        if self.adapters().any(|adapter| adapter.a.dtype() != first.a.dtype()) {
            return wrong("lora_a", "one dtype for all adapters", "two".to_string());
        }
        let (shape, x) = (head.product.shape, head.product.x);
        let Some(hidden) = &self.hidden else {
            return wrong("hidden", "beside adapters", "none".to_string());
        };
        let Some(arrived) = &self.arrived else {
            return wrong("arrived", "beside adapters", "none".to_string());
        };
        arg(OP, "arrived", arrived.as_ref()).dtype(DType::I32)?.on(first.a.device(), "packed")?;
        let hidden = arg(OP, "hidden", hidden.as_ref()).on(first.a.device(), "packed")?;
        if self.is_tiled() {
            let hidden = hidden.dtype(x.dtype())?.aligned_to(8)?;
            hidden.numel(shape.m * self.columns_of_all(), "M x all ranks, each a multiple of 16")?;
        } else {
            let hidden = hidden.dtype(DType::F32)?;
            hidden.numel(shape.k.div_ceil(CHUNK) * shape.m * self.ranks(), "chunks of K x M x all ranks")?;
        }
        Ok(())
    }

    fn check_norm_and_residual(&self, head: &Gemv4bit<'_>) -> Result<()> {
        if (self.norm.is_some() || self.residual.is_some()) && self.is_tiled() {
            let expected = "16 rows at most beside a norm or a residual, 8 with adapters, of rank 256 at most";
            let ranks: Vec<_> = self.adapters().map(|adapter| adapter.rank).collect();
            return wrong("x", expected, format!("{} and ranks {ranks:?}", head.shape.m));
        }
        if let Some(norm) = &self.norm {
            norm.check(head)?;
        }
        if let Some(residual) = &self.residual {
            if self.gated || self.products().count() != 1 {
                return wrong("residual", "one product", self.products().count().to_string());
            }
            residual.check(head)?;
        }
        Ok(())
    }
}

fn wrong<T>(name: &'static str, expected: &'static str, got: String) -> Result<T> {
    Err(Error::Argument { op: OP, name, expected, got })
}
